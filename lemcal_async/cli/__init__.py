"""The command ``lemcal``: the service, a sandbox of it and a synchronization from a terminal or a script.

It needs the extra ``cli`` (typer and rich), which nothing else in the package imports. Each command is a
file of its own, registered in ``app.py``.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, else the process's, and return the exit status."""
    try:
        from lemcal_async.cli._app import run  # noqa: PLC0415  # so that a missing extra can be named

        return run(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
    except KeyboardInterrupt:  # outside of any command
        return 130
    sys.stderr.write("lemcal: the command line needs its extra: pip install 'lemcal-async[cli]'\n")
    return 2
