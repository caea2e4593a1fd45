"""The table: what may come in, and the answer that it gets. Real sockets on both event loops.

Whatever the answer is, the handler only ever sees meetings as the account's list has them.
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

from .conftest import TOKEN, Scene, scene
from .posting import NONE, Answer

pytestmark = pytest.mark.anyio

Deed = Callable[[Scene], Awaitable[Answer | list[Answer]]]

HANDLED = (200, "handled")
REPEATED = (200, "repeated")
IGNORED = (200, "ignored")
UNAVAILABLE = (503, "unavailable")
FAILED = (503, "failed")
NO_ANSWER = (None, None)


def rejected(status: int) -> tuple[int, str]:
    """Return the brief answer to what is not even looked into."""
    return status, "rejected"


# ------------------------------------------------------------------ what can be delivered


def real(**changes: Any) -> Deed:
    """Deliver a meeting that was just booked, with other fields on the way if asked."""
    return lambda scene: scene.post({**scene.book(), **changes})


def body(content: Any, **oddities: Any) -> Deed:
    """Deliver these bytes, or this object as JSON."""
    return lambda scene: scene.post(content, **oddities)


def sent_as(**oddities: Any) -> Deed:
    """Deliver a meeting that was just booked in an odd way."""
    return lambda scene: scene.post(scene.book(), **oddities)


def with_fault(fault: faults.Fault, *, times: int = 1) -> Deed:
    """Deliver a meeting that was just booked while lemcal has a bad day."""

    async def deed(scene: Scene) -> Answer:
        scene.sandbox.inject(fault, times=times, path="/meetings")
        return await scene.post(scene.book())

    return deed


async def in_chunks(scene: Scene) -> Answer:
    """Deliver a meeting in many parts."""
    whole = json.dumps(scene.book()).encode()
    return await scene.post([whole[start : start + 50] for start in range(0, len(whole), 50)])


async def of_another_tenant(scene: Scene) -> Answer:
    """Deliver a real meeting to the wrong account."""
    return await scene.post(scene.book(account=1))


async def of_another_type(scene: Scene) -> Answer:
    """Deliver a real meeting as if it were of another type of the account."""
    booked = scene.book()
    other = scene.sandbox.meeting_types()[-1]["_id"]
    assert other != booked["meetingTypeId"]
    return await scene.post({**booked, "meetingTypeId": other})


async def twice(scene: Scene) -> list[Answer]:
    """Deliver the same again."""
    booked = scene.book()
    return [await scene.post(booked), await scene.post(booked)]


async def five_at_once(scene: Scene) -> list[Answer]:
    """Deliver the same five times at the same time."""
    return sorted(await scene.post_at_once([scene.book()] * 5), key=lambda answer: str(answer.outcome))


async def two_forged_one_real(scene: Scene) -> list[Answer]:
    """Deliver three at once, of which one is true."""
    return await scene.post_at_once([{"_id": "mee_forged1"}, scene.book(), {"_id": "mee_forged2"}])


async def listed_late(scene: Scene) -> Answer:
    """Deliver a meeting that the list does not have at the first look."""
    booked = scene.book()
    scene.sandbox.inject(faults.json([]), path="/meetings")
    return await scene.post(booked)


async def removed_again(scene: Scene) -> Answer:
    """Deliver a meeting that is gone already."""
    booked = scene.book()
    scene.sandbox.remove(booked["_id"])
    return await scene.post(booked)


async def canceled_again(scene: Scene) -> Answer:
    """Deliver a meeting that was canceled already."""
    booked = scene.book()
    scene.sandbox.cancel(booked["_id"])
    return await scene.post(booked)


async def with_an_odd_value(scene: Scene) -> Answer:
    """Deliver a meeting of which a field makes no sense in the list."""
    return await scene.post(scene.book(lead="nobody"))


async def beside_an_unreadable_one(scene: Scene) -> Answer:
    """Deliver a meeting while another row of the list makes no sense."""
    scene.book(lead="nobody")
    return await scene.post(scene.book())


async def in_an_envelope(scene: Scene) -> Answer:
    """Deliver a meeting while the list comes wrapped up."""
    booked = scene.book()
    scene.sandbox.inject(faults.json({"meetings": scene.sandbox.meetings()}), path="/meetings")
    return await scene.post(booked)


async def failed_then_repeated(scene: Scene) -> list[Answer]:
    """Deliver again what could not be verified."""
    booked = scene.book()
    scene.sandbox.inject(faults.status(500), path="/meetings")
    return [await scene.post(booked), await scene.post(booked)]


async def left_while_handled(scene: Scene) -> list[Answer]:
    """Deliver, hang up, and come again."""
    booked = scene.book()
    first = await scene.post(booked, leave=True)
    with anyio.fail_after(10):
        await scene.in_hand.wait()
    return [first, await scene.post(booked)]


async def left_while_sending(scene: Scene) -> list[Answer]:
    """Hang up in the middle of the body, and come again."""
    booked = scene.book()
    first = await scene.post(json.dumps(booked).encode()[:-10], length=1000, leave=True)
    return [first, await scene.post(booked)]


async def server_stops(scene: Scene) -> Answer:
    """Have the server stop while the handler is at work."""
    answers: list[Answer] = []

    async def deliver() -> None:
        answers.append(await scene.post(booked))

    booked = scene.book()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deliver)
        with anyio.fail_after(10):
            await scene.in_hand.wait()
        scene.server.stop()
    return answers[0]


async def sleep_a_little(_: Meeting) -> None:
    """Be a handler that takes its time."""
    await anyio.sleep(0.1)


async def hang(_: Meeting) -> None:
    """Be a handler that never returns."""
    await anyio.sleep_forever()


async def fail(meeting: Meeting) -> None:
    """Be a handler that raises."""
    raise ValueError(f"cannot keep {meeting.guest}")


# ------------------------------------------------------------------ the table


@attrs.frozen
class Row:
    """What comes, what the receiver is set up with, the answers, and how many meetings get handled."""

    what: str
    deed: Deed
    answers: tuple[int | None, str | None] | list[tuple[int | None, str | None]]
    handled: int
    options: dict[str, Any] = attrs.field(factory=dict)


ID = b'{"_id": "mee_1"}'
DEEP = b'{"_id": "mee_1", "a": ' + b"[" * 100 + b"]" * 100 + b"}"
ABYSS = b'{"_id": "mee_1", "a": ' + b"[" * 100_000
MANY_DIGITS = b'{"_id": "mee_1", "a": ' + b"1" * 5_000 + b"}"
QUICK = {"deadline": 0.3}

TABLE = [
    # the usual
    Row("a booking", real(), HANDLED, 1),
    Row("a booking in chunks", in_chunks, HANDLED, 1),
    Row("with an odd value", with_an_odd_value, HANDLED, 1),
    Row("beside an unreadable row", beside_an_unreadable_one, HANDLED, 1),
    Row("from an envelope", in_an_envelope, HANDLED, 1),
    Row("canceled meanwhile", canceled_again, HANDLED, 1),
    Row(
        "with a byte order mark",
        lambda s: s.post(b"\xef\xbb\xbf" + json.dumps(s.book()).encode()),
        HANDLED,
        1,
    ),
    # lies
    Row("a forged id", body({"_id": "mee_forged", "meetingTypeId": "met_1"}), IGNORED, 0),
    Row("a forged id alone", body({"_id": "mee_forged"}), IGNORED, 0),
    Row("two forged and one real at once", two_forged_one_real, [IGNORED, HANDLED, IGNORED], 1),
    Row("a real id, a forged type", real(meetingTypeId="met_forged"), HANDLED, 1),
    Row("a real id, another real type", of_another_type, HANDLED, 1),
    Row("a real id, a type of the wrong type", real(meetingTypeId=[5]), HANDLED, 1),
    Row("a real id, a type that breaks URLs", real(meetingTypeId="../me?x=1&y"), HANDLED, 1),
    Row(
        "a real id, lies about the rest",
        real(start="2000-01-01T00:00:00.000Z", attendees=[], lead=None),
        HANDLED,
        1,
    ),
    Row("another tenant's meeting", of_another_tenant, IGNORED, 0),
    Row("a meeting that is gone", removed_again, IGNORED, 0),
    Row("an id with a path in it", body({"_id": "../me"}), rejected(400), 0),
    Row("an id with a line break", body({"_id": "mee_1\nERROR all is lost"}), rejected(400), 0),
    # again
    Row("repeated", twice, [HANDLED, REPEATED], 1),
    Row("five times at once", five_at_once, [HANDLED, *[REPEATED] * 4], 1, {"handler": sleep_a_little}),
    Row("repeated after a failure", failed_then_repeated, [UNAVAILABLE, HANDLED], 1),
    Row("the sender hangs up while it is handled", left_while_handled, [NO_ANSWER, REPEATED], 1),
    Row("the sender hangs up in the body", left_while_sending, [NO_ANSWER, HANDLED], 1),
    # bodies
    Row("1.1 MB", body(b"x" * 1_100_000), rejected(413), 0),
    Row("1.1 MB of a real meeting", real(notes="x" * 1_100_000), rejected(413), 0),
    Row("1.1 MB in chunks", body([b"x" * 100_000] * 11), rejected(413), 0),
    Row("a little, said to be 1.1 MB", body(b"{}", length=1_100_000), rejected(413), 0),
    Row("a slow body", body([b'{"_id":', b'"mee_1"', b"}"], pause=0.2), rejected(408), 0, QUICK),
    Row("a body that never ends", body(ID, length=1000), rejected(408), 0, QUICK),
    Row("nested 100 deep", body(DEEP), rejected(400), 0),
    Row("nested 100,000 deep", body(ABYSS), rejected(400), 0),
    Row("a number of 5,000 digits", body(MANY_DIGITS), rejected(400), 0),
    Row("bad UTF-8", body(b'{"_id": "mee_\xff"}'), rejected(400), 0),
    Row("compressed", body(gzip.compress(ID)), rejected(400), 0),
    Row("UTF-16", body('{"_id": "mee_1"}'.encode("utf-16")), rejected(400), 0),
    Row("no body", body(b""), rejected(400), 0),
    Row("no JSON", body(b"_id=mee_1"), rejected(400), 0),
    Row("half of a JSON", body(ID[:-1]), rejected(400), 0),
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
    Row("a thousand fields", sent_as(query=f"?{'a=b&' * 1000}token={TOKEN}"), rejected(401), 0),
    Row("the token under another name", sent_as(query=f"?Token={TOKEN}"), rejected(401), 0),
    Row("the token, quoted", sent_as(token=TOKEN.replace("w", "%77")), HANDLED, 1),
    Row("the token beside other fields", sent_as(query=f"?source=lemcal&token={TOKEN}&x"), HANDLED, 1),
    Row("a wrong token and 1.1 MB", body(b"x" * 1_100_000, token="guessed"), rejected(401), 0),
    Row("GET", sent_as(method="GET"), rejected(405), 0),
    Row("PUT", sent_as(method="PUT"), rejected(405), 0),
    Row("DELETE", sent_as(method="DELETE"), rejected(405), 0),
    # lemcal has a bad day
    Row("the list lags behind", listed_late, HANDLED, 1),
    Row("401", with_fault(faults.status(401)), UNAVAILABLE, 0),
    Row("403 of the CDN", with_fault(faults.html_error(403)), UNAVAILABLE, 0),
    Row("404", with_fault(faults.status(404)), UNAVAILABLE, 0),
    Row("429", with_fault(faults.too_many_requests("0.5")), UNAVAILABLE, 0),
    Row("429 for a day", with_fault(faults.too_many_requests("86400")), UNAVAILABLE, 0),
    Row("500", with_fault(faults.status(500)), UNAVAILABLE, 0),
    Row("500 for a moment", with_fault(faults.status(500)), HANDLED, 1, {"client": {"retry": None}}),
    Row("a page instead of the list", with_fault(faults.html_200()), UNAVAILABLE, 0),
    Row("nothing instead of the list", with_fault(faults.empty_200()), UNAVAILABLE, 0),
    Row("an object instead of the list", with_fault(faults.json({"ok": True})), UNAVAILABLE, 0),
    Row("the connection breaks", with_fault(faults.reset_after_processing()), UNAVAILABLE, 0),
    Row("slower than the deadline", with_fault(faults.slow(2)), UNAVAILABLE, 0, QUICK),
    Row("down", real(), UNAVAILABLE, 0, {"client": {"base_url": "http://127.0.0.1:9/api"}}),
    # the handler has one
    Row("the handler raises", real(), FAILED, 1, {"handler": fail}),
    Row("the handler raises, twice", twice, [FAILED, FAILED], 2, {"handler": fail}),
    Row("the handler hangs", real(), FAILED, 1, {"handler": hang, "handler_timeout": 0.1}),
    Row("the server stops, the handler ends", server_stops, HANDLED, 1, {"handler": sleep_a_little}),
    Row("the server stops, the handler hangs", server_stops, UNAVAILABLE, 1, {"handler": hang, "grace": 1}),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what)
async def test_delivery(row: Row, sandbox: Sandbox) -> None:
    """It gets this answer, and the handler what the list says."""
    async with scene(sandbox, **row.options) as stage:
        given = await row.deed(stage)
        answers = given if isinstance(given, list) else [given]
        expected = row.answers if isinstance(row.answers, list) else [row.answers]
        assert expected == [answer.brief for answer in answers]
        assert row.handled == len(stage.handled)
        listed = from_wire(sandbox.meetings(), list[Meeting])
        for meeting in stage.handled:
            assert meeting in listed
    for answer in answers:
        assert ("retry-after" in answer.headers) == (answer.status_code == 503)
        assert ("POST" if answer.status_code == 405 else None) == answer.headers.get("allow")


def test_the_table_is_long() -> None:
    """Each of its lines is another thing."""
    assert len(TABLE) == len({row.what for row in TABLE}) > 60
    assert NONE.brief == NO_ANSWER
