"""The longer blocks of Python in the pages on services run as they stand, against the sandbox."""

import functools
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

import lemcal_async
from lemcal_async.sandbox import Sandbox

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs"
TOKEN = "wh-token-8Lp3-quiet"


def run(page: str, phrase: str) -> dict[str, Any]:
    """Run the block of a page that holds a phrase, and return its names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if phrase in block)
    names: dict[str, Any] = {"__name__": page}
    exec(compile(block, page, "exec"), names)  # the page's own code
    return names


@pytest.fixture(autouse=True)
def at_sandbox(lemcal_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sandbox stand for lemcal."""
    monkeypatch.setenv("LEMCAL_USER_ID", lemcal_sandbox.user_id)
    monkeypatch.setenv("LEMCAL_API_KEY", lemcal_sandbox.api_key)
    monkeypatch.setenv("WEBHOOK_TOKEN", TOKEN)
    monkeypatch.setenv("PUBLIC_URL", "https://service.example")
    client = functools.partial(lemcal_async.AsyncLemcal, base_url=lemcal_sandbox.base_url)
    monkeypatch.setattr(lemcal_async, "AsyncLemcal", client)


async def test_webhooks(lemcal_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    """The receiver prints what was booked."""
    names = run("webhooks.md", "app = WebhookReceiver(lemcal, token=os.environ")
    transport = httpx.ASGITransport(names["app"])
    async with names["lemcal"], httpx.AsyncClient(transport=transport, base_url="http://x") as sender:
        answer = await sender.post(f"/?token={TOKEN}", json=lemcal_sandbox.book())
    assert {"status": "handled"} == answer.json()
    assert "@" in capsys.readouterr().out


async def test_fastapi(lemcal_sandbox: Sandbox) -> None:
    """The service registers its hook, receives a booking, and shows a meeting."""
    app = run("fastapi.md", "app = FastAPI(")["app"]
    booked = lemcal_sandbox.book()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as browser,
    ):
        (hook,) = lemcal_sandbox.hooks()
        answer = await browser.post(hook["targetUrl"].removeprefix("https://service.example"), json=booked)
        assert {"status": "handled"} == answer.json()
        assert booked == (await browser.get(f"/meetings/{booked['_id']}")).json()


async def test_events(capsys: pytest.CaptureFixture[str]) -> None:
    """The listener prints the calls that failed."""
    names = run("observability.md", "def listener")
    try:
        async with lemcal_async.AsyncLemcal() as lemcal:
            with pytest.raises(lemcal_async.errors.NotFoundError):
                await lemcal.hooks.delete("hoo_1")
    finally:
        names["unsubscribe"]()
    assert capsys.readouterr().out.startswith("/hooks/{id} HookNotFoundError ")
