"""Long lists: other tasks run while one is decoded, and the result is the same as for a short list."""

import gc
import json
import logging
import pickle
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from lemcal_async import AsyncLemcal, Meeting, User, _decoding, from_wire
from lemcal_async.errors import DeadlineExceededError, MeetingNotFoundError, ResponseDecodeError
from lemcal_async.sandbox._demo import make_account

from .conftest import AT_ONCE, Wire, check_plain, responding

pytestmark = pytest.mark.anyio

ROWS = make_account(1, 0, 2_500).meetings
BODY = json.dumps(ROWS).encode()  # 1.9 MB


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each turn one slice long, so that the number of turns does not depend on the machine."""
    monkeypatch.setattr(_decoding, "_TURN", 0.0)


@asynccontextmanager
async def other_task() -> AsyncIterator[list[int]]:
    """Run another task in the background; yield a list that grows with each of its turns."""
    turns: list[int] = []

    async def take_turns() -> None:
        while True:
            turns.append(len(turns))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        yield turns
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["array", "envelope"])
async def test_other_tasks_run(how: str) -> None:
    """Other tasks run many times while a list is decoded, and the result is correct."""
    wire = responding(content=BODY if how == "array" else b'{"data": %b}' % BODY)
    async with other_task() as turns:
        found = await wire.client().meetings.list()
        assert len(turns) >= 10
    assert from_wire(ROWS, list[Meeting]) == found


async def test_get_from_a_long_list() -> None:
    """A meeting is found anywhere in the list; if it is missing, the error states the length of the list."""
    lemcal = responding(content=BODY).client()
    async with other_task() as turns:
        for row in (ROWS[0], ROWS[1234], ROWS[-1]):
            assert from_wire(row, Meeting) == await lemcal.meetings.get(row["_id"])
        with pytest.raises(MeetingNotFoundError, match="not among the 2500 meetings"):
            await lemcal.meetings.get("mee_none")
        assert len(turns) >= 10


async def test_the_escape_hatch() -> None:
    """``request`` decodes long lists in slices, into JSON or models."""
    lemcal = responding(content=BODY).client()
    async with other_task() as turns:
        assert ROWS == (await lemcal.request("GET", "/meetings")).data
        assert (
            from_wire(ROWS, list[Meeting])
            == (await lemcal.request("GET", "/meetings", into=list[Meeting])).data
        )
        assert len(turns) >= 10


def damaged() -> tuple[list[Any], list[int]]:
    """Return rows, some of them bad, and the indexes of the bad rows."""
    bad = [0, 7, 999, 2_000, 2_499]
    return [row | {"_id": 7} if at in bad else row for at, row in enumerate(ROWS)], bad


async def test_bad_rows_keep_their_index(caplog: pytest.LogCaptureFixture) -> None:
    """A bad row is reported with its index in the whole list, and the other rows are read."""
    rows, bad = damaged()
    wire = responding(json=rows)
    good = [from_wire(row, Meeting) for at, row in enumerate(rows) if at not in bad]
    reason = "_id: expected a string, got int"
    with pytest.raises(ResponseDecodeError) as caught:
        await wire.client().meetings.list()
    assert f"GET /meetings: 5 of 2500 rows cannot be read (the first is row 0: {reason})" in str(caught.value)
    assert [(at, rows[at], reason) for at in bad] == [
        (row.index, row.row, row.reason) for row in caught.value.bad_rows
    ]
    assert good == caught.value.rows
    assert None is caught.value.__context__
    with pytest.raises(
        ResponseDecodeError, match=f": 5 of 2500 rows cannot be read; row 0: {reason}$"
    ) as caught:
        await wire.client().request("GET", "/meetings", into=list[Meeting])
    assert (good, bad) == (caught.value.rows, [row.index for row in caught.value.bad_rows])
    with caplog.at_level(logging.WARNING, "lemcal_async"):
        assert good == await wire.client(on_bad_row="skip").meetings.list()
    assert "5 of 2500 rows cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (BODY[:-1], f"the body is JSON that is cut off after {len(BODY) - 1} bytes."),
        (BODY[:-1] + b', {"_id": NaN}]', "contains a number that JSON does not allow"),
        (BODY + b"]", f"the body is not JSON: Extra data, at character {len(BODY)}."),
        (BODY.replace(b"mee_", b"mee\xff", 2000), "not UTF-8"),
        (b'{"rows": %b}' % BODY, "an object, where a list was expected"),
    ],
)
async def test_broken_body(body: bytes, problem: str) -> None:
    """The error is the same as for a short list, and has no cause or context."""
    lemcal = responding(content=body).client()
    for call in (lemcal.meetings.list, lambda: lemcal.meetings.get("mee_1")):
        with pytest.raises(ResponseDecodeError) as caught:
            await call()
        assert problem in str(caught.value)
        check_plain(caught.value)


async def test_wrong_model() -> None:
    """A list in place of one model, and rows of another model, are refused."""
    lemcal = responding(content=BODY).client()
    with pytest.raises(ResponseDecodeError, match="expected an object, got list"):
        await lemcal.request("GET", "/me", into=User)
    lemcal = responding(json=[{"_id": 7, "filler": "x" * 200}] * 2_500).client()
    with pytest.raises(ResponseDecodeError, match="2500 of 2500 rows cannot be read; row 0: _id") as caught:
        await lemcal.request("GET", "/me", into=list[User])
    assert [] == caught.value.rows


async def test_cancellation_between_slices() -> None:
    """A call canceled between two slices restores the collector, and the next call reads the whole list."""
    was_enabled = gc.isenabled()
    lemcal = responding(content=BODY).client()
    for turns_before in range(6):
        async with anyio.create_task_group() as tasks:
            finished: list[int] = []

            async def read(finished: list[int] = finished) -> None:
                finished.append(len(await lemcal.meetings.list()))

            tasks.start_soon(read)
            for _ in range(turns_before):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        assert [] == finished
        assert was_enabled is gc.isenabled()
    assert 2_500 == len(await lemcal.meetings.list())


@pytest.mark.parametrize("how", ["array", "envelope"])
@pytest.mark.parametrize("what", ["list", "rows", "get", "request", "models"])
async def test_decoding_counts_toward_the_deadline(
    how: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that takes too long to decode exceeds the deadline; the next call decodes the whole list."""
    lemcal = responding(content=BODY if how == "array" else b'{"data": %b}' % BODY).client()
    calls: dict[str, Callable[[AsyncLemcal], Awaitable[Any]]] = {
        "list": lambda lemcal: lemcal.meetings.list(),
        "rows": lambda lemcal: lemcal.meetings.rows(),
        "get": lambda lemcal: lemcal.meetings.get(ROWS[-1]["_id"]),
        "request": lambda lemcal: lemcal.request("GET", "/meetings"),
        "models": lambda lemcal: lemcal.request(
            "GET", "/meetings", into=list[Meeting] if how == "array" else None
        ),
    }
    with monkeypatch.context() as patch:
        # Each turn takes as long as the whole deadline, however little is decoded in it.
        patch.setattr(_decoding, "_take_turn", slowly(_decoding._take_turn))
        patch.setattr(_decoding, "json_of", slowly(_decoding.json_of))
        with pytest.raises(DeadlineExceededError, match=r"within the deadline of 0\.1 s") as caught:
            await calls[what](lemcal.with_options(deadline=0.1))
    assert ("GET", "/meetings", 1) == (caught.value.method, caught.value.route, caught.value.attempts)
    check_plain(caught.value)
    assert await calls[what](lemcal.with_options(deadline=60))


def slowly(function: Any) -> Any:
    """Make a function take 0.11 s longer, blocking the event loop."""

    def slow(*arguments: Any) -> Any:
        until = time.monotonic() + 0.11
        while time.monotonic() < until:
            pass
        return function(*arguments)

    return slow


async def test_several_lists_at_once() -> None:
    """Several lists take turns, and restore the collector."""
    was_enabled = gc.isenabled()
    wire = responding(content=BODY)
    found: list[list[Meeting]] = []

    async def read() -> None:
        found.append(await wire.client().meetings.list())
        assert was_enabled is gc.isenabled()

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(read)
    assert [from_wire(ROWS, list[Meeting])] * 3 == found


@pytest.mark.storm
async def test_another_task_runs_between_many_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lists are decoded concurrently, another task waits for at most two turns."""
    happened: list[str] = []
    take_turn = _decoding._take_turn

    def recorded(*arguments: Any) -> bool:
        happened.append("turn")
        return take_turn(*arguments)

    monkeypatch.setattr(_decoding, "_take_turn", recorded)
    lemcal = responding(content=BODY).client()

    async def something_else() -> None:
        while True:
            happened.append("else")
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(something_else)
        async with anyio.create_task_group() as readers:
            for _ in range(8):
                readers.start_soon(lemcal.meetings.list)
        tasks.cancel_scope.cancel()
    assert 8 * 10 <= happened.count("turn")
    assert max(len(turns) for turns in "".join(each[0] for each in happened).split("e")) <= 3


@pytest.mark.parametrize("row", ["0", "{}", '{"a":[]}'])
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
async def test_many_bad_rows(row: str, on_bad_row: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first thousand are kept and the rest only counted; they are never all in memory at once."""
    count = 600_000 // len(row)
    body = f"[{','.join([row] * count)}]".encode()
    lemcal = responding(content=body).client(on_bad_row=on_bad_row)
    gc.collect()
    tracemalloc.start()
    try:
        if on_bad_row == "skip":
            assert [] == await lemcal.meetings.list()
            assert f"{count} of {count} rows cannot be read" in caplog.text
        else:
            with pytest.raises(
                ResponseDecodeError, match=f"{count} of {count} rows cannot be read"
            ) as caught:
                await lemcal.meetings.list()
            assert (count, 1000, 999) == (
                caught.value.bad_row_count,
                len(caught.value.bad_rows),
                caught.value.bad_rows[-1].index,
            )
            assert len(pickle.dumps(caught.value)) < 200_000
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # 600 KB of `{}` once took 60 MB
    finally:
        tracemalloc.stop()


async def test_body_with_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that cannot be sliced and has too many values is refused before it exhausts memory."""
    monkeypatch.setattr(_decoding, "_MAX_VALUES", 100_000)
    monkeypatch.setattr(_decoding, "_ALWAYS_FEWER", 100_000)
    body = f'{{"data": [{",".join(["{}"] * 200_000)}], "page": 1}}'.encode()
    lemcal = responding(content=body).client()
    for call in (lemcal.meetings.list, lemcal.meetings.rows, lambda: lemcal.request("GET", "/x")):
        with pytest.raises(ResponseDecodeError, match="contains more than 100,000 JSON values") as caught:
            await call()
        check_plain(caught.value)


@pytest.mark.parametrize("how", ["array", "envelope"])
async def test_raw_rows(how: str) -> None:
    """Rows are returned unchanged, whether or not they are valid."""
    rows, _ = damaged()
    wire = responding(json=rows if how == "array" else {"data": rows})
    async with other_task() as turns:
        assert rows == await wire.client().meetings.rows("met_1")
        assert len(turns) >= 10
    assert "meetingTypeId=met_1" == wire.requests[0].url.query.decode()


async def test_unparsed_rows() -> None:
    """The synchronization gets the bytes and their call, and parses the rows only if necessary."""
    responses = [httpx.Response(500), httpx.Response(200, content=BODY), httpx.Response(200, content=b"{}")]
    lemcal = Wire(lambda _: responses.pop(0)).client(retry=AT_ONCE)
    found = await lemcal.meetings._fetch_rows()
    assert (200, BODY, 2) == (found.status_code, found.body, found.call.attempts)
    assert ROWS == found.rows()
    assert "mee_" not in repr(found)
    no_list = [httpx.Response(500), httpx.Response(200, content=b"{}")]
    responses[:] = no_list
    unparsed = await lemcal.meetings._fetch_rows()
    responses[:] = no_list
    with pytest.raises(ResponseDecodeError) as later:
        unparsed.rows()
    with pytest.raises(ResponseDecodeError) as at_once:
        await lemcal.meetings.rows()
    for caught in (later, at_once):
        assert "an object, where a list was expected" in str(caught.value)
        assert ("GET", "/meetings", 2) == (caught.value.method, caught.value.route, caught.value.attempts)
