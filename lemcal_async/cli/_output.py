"""How a command ends: with an exit status for scripts, and one line on standard error for people.

The statuses are explained in ``HELP``, which ``lemcal --help`` shows.

A sign of life on standard error while a command waits, if a person is looking.

MERGED [cli.output] Writing to standard output: tables for people, JSON and CSV for programs.

Knows how, and nothing of what: that is in each command's file. Rich is imported when a terminal is to be
written to; what goes into a file or a pipe is plain.
"""

import contextlib
import csv
import enum
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, Generic, TypeVar

import attrs

from lemcal_async import events
from lemcal_async._urls import without_secrets
from lemcal_async.errors import (
    AuthenticationError,
    BadRow,
    ConfigurationError,
    LemcalError,
    NotFoundError,
)


class ExitStatus(enum.IntEnum):
    """The exit statuses; those above 128 are the ones of a process that a signal has ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREADABLE_ROWS = 3
    AUTHENTICATION = 4
    NOT_FOUND = 5
    INTERRUPTED = 130
    NO_READER = 141


# The line with \b keeps typer from filling the lines.
HELP = """\
\b
Exit status:
  0    done
  1    the service, the network or the database failed, or the output cannot be written;
       in a synchronization: some account failed
  2    wrong usage or configuration; nothing was sent
  3    some rows could not be read; the others were printed
  4    the service does not accept the credentials
  5    there is no such thing
  130  Ctrl-C (but the sandbox, which ends that way, ends with 0)
  141  whoever read the output has closed it, as `| head` does
"""

_STATUSES: tuple[tuple[type[LemcalError], ExitStatus], ...] = (
    (ConfigurationError, ExitStatus.USAGE),
    (AuthenticationError, ExitStatus.AUTHENTICATION),
    (NotFoundError, ExitStatus.NOT_FOUND),
    (LemcalError, ExitStatus.FAILED),
)


class OutputError(Exception):
    """Standard output cannot be written; with NO_READER there is nobody to tell."""

    def __init__(self, status: ExitStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: LemcalError) -> ExitStatus:
    """Return the exit status of a command that ends with this error."""
    return next(status for kind, status in _STATUSES if isinstance(error, kind))


def printable(text: str) -> str:
    """Return ``text`` as one line that does nothing to a terminal.

    Guests write some of what is shown, and the server the rest.
    """
    if text.isprintable():
        return text
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def tell(message: str) -> None:
    """Say something in one line on standard error."""
    sys.stderr.write(f"lemcal: {without_secrets(printable(message))}\n")


def tell_of_bad_rows(noun: str, bad_rows: Sequence[BadRow]) -> None:
    """Say which rows could not be read, each in one line on standard error."""
    for row in bad_rows:
        tell(f"warning: row {row.index} of the {noun} cannot be read: {row.reason}")


DELAY: Final = 0.5
"""Seconds after which a wait is worth a word."""


@contextlib.contextmanager
def waiting(text: str) -> Generator[None]:
    """Show ``text`` with a spinner once the block has taken longer than a moment; erase it at the end."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only when there is a terminal
    from rich.live import Live  # noqa: PLC0415  # as above
    from rich.spinner import Spinner  # noqa: PLC0415  # as above

    # Not console.status(): that would take what the block writes to standard output to the terminal.
    live = Live(Spinner("dots", text), console=Console(stderr=True), transient=True, redirect_stdout=False)
    timer = threading.Timer(DELAY, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the spinner just now
        live.stop()


@contextlib.contextmanager
def counting(text: str, accounts: int) -> Generator[None]:
    """Show a bar of the accounts that are done while the block runs; erase it at the end."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only when there is a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415  # as above

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(text, total=accounts)

        def advance(event: events.Event) -> None:
            if isinstance(event, events.AccountSynced):
                progress.advance(task)

        leave = events.subscribe(advance)
        try:
            yield
        finally:
            leave()


T = TypeVar("T")

_GAP: Final = 2  # blanks between columns
_ENOUGH: Final = 32  # characters; to wrap what is longer is no loss

# What makes a spreadsheet take a field for a formula; guests choose their own names.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


@attrs.frozen
class Column(Generic[T]):
    """A column of a table: its heading, and what it shows of a row.

    In a terminal that is too narrow, those that are only there ``if_room`` are left out, the last one
    first; then the others are wrapped, but not one that is to stay ``whole``.
    """

    heading: str
    value: Callable[[T], str | None]
    whole: bool = False
    if_room: bool = False


def emit(text: str) -> None:
    """Write text to standard output, and out; OutputError if that fails."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is no reason to fail; CSV brings its own line ends.
        stream.reconfigure(errors="backslashreplace", newline="")
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        status, problem = ExitStatus.NO_READER, ""
    except OSError as error:
        status, problem = ExitStatus.FAILED, f"the output cannot be written: {error.strerror}"
    else:
        return
    # Python would try to write the rest at exit, and report on it.
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # os.devnull is no path on every system
        os.dup2(nowhere.fileno(), stream.fileno())
    raise OutputError(status, problem)


def print_json(data: Any) -> None:
    """Print JSON, in ASCII: valid whatever the encoding, and for broken text from the service as well."""
    emit(json.dumps(data, indent=2) + "\n")


def print_csv(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """Print CSV (RFC 4180) with a header.

    A field that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(header)
    writer.writerows([[_inert(field or "") for field in row] for row in rows])
    emit(buffer.getvalue())


def _inert(field: str) -> str:
    return f"'{field}" if field.startswith(_FORMULA) else field


def print_table(columns: Sequence[Column[T]], rows: Sequence[T]) -> None:
    """Print a table: as wide as it needs into a file or pipe, a line per row; fitted into a terminal."""
    cells = [[printable(column.value(row) or "") for row in rows] for column in columns]
    if sys.stdout.isatty():
        with waiting("Laying out the table"):  # seconds for 20,000 rows
            text = _fitted(columns, cells)
        emit(text)
        return
    padded: list[list[str]] = []
    for column, values in zip(columns, cells, strict=True):
        width = max(map(len, [column.heading, *values]))
        padded.append([value.ljust(width) for value in [column.heading, *values]])
    emit("".join((" " * _GAP).join(line).rstrip() + "\n" for line in zip(*padded, strict=True)))


def _fitted(columns: Sequence[Column[T]], cells: Sequence[Sequence[str]]) -> str:
    from rich.cells import cell_len  # noqa: PLC0415  # only when there is a terminal
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415  # as above
    from rich.text import Text  # noqa: PLC0415  # as above

    console = Console()
    widths: list[int] = []
    for column, values in zip(columns, cells, strict=True):
        width = max(map(cell_len, [column.heading, *values]))
        widths.append(width if column.whole else min(width, _ENOUGH))
    shown = list(range(len(columns)))
    for index in reversed(range(len(columns))):
        if columns[index].if_room and sum(widths[at] + _GAP for at in shown) - _GAP > console.width:
            shown.remove(index)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for index in shown:
        table.add_column(Text(columns[index].heading), no_wrap=columns[index].whole)
    # As Text, or brackets in a name would be taken for markup.
    for line in zip(*(cells[index] for index in shown), strict=True):
        table.add_row(*map(Text, line))
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def print_facts(facts: Sequence[tuple[str, str | None]]) -> None:
    """Print what is known of one thing, a line each; what is not known is left out."""
    known = [(name, printable(value)) for name, value in facts if value]
    width = max(len(name) for name, _ in known)
    emit("".join(f"{name.ljust(width)}  {value}\n" for name, value in known))
