"""Every block of Python in the README runs, as it stands, against the sandbox."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import lemcal_async
from lemcal_async.sandbox import Sandbox

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(lemcal_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the block which holds a phrase, with the sandbox for the service."""
    monkeypatch.setenv("LEMCAL_USER_ID", lemcal_sandbox.user_id)
    monkeypatch.setenv("LEMCAL_API_KEY", lemcal_sandbox.api_key)
    at_sandbox = functools.partial(lemcal_async.AsyncLemcal, base_url=lemcal_sandbox.base_url)
    monkeypatch.setattr(lemcal_async, "AsyncLemcal", at_sandbox)

    def run(phrase: str) -> dict[str, Any]:
        (block,) = (block for block in BLOCKS if phrase in block)
        names: dict[str, Any] = {"__name__": "readme", "AsyncLemcal": at_sandbox}
        exec(compile(block, str(README), "exec"), names)  # the README's own code
        return names

    return run


def test_there_are_no_other_blocks() -> None:
    """A new block needs a test here."""
    assert 5 == len(BLOCKS)


def test_first_call(run: Run, lemcal_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    """The ten lines list the meetings that were not cancelled."""
    run("anyio.run(main)")
    booked = [meeting for meeting in lemcal_sandbox.meetings() if not meeting.get("canceledAt")]
    assert len(booked) == len(capsys.readouterr().out.splitlines())


def test_sandbox(run: Run) -> None:
    """The sandbox gives a client of its own."""
    assert isinstance(run("Sandbox().serve()")["lemcal"], lemcal_async.client.AsyncLemcal)


def test_fastapi(run: Run, lemcal_sandbox: Sandbox) -> None:
    """The service answers with the meeting asked for."""
    app = run("FastAPI(lifespan=lifespan)")["app"]
    meeting_id = lemcal_sandbox.meetings()[0]["_id"]

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://service") as browser,
        ):
            return await browser.get(f"/meetings/{meeting_id}")

    assert meeting_id == anyio.run(ask).json()["_id"]


@pytest.mark.anyio
async def test_many_accounts(run: Run, lemcal_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    """A sibling counts the meetings of its account."""
    count = run("async def count")["count"]
    async with lemcal_sandbox.client() as lemcal:
        await count(lemcal, lemcal_sandbox.user_id, lemcal_sandbox.api_key)
    assert f"{lemcal_sandbox.user_id} {len(lemcal_sandbox.meetings())}\n" == capsys.readouterr().out


@pytest.mark.anyio
async def test_fixture(run: Run, lemcal_sandbox: Sandbox) -> None:
    """The test of the README passes."""
    await run("test_booking")["test_booking"](lemcal_sandbox)
    assert 13 == len(lemcal_sandbox.meetings())
