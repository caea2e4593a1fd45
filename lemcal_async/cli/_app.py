"""The commands put together, and what happens to whatever they raise.

A new command is a file beside this one and a line here.
"""

from collections.abc import Sequence
from typing import Annotated, cast

import typer

from lemcal_async._version import __version__
from lemcal_async.cli import _calls as calls, _output as exits, _sandbox as sandbox, _sync as sync
from lemcal_async.cli._output import ExitStatus, OutputError, emit, status_of, tell
from lemcal_async.errors import LemcalError

_HELP = f"""\
The booking calendar lemcal, from a terminal or a script.

Credentials come from LEMCAL_USER_ID and LEMCAL_API_KEY, or from a file given with --accounts; with
--sandbox a command runs against invented data and needs none.

{exits.HELP}"""

# Typer has no public name for what its parser raises: click's class once, its own copy of it later.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

# Plain help, usage errors in one line, and Python's own tracebacks for bugs: no local variables in them.
app = typer.Typer(help=_HELP, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("me")(calls.me)
app.command("meetings")(calls.meetings)
app.command("types")(calls.types)
app.add_typer(calls.hooks_app, name="hooks")
app.command("sync")(sync.sync)
app.command("changes")(sync.changes)
app.command("forget")(sync.forget)
app.command("sandbox")(sandbox.sandbox)


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer's signature
    if wanted:
        emit(f"lemcal-async {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before the command."""


def run(argv: Sequence[str]) -> int:
    """Run a command and return its exit status; errors that are no bugs become one line."""
    try:
        status: int | None = app(list(argv), prog_name="lemcal", standalone_mode=False)
    except LemcalError as error:
        tell(str(error))
        return status_of(error)
    except OutputError as error:
        if error.status != ExitStatus.NO_READER:
            tell(str(error))
        return error.status
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "lemcal"
        tell(f"{error.format_message().rstrip('.')}; see: {command} --help")
        return ExitStatus.USAGE
    except (KeyboardInterrupt, typer.Abort):  # typer has made the one of the other, up to some version
        return ExitStatus.INTERRUPTED
    return status or ExitStatus.OK
