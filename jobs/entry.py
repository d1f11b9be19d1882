"""Entry: the start of the `tessera` command, which Ctrl-C ends quietly from the first moment.

Importing the commands takes a moment, in which nothing of theirs can handle Ctrl-C yet. This file
imports nothing before it can.
"""

import sys

INTERRUPTED = 130
"""Exit status after Ctrl-C, as Typer sets it."""


def main() -> None:
    """Run the command line (`jobs.cli.main`)."""
    try:
        from jobs.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
