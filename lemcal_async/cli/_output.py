"""Output: exit statuses, one-line messages, tables, JSON and CSV.

Rich is imported only to write to a terminal; output to a file or a pipe is plain text. Each command's own
file decides what to print.
"""

import contextlib
import csv
import enum
import errno
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs

from lemcal_async import events
from lemcal_async._urls import without_secrets
from lemcal_async.errors import (
    AuthenticationError,
    BadRow,
    ConfigurationError,
    EmptyListError,
    LemcalError,
    NotFoundError,
    StoreError,
)


class ExitStatus(enum.IntEnum):
    """The exit statuses. Values above 128 are those of a process ended by a signal."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREADABLE_ROWS = 3
    AUTHENTICATION = 4
    NOT_FOUND = 5
    INTERRUPTED = 130
    NO_READER = 141
    TERMINATED = 143


# The line with \b keeps Typer from rewrapping the text.
HELP = """\
\b
Exit statuses of all commands:
  0    success
  1    the service or the network failed, or the output could not be written;
       for a synchronization, some accounts failed (if all of them failed for
       the same reason, the status is that of the reason)
  2    invalid usage or configuration, or an unusable database
  3    some rows could not be read; the others were processed
  4    the service rejected the credentials
  5    not found
  130  Ctrl-C (SIGINT)
  141  the program reading the output closed it, as `| head` does
  143  SIGTERM
"""

_STATUSES: tuple[tuple[type[LemcalError], ExitStatus], ...] = (
    (ConfigurationError, ExitStatus.USAGE),
    (EmptyListError, ExitStatus.FAILED),
    (StoreError, ExitStatus.USAGE),
    (AuthenticationError, ExitStatus.AUTHENTICATION),
    (NotFoundError, ExitStatus.NOT_FOUND),
)


class OutputError(Exception):
    """Standard output or a file cannot be written. With NO_READER, no message is printed."""

    def __init__(self, status: ExitStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: Exception) -> ExitStatus:
    """Return the exit status for an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), ExitStatus.FAILED)


def printable(text: str) -> str:
    """Return ``text`` as one line without control characters: guests and the server choose its contents."""
    if text.isprintable():
        return text
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def print_message(message: str) -> None:
    """Write a line to standard error."""
    with contextlib.suppress(OSError):  # there is nowhere else to report it
        sys.stderr.write(f"lemcal: {without_secrets(printable(message))}\n")
        sys.stderr.flush()


def warn_of_bad_rows(noun: str, bad_rows: Sequence[BadRow]) -> None:
    """Write a line to standard error for each row that could not be read."""
    for row in bad_rows:
        print_message(f"warning: row {row.index} of the {noun} cannot be read: {row.reason}")


_OUTPUT_ERRORS: Final = {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}


def emit(text: str) -> None:
    """Write text to standard output and flush it; OutputError if that fails."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # Do not fail on characters that the encoding lacks; do not translate CSV's line endings.
        stream.reconfigure(errors="backslashreplace", newline="")
    with handle_write_errors():
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def handle_write_errors() -> Generator[None]:
    """Convert errors of writing to standard output to OutputError."""
    try:
        yield
    except BrokenPipeError:
        status, problem = ExitStatus.NO_READER, ""
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        status, problem = ExitStatus.FAILED, f"the output cannot be written: {error.strerror}"
    else:
        return
    # Otherwise, Python would flush the rest at exit and print another error.
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # os.devnull is not a path on every system
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    raise OutputError(status, problem)


@contextlib.contextmanager
def convert_file_errors(path: Path) -> Generator[None]:
    """Convert errors of writing to a file to OutputError."""
    try:
        yield
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
    else:
        return
    raise OutputError(ExitStatus.FAILED, problem)


SPINNER_DELAY: Final = 0.5
"""Seconds to wait before showing the spinner."""


@contextlib.contextmanager
def spinner(text: str) -> Generator[None]:
    """Show ``text`` with a spinner on standard error after a delay, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only for a terminal
    from rich.live import Live  # noqa: PLC0415  # as above
    from rich.spinner import Spinner  # noqa: PLC0415  # as above

    # Not console.status(), which would redirect the block's standard output to the terminal.
    live = Live(Spinner("dots", text), console=Console(stderr=True), transient=True, redirect_stdout=False)
    timer = threading.Timer(SPINNER_DELAY, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the spinner right now
        live.stop()


@contextlib.contextmanager
def account_progress(text: str, accounts: int) -> Generator[None]:
    """Show a progress bar of synchronized accounts on standard error, if it is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only for a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415  # as above

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(text, total=accounts)

        def advance(event: events.Event) -> None:
            if isinstance(event, events.AccountSynced):
                progress.advance(task)

        unsubscribe = events.subscribe(advance)
        try:
            yield
        finally:
            unsubscribe()


def short_time(time: datetime | None) -> str | None:
    """Return a time for people, in UTC and to the minute."""
    return None if time is None else f"{time:%Y-%m-%d %H:%M}"


def print_json(data: Any) -> None:
    """Print JSON in ASCII, which is valid in any encoding, even with invalid text from the service."""
    emit(json.dumps(data, indent=2) + "\n")


def json_line(data: dict[str, Any]) -> str:
    """Return data as one line of JSON, in ASCII."""
    return json.dumps(data) + "\n"


# Prefixes that a spreadsheet treats as a formula. Guests choose their own names.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


def print_csv(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """Print CSV (RFC 4180) with a header.

    A field that a spreadsheet would treat as a formula gets a leading apostrophe.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(header)
    writer.writerows([[_escape_formula(field or "") for field in row] for row in rows])
    emit(buffer.getvalue())


def _escape_formula(field: str) -> str:
    return f"'{field}" if field.startswith(_FORMULA) else field


def print_fields(fields: Sequence[tuple[str, str | None]]) -> None:
    """Print a line per name and value, without those that have no value."""
    lines = [(name, printable(value)) for name, value in fields if value]
    width = max(len(name) for name, _ in lines)
    emit("".join(f"{name.ljust(width)}  {value}\n" for name, value in lines))


T = TypeVar("T")

_COLUMN_GAP: Final = 2  # spaces between columns
_MIN_WRAPPED_WIDTH: Final = 14  # minimum width of a column whose cells may wrap


@attrs.frozen
class Column(Generic[T]):
    """A column of a table: its heading and its value for a row.

    On a narrow terminal, columns with a ``rank`` are dropped, highest rank first. The others wrap, but a
    ``no_wrap`` column only as a last resort.
    """

    heading: str
    value: Callable[[T], str | None]
    no_wrap: bool = False
    rank: int = 0


def print_table(columns: Sequence[Column[T]], rows: Sequence[T]) -> None:
    """Print a table: fitted to the width of a terminal, or with one line per row to a file or a pipe."""
    cells = [[printable(column.value(row) or "") for row in rows] for column in columns]
    if sys.stdout.isatty():
        with spinner("Laying out the table"):  # takes seconds for 20,000 rows
            text = _fit_to_terminal(columns, cells)
        emit(text)
        return
    widths = [max(map(len, [c.heading, *values])) for c, values in zip(columns, cells, strict=True)]
    print_row([column.heading for column in columns], widths)
    emit("".join(_format_row(row, widths) for row in zip(*cells, strict=True)))


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print one line of a table whose rows arrive one at a time."""
    emit(_format_row(cells, widths))


def _format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return (" " * _COLUMN_GAP).join(padded).rstrip() + "\n"


def _fit_to_terminal(columns: Sequence[Column[T]], cells: Sequence[Sequence[str]]) -> str:
    from rich.cells import cell_len  # noqa: PLC0415  # only for a terminal
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415  # as above
    from rich.text import Text  # noqa: PLC0415  # as above

    console = Console()
    widths: list[int] = []  # the minimum width of each column
    for column, values in zip(columns, cells, strict=True):
        width = max(map(cell_len, [column.heading, *values]))
        widths.append(width if column.no_wrap else min(width, _MIN_WRAPPED_WIDTH))
    shown = list(range(len(columns)))

    def too_wide() -> bool:
        return sum(widths[index] + _COLUMN_GAP for index in shown) - _COLUMN_GAP > console.width

    for index in sorted(shown, key=lambda index: -columns[index].rank):
        if columns[index].rank and too_wide():
            shown.remove(index)
    wrap_all = too_wide()
    table = Table(box=None, pad_edge=False, padding=(0, _COLUMN_GAP, 0, 0), header_style="bold")
    for index in shown:
        no_wrap = columns[index].no_wrap and not wrap_all
        table.add_column(Text(columns[index].heading), no_wrap=no_wrap, overflow="fold")
    # As Text, because Rich would parse brackets in a string as markup.
    for line in zip(*(cells[index] for index in shown), strict=True):
        table.add_row(*map(Text, line))
    with console.capture() as capture:
        console.print(table)
    return capture.get()
