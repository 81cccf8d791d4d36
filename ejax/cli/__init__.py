"""The `ejax` command."""

import sys

from ejax import ending


def main() -> None:
    """The `ejax` command; what is not needed to end well is imported later."""
    ending.hold_streams()  # first: what is opened next gets the number of a closed one
    ending.heed_signals("ejax")
    from ejax.cli.app import app
    from ejax.cli.run import run

    ending.end(run(app, "ejax", sys.argv[1:]))
