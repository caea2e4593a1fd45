"""A long JSON array, parsed a slice at a time, so that nobody has to stand still for all of it.

``json`` parses 12 MB in 80 ms and lets nothing else run meanwhile, in a thread neither. Here the text is
cut between rows where that is likely right, and a slice that parses proves that it was. What cannot
be cut is left to the caller to parse as a whole; so is saying what is wrong with it.

From the body of an answer to JSON, to models, or to an error that names the call.

Short bodies are read at once. Long lists are read in slices, between which the event loop gets its turn:
reading 12 MB would hold up everything else for a quarter of a second. Cancelled between two
slices, what was read is dropped. How text becomes rows is left to ``slices.py`` and ``responses.py``,
how rows become models to ``codec.py``.
"""

import logging
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from json import JSONDecoder
from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin

from anyio.lowlevel import checkpoint, current_token

from lemcal_async import _gc
from lemcal_async._codec import decode_rows, from_wire, problem_of
from lemcal_async._concurrency import FairSemaphore
from lemcal_async._responses import DECODER, object_of, read_json, rows_of
from lemcal_async._session import AccountSession, Answer
from lemcal_async.errors import BadRow, CallInfo, ResponseDecodeError
from lemcal_async.models import Hook, Meeting, MeetingType, User

SLICE = 128 * 1024  # bytes: some 2 ms, with the models made of it

_BEGINNING = rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*(?=\{)"
# From the end of one row to the first name in the next: other objects in the array's items seldom begin so.
_BETWEEN_ROWS = rb'\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^"\\]*"[ \t\r\n]*:'
_TRIES = 16  # ends of a slice that are tried, one after the other


class NotSlicedError(Exception):
    """The text is not cut, or turned out to be no array of objects; all that came of it is void."""


def slices_of(body: bytes, decoder: JSONDecoder, size: int = SLICE) -> Iterator[list[Any]]:
    """Yield the items of a JSON array of objects, in order, as lists; ``size`` is in bytes.

    Each slice is parsed when it is asked for. Together they are what ``decoder`` makes of the whole.
    Raises NotSlicedError at any slice, if that cannot be.
    """
    beginning = re.match(_BEGINNING, body)
    if beginning is None:
        raise NotSlicedError
    start = beginning.end()
    mark = _mark_of(body, start, decoder)
    while start < len(body):
        rows, start = _slice(body, start, mark, decoder, size)
        yield rows


def _mark_of(body: bytes, start: int, decoder: JSONDecoder) -> bytes:
    """Return what stands between the first two rows, and so between all that one program wrote."""
    head = body[start : start + SLICE].decode("utf-8", "replace")
    try:
        _, end = decoder.raw_decode(head)
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    end = start + len(head[: end - 1].encode())
    mark = re.compile(_BETWEEN_ROWS).match(body, end)
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
        try:
            # Cut inside of a row, this would leave a bracket open, and not parse.
            return _array(body[start : end + 1], b"[", b"]", decoder), end + mark.index(b",") + 1
        except NotSlicedError:
            continue
    raise NotSlicedError


def _array(items: bytes, left: bytes, right: bytes, decoder: JSONDecoder) -> list[Any]:
    try:
        rows: list[Any] = decoder.decode((left + items + right).decode())
    except (ValueError, RecursionError):
        raise NotSlicedError from None
    return rows


logger = logging.getLogger("lemcal_async")

T = TypeVar("T")
M = TypeVar("M", Hook, Meeting, MeetingType, User)

_LONG = 2 * SLICE  # bytes; what is no longer takes some 4 ms
_TURN = 0.004  # seconds of work after which the event loop gets its turn
_ROWS = 200  # of those that are there already, read as models between two looks at the clock

_gates: weakref.WeakKeyDictionary[Any, FairSemaphore] = weakref.WeakKeyDictionary()  # by event loop


class _Models(Generic[T]):
    """The models of a list, as far as it has been read, and the rows that cannot be."""

    def __init__(self, into: type[T]) -> None:
        self.good: list[T] = []
        self.bad: list[BadRow] = []
        self.count = 0
        self._into: Any = into

    def add(self, rows: list[Any]) -> None:
        good, bad = decode_rows(rows, self._into, first=self.count)
        self.good += good
        self.bad += bad
        self.count += len(rows)


class HasBody(Protocol):
    """The part of an answer that is parsed."""

    @property
    def status_code(self) -> int:
        """The status, a success."""
        ...

    @property
    def body(self) -> bytes:
        """The body, its encoding undone."""
        ...

    @property
    def call(self) -> CallInfo:
        """The call, for errors to name."""
        ...


async def read_models(exchange: AccountSession, answer: Answer, name: str, into: type[M]) -> list[M]:
    """Make models of an answer that is a list; unreadable rows are reported, not lost."""
    models = _Models(into)
    if not await _in_slices(answer, models.add):
        models = _Models(into)
        rows = parse_rows(answer, name)
        await _by_turns((rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS)), models.add)
    if not models.bad:
        return models.good
    first = models.bad[0]
    problem = f"{len(models.bad)} of {models.count} rows cannot be read"
    problem += f" (the first is row {first.index}: {first.reason})"
    if exchange.options.skip_bad_rows:
        logger.warning("%s: %s; they are left out", answer.call, problem)
        return models.good
    advice = "the others are in .rows, on_bad_row='skip' goes on without these"
    raise _refusal(answer, f"{problem}; {advice}", models.good, models.bad)


async def read_rows(answer: HasBody, name: str) -> list[Any]:
    """Return the rows of an answer that is a list, as plain JSON."""
    rows: list[Any] = []
    return rows if await _in_slices(answer, rows.extend) else parse_rows(answer, name)


async def find_row(answer: Answer, name: str, row_id: str) -> tuple[dict[str, Any] | None, int]:
    """Return the first row of a list that has this id, if there is one, and how many rows there are."""
    found: list[dict[str, Any]] = []
    count = 0

    def look(rows: list[Any]) -> None:
        nonlocal count
        count += len(rows)
        found.extend(row for row in rows if isinstance(row, dict) and row.get("_id") == row_id)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

    if not await _in_slices(answer, look):
        found, count = [], 0
        look(parse_rows(answer, name))
    return (found[0] if found else None), count


def json_of(answer: HasBody) -> Any:
    """Return the JSON of an answer, None for a 204."""
    with _gc.paused():
        return read_json(answer.status_code, answer.body, answer.call)


async def data_of(answer: Answer, into: type[Any] | None) -> Any:
    """Return the JSON of an answer, or the model or models that were asked for."""
    if into is None:
        everything: list[Any] = []
        return everything if await _in_slices(answer, everything.extend) else json_of(answer)
    if get_origin(into) is list:
        models = _Models[Any](get_args(into)[0])
        if await _in_slices(answer, models.add):
            if models.bad:
                raise _refusal(answer, problem_of(models.good, models.bad), models.good, models.bad)
            return models.good
    return decode(json_of(answer), into, answer)


def read_model(answer: Answer, into: type[M]) -> M:
    """Make a model of an answer that is one object."""
    return decode(object_of(json_of(answer), answer.call, status=answer.status_code), into, answer)


def decode(data: Any, into: type[T], answer: Answer) -> T:
    """Make a model of an answer's data; the error says which call it came from."""
    try:
        return from_wire(data, into)
    except ResponseDecodeError as error:
        problem, rows, bad_rows = str(error), error.rows, error.bad_rows
    del data  # that of a hook holds its token, and a traceback may show local variables
    raise _refusal(answer, problem, rows, bad_rows)


def _refusal(answer: Answer, problem: str, rows: list[Any], bad_rows: list[BadRow]) -> ResponseDecodeError:
    return ResponseDecodeError(
        f"{answer.call}: {problem}",
        call=answer.call,
        status_code=answer.status_code,
        rows=rows,
        bad_rows=bad_rows,
    )


async def _in_slices(answer: HasBody, add: Callable[[list[Any]], object]) -> bool:
    """Hand a long list to ``add`` in slices; False if it is none: then what was added is void."""
    if len(answer.body) <= _LONG:
        return False
    try:
        await _by_turns(slices_of(answer.body, DECODER), add)
    except NotSlicedError:
        return False
    return True


async def _by_turns(slices: Iterable[list[Any]], add: Callable[[list[Any]], object]) -> None:
    """Hand each slice to ``add``; let others have their turn meanwhile.

    Of several lists that are read at once, one has its turn and then the others of this event loop: or
    a hundred of them would have theirs in a row.
    """
    gate = _gate()
    remaining = iter(slices)
    more = True
    while more:
        await gate.acquire(None)
        try:
            more = _take_turn(remaining, add)
            if more:
                await checkpoint()
        finally:
            gate.release(None)


def _gate() -> FairSemaphore:
    loop = current_token().native_token
    gate = _gates.get(loop)
    if gate is None:
        gate = _gates[loop] = FairSemaphore(1)
    return gate


def _take_turn(remaining: Iterator[list[Any]], add: Callable[[list[Any]], object]) -> bool:
    """Work for a while; False when all is done."""
    until = time.perf_counter() + _TURN
    with _gc.paused_and_spared():
        for rows in remaining:
            add(rows)
            if time.perf_counter() > until:
                return True
    return False


def parse_rows(answer: HasBody, name: str) -> list[Any]:
    """Return the rows of an answer that is a list, parsed in one go; ``name`` is that of its envelope."""
    return rows_of(json_of(answer), (name, "data"), answer.call, status=answer.status_code)
