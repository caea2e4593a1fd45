"""A table of deliveries and their responses, over real sockets on both event loops.

Whatever the delivery contains, the handler only receives meetings from the account's list.
"""

import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import attrs
import pytest

from lemcal_async import Meeting, from_wire
from lemcal_async.sandbox import Sandbox, faults

from .conftest import TOKEN, ReceiverHarness, running_receiver
from .posting import NO_REPLY, Response

pytestmark = pytest.mark.anyio

Deliver = Callable[[ReceiverHarness], Awaitable[Response | list[Response]]]

HANDLED = (200, "handled")
REPEATED = (200, "repeated")
IGNORED = (200, "ignored")
UNAVAILABLE = (503, "unavailable")
FAILED = (503, "failed")
NO_RESPONSE = (None, None)


def rejected(status: int) -> tuple[int, str]:
    """Return the summary of a rejection."""
    return status, "rejected"


# ------------------------------------------------------------------ deliveries


def real(**changes: Any) -> Deliver:
    """Deliver a newly booked meeting, with ``changes`` to its fields."""
    return lambda harness: harness.post({**harness.book(), **changes})


def body(content: Any, **options: Any) -> Deliver:
    """Deliver bytes, or an object as JSON."""
    return lambda harness: harness.post(content, **options)


def sent_as(**options: Any) -> Deliver:
    """Deliver a newly booked meeting with an unusual request."""
    return lambda harness: harness.post(harness.book(), **options)


def with_fault(fault: faults.Fault, *, times: int = 1) -> Deliver:
    """Deliver a newly booked meeting while list calls fail."""

    async def deliver(harness: ReceiverHarness) -> Response:
        harness.sandbox.inject(fault, times=times, path="/meetings")
        return await harness.post(harness.book())

    return deliver


async def in_chunks(harness: ReceiverHarness) -> Response:
    """Deliver a meeting in chunks."""
    whole = json.dumps(harness.book()).encode()
    return await harness.post([whole[start : start + 50] for start in range(0, len(whole), 50)])


async def of_another_tenant(harness: ReceiverHarness) -> Response:
    """Deliver a real meeting to the wrong account."""
    return await harness.post(harness.book(account=1))


async def of_another_type(harness: ReceiverHarness) -> Response:
    """Deliver a real meeting with the id of another meeting type of the account."""
    booked = harness.book()
    other = harness.sandbox.meeting_types()[-1]["_id"]
    assert other != booked["meetingTypeId"]
    return await harness.post({**booked, "meetingTypeId": other})


async def twice(harness: ReceiverHarness) -> list[Response]:
    """Deliver a meeting twice."""
    booked = harness.book()
    return [await harness.post(booked), await harness.post(booked)]


async def five_concurrently(harness: ReceiverHarness) -> list[Response]:
    """Deliver a meeting five times concurrently."""
    return sorted(
        await harness.post_concurrently([harness.book()] * 5), key=lambda response: str(response.outcome)
    )


async def two_forged_one_real(harness: ReceiverHarness) -> list[Response]:
    """Deliver one real and two forged meetings concurrently."""
    return await harness.post_concurrently([{"_id": "mee_forged1"}, harness.book(), {"_id": "mee_forged2"}])


async def listed_late(harness: ReceiverHarness) -> Response:
    """Deliver a meeting that is missing from the first list."""
    booked = harness.book()
    harness.sandbox.inject(faults.json([]), path="/meetings")
    return await harness.post(booked)


async def already_removed(harness: ReceiverHarness) -> Response:
    """Deliver a meeting that was already removed."""
    booked = harness.book()
    harness.sandbox.remove(booked["_id"])
    return await harness.post(booked)


async def already_canceled(harness: ReceiverHarness) -> Response:
    """Deliver a meeting that was already canceled."""
    booked = harness.book()
    harness.sandbox.cancel(booked["_id"])
    return await harness.post(booked)


async def with_invalid_value(harness: ReceiverHarness) -> Response:
    """Deliver a meeting with an invalid field in the list."""
    return await harness.post(harness.book(lead="nobody"))


async def beside_invalid_row(harness: ReceiverHarness) -> Response:
    """Deliver a meeting while another row of the list is invalid."""
    harness.book(lead="nobody")
    return await harness.post(harness.book())


async def in_wrapped_list(harness: ReceiverHarness) -> Response:
    """Deliver a meeting while the list is wrapped in an object."""
    booked = harness.book()
    harness.sandbox.inject(faults.json({"meetings": harness.sandbox.meetings()}), path="/meetings")
    return await harness.post(booked)


async def unavailable_then_repeated(harness: ReceiverHarness) -> list[Response]:
    """Deliver a meeting that cannot be verified, then deliver it again."""
    booked = harness.book()
    harness.sandbox.inject(faults.status(500), path="/meetings")
    return [await harness.post(booked), await harness.post(booked)]


async def disconnected_during_handling(harness: ReceiverHarness) -> list[Response]:
    """Disconnect while the meeting is handled, then deliver it again."""
    booked = harness.book()
    first = await harness.post(booked, leave=True)
    with anyio.fail_after(10):
        await harness.handler_called.wait()
    return [first, await harness.post(booked)]


async def disconnected_in_body(harness: ReceiverHarness) -> list[Response]:
    """Disconnect in the middle of the body, then deliver the meeting again."""
    booked = harness.book()
    first = await harness.post(json.dumps(booked).encode()[:-10], length=1000, leave=True)
    return [first, await harness.post(booked)]


async def server_stops(harness: ReceiverHarness) -> Response:
    """Stop the server while the handler runs."""
    responses: list[Response] = []

    async def deliver() -> None:
        responses.append(await harness.post(booked))

    booked = harness.book()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deliver)
        with anyio.fail_after(10):
            await harness.handler_called.wait()
        harness.server.stop()
    return responses[0]


async def sleep_a_little(_: Meeting) -> None:
    """Handle a meeting slowly."""
    await anyio.sleep(0.1)


async def hang(_: Meeting) -> None:
    """Never return."""
    await anyio.sleep_forever()


async def fail(meeting: Meeting) -> None:
    """Raise an error that quotes the guest."""
    raise ValueError(f"cannot keep {meeting.guest}")


# ------------------------------------------------------------------ the table


@attrs.frozen
class Row:
    """A delivery, its expected responses and number of handled meetings, and the receiver's options."""

    name: str
    deliver: Deliver
    responses: tuple[int | None, str | None] | list[tuple[int | None, str | None]]
    handled: int
    options: dict[str, Any] = attrs.field(factory=dict)


ID = b'{"_id": "mee_1"}'
DEEP = b'{"_id": "mee_1", "a": ' + b"[" * 100 + b"]" * 100 + b"}"
VERY_DEEP = b'{"_id": "mee_1", "a": ' + b"[" * 100_000
MANY_DIGITS = b'{"_id": "mee_1", "a": ' + b"1" * 5_000 + b"}"
SHORT_DEADLINE = {"deadline": 0.3}

TABLE = [
    # valid deliveries
    Row("a booking", real(), HANDLED, 1),
    Row("a booking in chunks", in_chunks, HANDLED, 1),
    Row("with an invalid value", with_invalid_value, HANDLED, 1),
    Row("beside an invalid row", beside_invalid_row, HANDLED, 1),
    Row("from a wrapped list", in_wrapped_list, HANDLED, 1),
    Row("already canceled", already_canceled, HANDLED, 1),
    Row(
        "with a byte order mark",
        lambda harness: harness.post(b"\xef\xbb\xbf" + json.dumps(harness.book()).encode()),
        HANDLED,
        1,
    ),
    # forged deliveries
    Row("a forged id", body({"_id": "mee_forged", "meetingTypeId": "met_1"}), IGNORED, 0),
    Row("a forged id alone", body({"_id": "mee_forged"}), IGNORED, 0),
    Row("two forged and one real, concurrently", two_forged_one_real, [IGNORED, HANDLED, IGNORED], 1),
    Row("a real id, a forged type", real(meetingTypeId="met_forged"), HANDLED, 1),
    Row("a real id, another real type", of_another_type, HANDLED, 1),
    Row("a real id, a type of the wrong type", real(meetingTypeId=[5]), HANDLED, 1),
    Row("a real id, a type that breaks URLs", real(meetingTypeId="../me?x=1&y"), HANDLED, 1),
    Row(
        "a real id, other fields forged",
        real(start="2000-01-01T00:00:00.000Z", attendees=[], lead=None),
        HANDLED,
        1,
    ),
    Row("another tenant's meeting", of_another_tenant, IGNORED, 0),
    Row("a removed meeting", already_removed, IGNORED, 0),
    Row("an id with a path in it", body({"_id": "../me"}), rejected(400), 0),
    Row("an id with a line break", body({"_id": "mee_1\nERROR all is lost"}), rejected(400), 0),
    # repeated deliveries
    Row("repeated", twice, [HANDLED, REPEATED], 1),
    Row(
        "five times concurrently",
        five_concurrently,
        [HANDLED, *[REPEATED] * 4],
        1,
        {"handler": sleep_a_little},
    ),
    Row("repeated after a failure", unavailable_then_repeated, [UNAVAILABLE, HANDLED], 1),
    Row("the sender disconnects during handling", disconnected_during_handling, [NO_RESPONSE, REPEATED], 1),
    Row("the sender disconnects in the body", disconnected_in_body, [NO_RESPONSE, HANDLED], 1),
    # bodies
    Row("1.1 MB", body(b"x" * 1_100_000), rejected(413), 0),
    Row("1.1 MB of a real meeting", real(notes="x" * 1_100_000), rejected(413), 0),
    Row("1.1 MB in chunks", body([b"x" * 100_000] * 11), rejected(413), 0),
    Row("a small body with a length of 1.1 MB", body(b"{}", length=1_100_000), rejected(413), 0),
    Row("a slow body", body([b'{"_id":', b'"mee_1"', b"}"], pause=0.2), rejected(408), 0, SHORT_DEADLINE),
    Row("a body that never ends", body(ID, length=1000), rejected(408), 0, SHORT_DEADLINE),
    Row("nested 100 deep", body(DEEP), rejected(400), 0),
    Row("nested 100,000 deep", body(VERY_DEEP), rejected(400), 0),
    Row("a number of 5,000 digits", body(MANY_DIGITS), rejected(400), 0),
    Row("bad UTF-8", body(b'{"_id": "mee_\xff"}'), rejected(400), 0),
    Row("compressed", body(gzip.compress(ID)), rejected(400), 0),
    Row("UTF-16", body('{"_id": "mee_1"}'.encode("utf-16")), rejected(400), 0),
    Row("no body", body(b""), rejected(400), 0),
    Row("not JSON", body(b"_id=mee_1"), rejected(400), 0),
    Row("truncated JSON", body(ID[:-1]), rejected(400), 0),
    Row("a list", body(b"[%b]" % ID), rejected(400), 0),
    Row("null", body(b"null"), rejected(400), 0),
    Row("no id", body({"id": "mee_1"}), rejected(400), 0),
    Row("an empty id", body({"_id": ""}), rejected(400), 0),
    Row("an id that is null", body({"_id": None}), rejected(400), 0),
    Row("an id that is a number", body({"_id": 17}), rejected(400), 0),
    Row("an id that is an object", body({"_id": {"$ne": None}}), rejected(400), 0),
    Row("an id of a megabyte", body({"_id": "m" * 1_000_000}), rejected(400), 0),
    # tokens and methods
    Row("no token", sent_as(token=None), rejected(401), 0),
    Row("an empty token", sent_as(token=""), rejected(401), 0),
    Row("a wrong token", sent_as(token="guessed"), rejected(401), 0),
    Row("the beginning of the token", sent_as(token=TOKEN[:-1]), rejected(401), 0),
    Row("the token and more", sent_as(token=f"{TOKEN}x"), rejected(401), 0),
    Row("the token, bad UTF-8", sent_as(token=f"{TOKEN}%ff"), rejected(401), 0),
    Row("the token twice", sent_as(query=f"?token={TOKEN}&token={TOKEN}"), rejected(401), 0),
    Row("the token and another", sent_as(query=f"?token={TOKEN}&token=guessed"), rejected(401), 0),
    Row("a thousand query fields", sent_as(query=f"?{'a=b&' * 1000}token={TOKEN}"), rejected(401), 0),
    Row("the token under another name", sent_as(query=f"?Token={TOKEN}"), rejected(401), 0),
    Row("the token, quoted", sent_as(token=TOKEN.replace("w", "%77")), HANDLED, 1),
    Row("the token beside other fields", sent_as(query=f"?source=lemcal&token={TOKEN}&x"), HANDLED, 1),
    Row("a wrong token and 1.1 MB", body(b"x" * 1_100_000, token="guessed"), rejected(401), 0),
    Row("GET", sent_as(method="GET"), rejected(405), 0),
    Row("PUT", sent_as(method="PUT"), rejected(405), 0),
    Row("DELETE", sent_as(method="DELETE"), rejected(405), 0),
    # faults of lemcal
    Row("the list lags behind", listed_late, HANDLED, 1),
    Row("401", with_fault(faults.status(401)), UNAVAILABLE, 0),
    Row("403 of the CDN", with_fault(faults.html_error(403)), UNAVAILABLE, 0),
    Row("404", with_fault(faults.status(404)), UNAVAILABLE, 0),
    Row("429", with_fault(faults.too_many_requests("0.5")), UNAVAILABLE, 0),
    Row("429 for a day", with_fault(faults.too_many_requests("86400")), UNAVAILABLE, 0),
    Row("500", with_fault(faults.status(500)), UNAVAILABLE, 0),
    Row("500 for a moment", with_fault(faults.status(500)), HANDLED, 1, {"client": {"retry": None}}),
    Row("an HTML page instead of the list", with_fault(faults.html_200()), UNAVAILABLE, 0),
    Row("an empty body instead of the list", with_fault(faults.empty_200()), UNAVAILABLE, 0),
    Row("an object instead of the list", with_fault(faults.json({"ok": True})), UNAVAILABLE, 0),
    Row("the connection breaks", with_fault(faults.reset_after_processing()), UNAVAILABLE, 0),
    Row("slower than the deadline", with_fault(faults.slow(2)), UNAVAILABLE, 0, SHORT_DEADLINE),
    Row("down", real(), UNAVAILABLE, 0, {"client": {"base_url": "http://127.0.0.1:9/api"}}),
    # faults of the handler
    Row("the handler raises", real(), FAILED, 1, {"handler": fail}),
    Row("the handler raises, twice", twice, [FAILED, FAILED], 2, {"handler": fail}),
    Row("the handler hangs", real(), FAILED, 1, {"handler": hang, "handler_timeout": 0.1}),
    Row("the server stops, the handler ends", server_stops, HANDLED, 1, {"handler": sleep_a_little}),
    Row("the server stops, the handler hangs", server_stops, UNAVAILABLE, 1, {"handler": hang, "grace": 1}),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
async def test_delivery(row: Row, sandbox: Sandbox) -> None:
    """The response is as expected, and the handler only receives meetings from the list."""
    async with running_receiver(sandbox, **row.options) as harness:
        returned = await row.deliver(harness)
        responses = returned if isinstance(returned, list) else [returned]
        expected = row.responses if isinstance(row.responses, list) else [row.responses]
        assert expected == [response.summary for response in responses]
        assert row.handled == len(harness.handled)
        listed = from_wire(sandbox.meetings(), list[Meeting])
        for meeting in harness.handled:
            assert meeting in listed
    for response in responses:
        assert ("retry-after" in response.headers) == (response.status_code == 503)
        assert ("POST" if response.status_code == 405 else None) == response.headers.get("allow")


def test_table_has_no_duplicates() -> None:
    """Every row of the table has its own name."""
    assert len(TABLE) == len({row.name for row in TABLE}) > 60
    assert NO_REPLY.summary == NO_RESPONSE
