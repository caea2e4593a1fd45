"""Registers the commands and turns their errors into messages and exit statuses.

To add a command, create a file in this folder and register it here.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, cast

import typer

from lemcal_async._version import __version__
from lemcal_async.cli._calls import hooks_app, me, meetings, types
from lemcal_async.cli._fleet import fleet_app, worker
from lemcal_async.cli._listen import listen
from lemcal_async.cli._output import (
    HELP,
    ExitStatus,
    OutputError,
    emit,
    handle_write_errors,
    print_message,
    status_of,
)
from lemcal_async.cli._report import report
from lemcal_async.cli._sandbox import sandbox
from lemcal_async.cli._sync import changes, forget, retry, sync
from lemcal_async.cli._trigger import trigger
from lemcal_async.errors import LemcalError

_HELP = f"""\
Use the lemcal booking calendar from a terminal or a script.

Credentials come from LEMCAL_USER_ID and LEMCAL_API_KEY, or from a file passed with --accounts. With
--sandbox, a command uses demo data and needs no credentials.

{HELP}"""

# Typer has no public name for its parser's exception: older versions raise click's class, newer ones a copy.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

# Plain help, one-line usage errors, and for bugs Python's own tracebacks, which show no local variables.
app = typer.Typer(help=_HELP, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("me")(me)
app.command("meetings")(meetings)
app.command("types")(types)
app.add_typer(hooks_app, name="hooks")
app.command("sync")(sync)
app.command("changes")(changes)
app.command("retry")(retry)
app.command("forget")(forget)
app.command("report")(report)
app.command("listen")(listen)
app.command("trigger")(trigger)
app.command("worker")(worker)
app.add_typer(fleet_app, name="fleet")
app.command("sandbox")(sandbox)


# Commands print what the library logs; without a handler, logging would print it a second time.
_NULL_HANDLER = logging.NullHandler()


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # Typer's signature
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
    """Handle the options that precede the command."""


def run(argv: Sequence[str]) -> int:
    """Run a command and return its exit status. Errors other than bugs are printed on one line."""
    logging.getLogger("lemcal_async").addHandler(_NULL_HANDLER)
    try:
        return _run(argv)
    finally:
        logging.getLogger("lemcal_async").removeHandler(_NULL_HANDLER)


def _run(argv: Sequence[str]) -> int:
    try:
        with handle_write_errors():  # Typer itself writes the help
            status: int | None = app(list(argv), prog_name="lemcal", standalone_mode=False)
    except LemcalError as error:
        print_message(str(error))
        return status_of(error)
    except OutputError as error:
        if error.status != ExitStatus.NO_READER:
            print_message(str(error))
        return error.status
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the reader of the help closed the pipe
            return ExitStatus.NO_READER
        raise
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "lemcal"
        message = error.format_message().replace(": Value error, ", ": ").rstrip(".")  # added by Typer
        print_message(f"{message}; see: {command} --help")
        return ExitStatus.USAGE
    except (KeyboardInterrupt, typer.Abort):  # some versions of Typer convert KeyboardInterrupt to Abort
        return ExitStatus.INTERRUPTED
    return status or ExitStatus.OK
