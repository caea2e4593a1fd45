"""Decodes a response body to JSON or models, or raises an error that names the call.

Short bodies are decoded at once. A long list is decoded in slices, yielding to the event loop between them:
decoding 12 MB without a checkpoint would block the loop for a quarter of a second. ``_codec.py`` turns rows
into models; ``_responses.py`` diagnoses bad bodies.
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
_ARRAY_START = rb"(?:\xef\xbb\xbf)?" + _SPACE + rb"\[" + _SPACE + rb"(?=[^\] \t\r\n])"
_ENVELOPE = rb'(?:\xef\xbb\xbf)?[ \t\r\n]*\{[ \t\r\n]*"(?:%b)"[ \t\r\n]*:[ \t\r\n]*(?=\[)'
# From the end of one object to the first name in the next: few objects nested in rows begin the same way.
_BETWEEN_OBJECTS = rb"\}" + _SPACE + rb"," + _SPACE + rb"\{(?:" + _SPACE + rb'"[^"\\]*"' + _SPACE + rb":)?"
_BETWEEN_OTHER_VALUES = _SPACE + rb"," + _SPACE
_ENVELOPES = ("data",)  # in addition to the resource's name
_MAX_TRIES = 16  # candidate ends to try for one slice

# Limit on the values in text that is parsed at once: `[[],[],…` takes 24 times its size in memory.
_MAX_VALUES = 8_000_000
_ALWAYS_FEWER = 8_000_000  # bytes: a text this short cannot exceed the limit, at one byte per value

_LONG = 2 * SLICE  # bytes; anything shorter takes at most about 4 ms
_TURN = 0.004  # seconds of work before yielding to the event loop
_ROWS = 200  # parsed rows to turn into models before checking the clock

_locks: weakref.WeakKeyDictionary[Any, anyio.Lock] = weakref.WeakKeyDictionary()  # by event loop


class ResponseLike(Protocol):
    """The parts of a 2xx response that decoding needs."""

    @property
    def status_code(self) -> int:
        """The status code, a 2xx."""
        ...

    @property
    def body(self) -> bytes:
        """The decompressed body."""
        ...

    @property
    def call(self) -> CallInfo:
        """The call, named in errors."""
        ...


# --- Slices -----------------------------------------------------------------------------------------


class NotSlicedError(Exception):
    """The text cannot be sliced, or is not a JSON array; discard all its slices."""


def slices_of(body: bytes, decoder: JSONDecoder, size: int = SLICE) -> Iterator[list[Any]]:
    """Yield the items of a JSON array, in order, in lists; ``size`` is in bytes.

    Slices are parsed lazily; concatenated, they equal what ``decoder`` makes of the whole array. The text is
    cut where a row is likely to end; if the slice then parses, the row did end there. Any slice may raise
    NotSlicedError if no such cut is found.
    """
    match = re.match(_ARRAY_START, body)
    if match is None:
        raise NotSlicedError
    start = match.end()
    separator = _separator_of(body, start, decoder)
    while start < len(body):
        rows, start = _slice(body, start, separator, decoder, size)
        yield rows


def unwrapped(body: bytes, names: tuple[str, ...]) -> bytes:
    """Return the array inside an envelope, for slicing, or the body unchanged if there is no envelope.

    If the envelope contains anything else, slicing the result fails.
    """
    opening = re.match(_ENVELOPE % b"|".join(re.escape(name.encode()) for name in names), body)
    closing = re.compile(rb"\]" + _SPACE + rb"\}" + _SPACE + rb"\Z").search(body, max(0, len(body) - 100))
    if opening is None or closing is None:
        return body
    return body[opening.end() : closing.start() + 1]


def _separator_of(body: bytes, start: int, decoder: JSONDecoder) -> bytes:
    """Return the text between the first two rows; one serializer writes the same between all rows."""
    head = body[start : start + SLICE].decode("utf-8", "replace")
    try:
        first, end = decoder.raw_decode(head)
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    if isinstance(first, dict):
        match = re.compile(_BETWEEN_OBJECTS).match(body, start + len(head[: end - 1].encode()))
    else:
        match = re.compile(_BETWEEN_OTHER_VALUES).match(body, start + len(head[:end].encode()))
    if match is None:
        raise NotSlicedError
    return match[0]


def _slice(
    body: bytes, start: int, separator: bytes, decoder: JSONDecoder, size: int
) -> tuple[list[Any], int]:
    """Return the rows of one slice, and the position where the next slice begins."""
    end = start + size - 1
    for _ in range(_MAX_TRIES):
        end = body.find(separator, end + 1)
        if end < 0:
            return _array(body[start:], b"[", b"", decoder), len(body)
        comma = end + separator.index(b",")
        try:
            # A cut inside a row leaves a bracket open, so the slice does not parse.
            return _array(body[start:comma], b"[", b"]", decoder), comma + 1
        except NotSlicedError:
            continue
    raise NotSlicedError


def _array(items: bytes, left: bytes, right: bytes, decoder: JSONDecoder) -> list[Any]:
    if _has_too_many_values(items):
        raise NotSlicedError
    try:
        rows: list[Any] = decoder.decode((left + items + right).decode())
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    return rows


def _has_too_many_values(text: bytes) -> bool:
    return len(text) > _ALWAYS_FEWER and sum(map(text.count, (b",", b"{", b"["))) > _MAX_VALUES


# --- Whole responses --------------------------------------------------------------------------------


async def read_models(response: ResponseLike, name: str, into: type[T], *, skip_bad_rows: bool) -> list[T]:
    """Decode a response that is a list into models; bad rows are reported, not lost."""
    reader = RowReader(into)
    if not await _in_slices(response, reader.add, name):
        if reader.count:
            reader = RowReader(into)
        rows = parse_rows(response, name)
        if len(rows) <= _ROWS:
            reader.add(rows)  # takes less than a turn
        else:
            await _by_turns((rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS)), reader.add)
    if not reader.bad:
        return reader.good
    first = reader.bad[0]
    problem = f"{reader.problem()} (the first is row {first.index}: {first.reason})"
    if skip_bad_rows:
        logger.warning("%s: %s; skipped", response.call, problem)
        return reader.good
    advice = 'the good rows are in .rows; AsyncLemcal(on_bad_row="skip") skips bad rows'
    raise _list_error(response, f"{problem}; {advice}", reader)


def is_long(response: ResponseLike) -> bool:
    """Whether decoding the response must yield to the event loop."""
    return len(response.body) > _LONG


async def read_rows(response: ResponseLike, name: str) -> list[Any]:
    """Decode a response that is a list into plain JSON rows."""
    rows: list[Any] = []
    return rows if await _in_slices(response, rows.extend, name) else parse_rows(response, name)


async def find_row(response: ResponseLike, name: str, row_id: str) -> tuple[dict[str, Any] | None, int]:
    """Return the first row of a list with this id, or None, and the number of rows."""
    found: list[dict[str, Any]] = []
    count = 0

    def search(rows: list[Any]) -> None:
        nonlocal count
        count += len(rows)
        found.extend(row for row in rows if isinstance(row, dict) and row.get("_id") == row_id)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    if not await _in_slices(response, search, name):
        found, count = [], 0
        search(parse_rows(response, name))
    return (found[0] if found else None), count


async def data_of(response: ResponseLike, into: type[Any] | None) -> Any:
    """Decode a response into plain JSON, or into the model or models that ``into`` names."""
    kind = json_kind(into)
    if into is None or kind is not None:
        items: list[Any] = []
        if kind is not dict and await _in_slices(response, items.extend):
            return items
        data = Secret(json_of(response))
        if kind is dict:
            return object_of(data, response.call, status_code=response.status_code)
        if kind is list:
            return rows_of(data, (), response.call, status_code=response.status_code)
        return data.reveal()
    if get_origin(into) is list:
        reader = RowReader[Any](get_args(into)[0])
        if await _in_slices(response, reader.add):
            if reader.bad:
                problem = f"{reader.problem()}; row {reader.bad[0].index}: {reader.bad[0].reason}"
                raise _list_error(response, problem, reader)
            return reader.good
    return decode(Secret(json_of(response)), into, response)


def json_kind(into: Any) -> type[Any] | None:
    """Return dict or list if ``into`` means plain JSON (such as ``dict[str, Any]``), or else None."""
    return dict if into in (dict, dict[str, Any]) else list if into in (list, list[Any]) else None


def json_of(response: ResponseLike) -> Any:
    """Parse a response as JSON; None for a 204."""
    if _has_too_many_values(response.body):
        raise _error(response, f"the body contains more than {_MAX_VALUES:,} JSON values, too many to parse")
    with _gc.paused():
        return read_json(response.status_code, Secret(response.body), response.call)


def parse_rows(response: ResponseLike, name: str) -> list[Any]:
    """Parse a response that is a list, without slicing; ``name`` is the key of its envelope, if any."""
    data = Secret(json_of(response))
    return rows_of(data, (name, *_ENVELOPES), response.call, status_code=response.status_code)


def read_model(response: ResponseLike, into: type[T]) -> T:
    """Decode a response that is one object into a model."""
    data = Secret(json_of(response))
    return decode(Secret(object_of(data, response.call, status_code=response.status_code)), into, response)


def decode(data: Secret[Any], into: type[T], response: ResponseLike) -> T:
    """Decode a response's data into a model; the error names the call."""
    try:
        return from_wire(data.reveal(), into)
    except ResponseDecodeError as error:
        problem, rows, bad_rows, count = str(error), error.rows, error.bad_rows, error.bad_row_count
    raise _error(response, problem, rows, bad_rows, count)


def _list_error(response: ResponseLike, problem: str, reader: RowReader[Any]) -> ResponseDecodeError:
    return _error(response, problem, reader.good, reader.bad, reader.bad_count)


def _error(
    response: ResponseLike,
    problem: str,
    rows: list[Any] | None = None,
    bad_rows: list[BadRow] | None = None,
    bad_row_count: int = 0,
) -> ResponseDecodeError:
    return ResponseDecodeError(
        f"{response.call}: {problem}",
        call=response.call,
        status_code=response.status_code,
        rows=rows,
        bad_rows=bad_rows,
        bad_row_count=bad_row_count,
    )


async def _in_slices(response: ResponseLike, add: Callable[[list[Any]], object], envelope: str = "") -> bool:
    """Pass a long list to ``add`` in slices. If it returns False, slicing failed: discard what was added.

    If ``envelope`` is given, the list may be the value of that key in an object.
    """
    if not is_long(response):
        return False
    await checkpoint()  # receiving and decompressing the body already took a turn
    try:
        body = unwrapped(response.body, (envelope, *_ENVELOPES)) if envelope else response.body
        await _by_turns(slices_of(body, DECODER), add)
    except NotSlicedError:
        return False
    return True


async def _by_turns(slices: Iterable[list[Any]], add: Callable[[list[Any]], object]) -> None:
    """Pass each slice to ``add``, and let other tasks run every few milliseconds.

    When several lists are decoded concurrently, the lock lets one take a turn before all other tasks run;
    without the lock, a hundred lists would take a hundred turns in a row.
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
        # First in, first out. With fast_acquire, an uncontended acquire does not yield.
        lock = _locks[loop] = anyio.Lock(fast_acquire=True)
    return lock


def _take_turn(remaining: Iterator[list[Any]], add: Callable[[list[Any]], object]) -> bool:
    """Work for one turn. Returns False once all slices are done."""
    until = time.perf_counter() + _TURN
    with _gc.paused_and_promoting():
        for rows in remaining:
            add(rows)
            if time.perf_counter() > until:
                return True
    return False
