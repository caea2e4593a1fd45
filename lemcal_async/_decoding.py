"""From the body of an answer to JSON, to models, or to an error that names the call.

Short bodies are read at once. A long list is read in slices, and the event loop gets its turn in between:
reading 12 MB in one go would hold up everything else for a quarter of a second. How rows become models is
the business of ``_codec.py``, what is wrong with a body that of ``_responses.py``.
"""

import logging
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from json import JSONDecoder
from typing import Any, Final, Protocol, TypeVar, get_args, get_origin

import anyio
from anyio.lowlevel import checkpoint, current_token

from lemcal_async import _gc
from lemcal_async._auth import Secret
from lemcal_async._codec import RowReader, from_wire
from lemcal_async._responses import DECODER, object_of, read_json, rows_of
from lemcal_async.errors import BadRow, CallInfo, ResponseDecodeError

logger = logging.getLogger("lemcal_async")

T = TypeVar("T")

SLICE: Final = 128 * 1024  # bytes: about 2 ms, including the models made of it

_SPACE = rb"[ \t\r\n]*"
_BEGINNING = rb"(?:\xef\xbb\xbf)?" + _SPACE + rb"\[" + _SPACE + rb"(?=[^\] \t\r\n])"
_ENVELOPE = rb'(?:\xef\xbb\xbf)?[ \t\r\n]*\{[ \t\r\n]*"(?:%b)"[ \t\r\n]*:[ \t\r\n]*(?=\[)'
# From the end of one object to the first name in the next: few objects inside rows begin the same way.
_BETWEEN_OBJECTS = rb"\}" + _SPACE + rb"," + _SPACE + rb"\{(?:" + _SPACE + rb'"[^"\\]*"' + _SPACE + rb":)?"
_BETWEEN_OTHERS = _SPACE + rb"," + _SPACE
_ENVELOPES = ("data",)  # beside the name of what is listed
_TRIES = 16  # ends of a slice to try, one after the other

# What is parsed in one go may hold this many values: `[[],[],…` takes 24 times its size in memory.
_MOST_VALUES = 8_000_000
_SURELY_FEWER = 8_000_000  # bytes, of which each could be one

_LONG = 2 * SLICE  # bytes; anything shorter takes at most about 4 ms
_TURN = 0.004  # seconds of work after which the event loop gets its turn
_ROWS = 200  # parsed rows to make models of between two looks at the clock

_locks: weakref.WeakKeyDictionary[Any, anyio.Lock] = weakref.WeakKeyDictionary()  # by event loop


class Body(Protocol):
    """The part of a success that is parsed."""

    @property
    def status_code(self) -> int:
        """The status, a 2xx."""
        ...

    @property
    def body(self) -> bytes:
        """The body, decompressed."""
        ...

    @property
    def call(self) -> CallInfo:
        """The call, for errors to name."""
        ...


# --- Slices -----------------------------------------------------------------------------------------


class NotSlicedError(Exception):
    """The text cannot be sliced, or is no JSON array; discard all slices of it."""


def slices_of(body: bytes, decoder: JSONDecoder, size: int = SLICE) -> Iterator[list[Any]]:
    """Yield the items of a JSON array, in order, as lists; ``size`` is in bytes.

    Each slice is parsed when it is asked for. Together they are what ``decoder`` makes of the whole. The
    text is cut where a row is likely to end, and a slice that parses proves that it did. Raises
    NotSlicedError at any slice if that does not work out.
    """
    beginning = re.match(_BEGINNING, body)
    if beginning is None:
        raise NotSlicedError
    start = beginning.end()
    mark = _mark_of(body, start, decoder)
    while start < len(body):
        rows, start = _slice(body, start, mark, decoder, size)
        yield rows


def unwrapped(body: bytes, names: tuple[str, ...]) -> bytes:
    """Return what may be the array in an envelope, to be sliced, or else the body as it is.

    If there is more in the envelope than that, slicing it fails.
    """
    beginning = re.match(_ENVELOPE % b"|".join(re.escape(name.encode()) for name in names), body)
    end = re.compile(rb"\]" + _SPACE + rb"\}" + _SPACE + rb"\Z").search(body, max(0, len(body) - 100))
    if beginning is None or end is None:
        return body
    return body[beginning.end() : end.start() + 1]


def _mark_of(body: bytes, start: int, decoder: JSONDecoder) -> bytes:
    """Return what stands between the first two rows, and so between all that one program wrote."""
    head = body[start : start + SLICE].decode("utf-8", "replace")
    try:
        first, end = decoder.raw_decode(head)
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    if isinstance(first, dict):
        mark = re.compile(_BETWEEN_OBJECTS).match(body, start + len(head[: end - 1].encode()))
    else:
        mark = re.compile(_BETWEEN_OTHERS).match(body, start + len(head[:end].encode()))
    if mark is None:
        raise NotSlicedError
    return mark[0]


def _slice(body: bytes, start: int, mark: bytes, decoder: JSONDecoder, size: int) -> tuple[list[Any], int]:
    """Return the rows of one slice, and where the next begins."""
    end = start + size - 1
    for _ in range(_TRIES):
        end = body.find(mark, end + 1)
        if end < 0:
            return _array(body[start:], b"[", b"", decoder), len(body)
        comma = end + mark.index(b",")
        try:
            # Cut inside a row, this would leave a bracket open, and not parse.
            return _array(body[start:comma], b"[", b"]", decoder), comma + 1
        except NotSlicedError:
            continue
    raise NotSlicedError


def _array(items: bytes, left: bytes, right: bytes, decoder: JSONDecoder) -> list[Any]:
    if _holds_too_much(items):
        raise NotSlicedError
    try:
        rows: list[Any] = decoder.decode((left + items + right).decode())
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    return rows


def _holds_too_much(text: bytes) -> bool:
    return len(text) > _SURELY_FEWER and sum(map(text.count, (b",", b"{", b"["))) > _MOST_VALUES


# --- Whole answers ----------------------------------------------------------------------------------


async def read_models(answer: Body, name: str, into: type[T], *, skip_bad_rows: bool) -> list[T]:
    """Make models of an answer that is a list; bad rows are reported, not lost."""
    reader = RowReader(into)
    if not await _in_slices(answer, reader.add, name):
        if reader.count:
            reader = RowReader(into)
        rows = parse_rows(answer, name)
        if len(rows) <= _ROWS:
            reader.add(rows)  # shorter than a turn
        else:
            await _by_turns((rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS)), reader.add)
    if not reader.bad:
        return reader.good
    first = reader.bad[0]
    problem = f"{reader.problem()} (the first is row {first.index}: {first.reason})"
    if skip_bad_rows:
        logger.warning("%s: %s; they are left out", answer.call, problem)
        return reader.good
    advice = "the others are in .rows, and on_bad_row='skip' goes on without these"
    raise _list_error(answer, f"{problem}; {advice}", reader)


def is_long(answer: Body) -> bool:
    """Whether the event loop must get its turn while the answer is read."""
    return len(answer.body) > _LONG


async def read_rows(answer: Body, name: str) -> list[Any]:
    """Return the rows of an answer that is a list, as plain JSON."""
    rows: list[Any] = []
    return rows if await _in_slices(answer, rows.extend, name) else parse_rows(answer, name)


async def find_row(answer: Body, name: str, row_id: str) -> tuple[dict[str, Any] | None, int]:
    """Return the first row of a list that has this id, if there is one, and how many rows there are."""
    found: list[dict[str, Any]] = []
    count = 0

    def look(rows: list[Any]) -> None:
        nonlocal count
        count += len(rows)
        found.extend(row for row in rows if isinstance(row, dict) and row.get("_id") == row_id)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    if not await _in_slices(answer, look, name):
        found, count = [], 0
        look(parse_rows(answer, name))
    return (found[0] if found else None), count


async def data_of(answer: Body, into: type[Any] | None) -> Any:
    """Return the JSON of an answer, or the model or models that were asked for."""
    kind = json_kind(into)
    if into is None or kind is not None:
        everything: list[Any] = []
        if kind is not dict and await _in_slices(answer, everything.extend):
            return everything
        data = Secret(json_of(answer))
        if kind is dict:
            return object_of(data, answer.call, status_code=answer.status_code)
        if kind is list:
            return rows_of(data, (), answer.call, status_code=answer.status_code)
        return data.reveal()
    if get_origin(into) is list:
        reader = RowReader[Any](get_args(into)[0])
        if await _in_slices(answer, reader.add):
            if reader.bad:
                problem = f"{reader.problem()}; row {reader.bad[0].index}: {reader.bad[0].reason}"
                raise _list_error(answer, problem, reader)
            return reader.good
    return decode(Secret(json_of(answer)), into, answer)


def json_kind(into: Any) -> type[Any] | None:
    """Return dict or list if that is asked for as plain JSON: ``dict``, ``dict[str, Any]``, ``list[Any]``."""
    return dict if into in (dict, dict[str, Any]) else list if into in (list, list[Any]) else None


def json_of(answer: Body) -> Any:
    """Return the JSON of an answer, None for a 204."""
    if _holds_too_much(answer.body):
        raise _error(answer, f"the body holds more than {_MOST_VALUES:,} values, too many to read")
    with _gc.paused():
        return read_json(answer.status_code, Secret(answer.body), answer.call)


def parse_rows(answer: Body, name: str) -> list[Any]:
    """Return the rows of an answer that is a list, parsed in one go; ``name`` is that of its envelope."""
    return rows_of(Secret(json_of(answer)), (name, *_ENVELOPES), answer.call, status_code=answer.status_code)


def read_model(answer: Body, into: type[T]) -> T:
    """Make a model of an answer that is one object."""
    data = Secret(json_of(answer))
    return decode(Secret(object_of(data, answer.call, status_code=answer.status_code)), into, answer)


def decode(data: Secret[Any], into: type[T], answer: Body) -> T:
    """Make a model of an answer's data; the error says which call it came from."""
    try:
        return from_wire(data.reveal(), into)
    except ResponseDecodeError as error:
        problem, rows, bad_rows, count = str(error), error.rows, error.bad_rows, error.bad_row_count
    raise _error(answer, problem, rows, bad_rows, count)


def _list_error(answer: Body, problem: str, reader: RowReader[Any]) -> ResponseDecodeError:
    return _error(answer, problem, reader.good, reader.bad, reader.bad_count)


def _error(
    answer: Body,
    problem: str,
    rows: list[Any] | None = None,
    bad_rows: list[BadRow] | None = None,
    bad_row_count: int = 0,
) -> ResponseDecodeError:
    return ResponseDecodeError(
        f"{answer.call}: {problem}",
        call=answer.call,
        status_code=answer.status_code,
        rows=rows,
        bad_rows=bad_rows,
        bad_row_count=bad_row_count,
    )


async def _in_slices(answer: Body, add: Callable[[list[Any]], object], envelope: str = "") -> bool:
    """Hand a long list to ``add`` in slices. False if that cannot be done: discard what was added.

    With the name of an ``envelope``, it may be in one.
    """
    if not is_long(answer):
        return False
    await checkpoint()  # receiving and decompressing the body was a turn of its own
    try:
        body = unwrapped(answer.body, (envelope, *_ENVELOPES)) if envelope else answer.body
        await _by_turns(slices_of(body, DECODER), add)
    except NotSlicedError:
        return False
    return True


async def _by_turns(slices: Iterable[list[Any]], add: Callable[[list[Any]], object]) -> None:
    """Hand each slice to ``add``, and let other tasks run every few milliseconds.

    Of several lists that are read at once, one has its turn, and then everybody else on this event loop:
    without the lock, a hundred lists would have their turns in a row.
    """
    lock = _lock()
    remaining = iter(slices)
    more = True
    while more:
        async with lock:
            more = _take_turn(remaining, add)
            if more:
                await checkpoint()


def _lock() -> anyio.Lock:
    loop = current_token().native_token
    lock = _locks.get(loop)
    if lock is None:
        # First come, first served. Taking it when it is free is no reason to yield as well.
        lock = _locks[loop] = anyio.Lock(fast_acquire=True)
    return lock


def _take_turn(remaining: Iterator[list[Any]], add: Callable[[list[Any]], object]) -> bool:
    """Work for a while; False when all is done."""
    until = time.perf_counter() + _TURN
    with _gc.paused_and_spared():
        for rows in remaining:
            add(rows)
            if time.perf_counter() > until:
                return True
    return False
