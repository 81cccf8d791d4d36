"""What is the user's to fix, as against a bug."""


class UserError(ValueError):
    """Wrong input: one sentence on what was expected, what was given, and how to fix it.

    A command prints it and ends with code 2; every other exception is a bug and has a traceback.
    """
