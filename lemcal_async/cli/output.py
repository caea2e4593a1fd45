"""Writing to standard output: tables for people, JSON and CSV for programs.

Knows how, and nothing of what: that is in each command's file. Rich is imported when a terminal is to be
written to; what goes into a file or a pipe is plain.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import attrs

from lemcal_async.cli.exits import ExitStatus, OutputError, printable
from lemcal_async.cli.progress import waiting

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
