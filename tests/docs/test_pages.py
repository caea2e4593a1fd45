"""Every block of Python in the README and in the documentation runs, and does what its page says.

A page's test is named after it. Where a page defines functions, its test calls them.
"""

import logging
from typing import Any

import anyio
import httpx
import pytest

from lemcal_async import AsyncLemcal, errors, events
from lemcal_async.models import Hook
from lemcal_async.sandbox import Sandbox, faults

from .conftest import PAGES, ROOT, Read, blocks

pytestmark = pytest.mark.anyio

Output = pytest.CaptureFixture[str]


def test_every_page_has_a_test() -> None:
    """A new page with a block of Python needs a test here."""
    names = [page.stem.lower().replace("-", "_") for page in PAGES if blocks(page, "python")]
    assert [] == [name for name in names if f"test_{name}" not in globals()]
    assert "how_it_works" in names


def booked(sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return the meetings that are not cancelled."""
    return [meeting for meeting in sandbox.meetings() if not meeting.get("canceledAt")]


async def test_index(read: Read, service: Sandbox, capsys: Output) -> None:
    """The first program lists what is booked, the sandbox answers, and each call is there."""
    names = await read("docs/index.md")
    assert len(booked(service)) == len(capsys.readouterr().out.splitlines())
    await names["try_it"]()
    assert f"{names['user'].email} 12\n" == capsys.readouterr().out
    assert (12, 4) == (len(names["meetings"]), len(names["types"]))
    assert names["meetings"] == names["answer"].data
    assert isinstance(names["hook"], Hook)
    assert [] == service.hooks()


async def test_how_it_works(read: Read, service: Sandbox) -> None:
    """The layers serve a client of httpx's own, which meets a refusal and does not show it."""
    names = await read("docs/how-it-works.md")
    service.inject(faults.too_many_requests(retry_after="0.05"))
    async with names["client"] as client:
        answer = await client.get(f"{service.base_url}/me", auth=(service.user_id, service.api_key))
    assert 200 == answer.status_code


async def test_rate_limiter(read: Read, capsys: Output) -> None:
    """Limits are set where the page says, and the listener tells of long waits only."""
    names = await read("docs/rate-limiter.md")
    assert "queued=0" in capsys.readouterr().out
    for waited in (1.0, 7.25):
        names["listen"](events.Granted("a key", "bulk", waited))
    assert "a bulk call waited 7.2 s for the rate limit\n" == capsys.readouterr().out


async def test_many_accounts(read: Read, service: Sandbox, capsys: Output) -> None:
    """All accounts are counted, one that cannot be is told of, and a key is looked up anew."""
    names = await read("docs/many-accounts.md", vault={"acme": service.api_key})
    keys = {service.user_id: service.api_key, "usr_unknown": "wrong"}
    assert {service.user_id: 12} == await names["count_all"](names["lemcal"], keys)
    assert capsys.readouterr().out.startswith("usr_unknown GET /meetings: 401")
    with pytest.raises(errors.AuthenticationError):  # usr_acme is none of the sandbox's
        await names["account"].me()


async def test_testing(read: Read, lemcal_sandbox: Sandbox) -> None:
    """The tests that the page shows pass."""
    names = await read("docs/testing.md")
    await names["test_booking"](lemcal_sandbox)
    await names["test_bad_day"](lemcal_sandbox)
    await names["test_who_am_i"]()
    assert 13 == len(lemcal_sandbox.meetings())


async def test_deadlines(read: Read, service: Sandbox, capsys: Output) -> None:
    """Meetings come in time; a queue that is too long, and a server that refuses, are told apart."""
    names = await read("docs/deadlines.md")
    assert capsys.readouterr().out.startswith("20 may leave now; 0 wait")
    meetings_or_none, lemcal = names["meetings_or_none"], names["lemcal"]
    assert 12 == len(await meetings_or_none(lemcal))
    service.inject(faults.too_many_requests(retry_after="30"))
    assert None is await meetings_or_none(lemcal)
    assert capsys.readouterr().out.startswith("busy; again in ")
    async with service.client(limiter=names["Unlimited"]()) as other:
        service.inject(faults.too_many_requests(retry_after="86400"))
        assert None is await meetings_or_none(other)
    assert "refused by lemcal; again in 86400.0\n" == capsys.readouterr().out


async def test_migrating(read: Read, service: Sandbox, capsys: Output) -> None:
    """What the page puts in the place of old habits works."""
    meeting, type_ = service.meetings()[0], service.meeting_types()[0]
    names = await read(
        "docs/migrating.md",
        url="https://you.example/hook",
        meeting=(await service_meetings(service))[0],
        meeting_id=meeting["_id"],
        user_id=service.user_id,
        api_key=service.api_key,
        type_id=type_["_id"],
    )
    assert "@example." in names["guest"]
    assert meeting["_id"] == names["meeting"].id
    assert ["https://you.example/hook"] == [hook["targetUrl"] for hook in service.hooks()]
    assert capsys.readouterr().out.startswith("200 ")


async def service_meetings(service: Sandbox) -> list[Any]:
    """Return the account's meetings as models."""
    async with service.client() as lemcal:
        return await lemcal.meetings.list()
