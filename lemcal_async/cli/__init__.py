"""The ``lemcal`` command: the service, a sandbox of it, and synchronization, from a terminal or a script.

It needs the extra ``cli`` (Typer and Rich), which nothing else in the package imports. ``_app.py`` registers
the commands.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, or the process's, and return the exit status."""
    try:
        from lemcal_async.cli._process import prepared  # noqa: PLC0415  # so that Ctrl-C during it is quiet

        with prepared(argv is None) as ended:
            from lemcal_async.cli._app import run  # noqa: PLC0415  # so that a missing extra can be named

            return ended(run(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
    except KeyboardInterrupt:  # outside of any command
        return 130
    if sys.stderr is not None:
        sys.stderr.write("lemcal: the command line needs its extra: pip install 'lemcal-async[cli]'\n")
    return 2
