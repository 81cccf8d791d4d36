"""What is the user's to fix, as against a bug."""

import reprlib


class UserError(ValueError):
    """Wrong input: one sentence on what was expected, what was given, and how to fix it.

    A command prints it and ends with code 2; every other exception is a bug and has a traceback.
    """


def shown(value: object, most: int = 120) -> str:
    """A value from outside, as a sentence shows it: at most so many characters, however large.

    >>> shown(["a", 1.5]), shown("x" * 999, most=9)
    ("['a', 1.5]", "'xx...xx'")
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 12, 12, 12
    short.maxstring = short.maxlong = short.maxother = most
    return clipped(short.repr(value), most)


def clipped(text: object, most: int = 200) -> str:
    """What a library says, or a name, on one line: its middle is left out where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most // 2]}…{line[len(line) - most // 2 + 1 :]}"
