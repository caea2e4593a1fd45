"""The sandbox as an ASGI app, without its own server, on any event loop."""

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message

from lemcal_async.sandbox import Sandbox, faults

pytestmark = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def get(app: ASGIApp, sandbox: Sandbox, path: str, backend: str) -> httpx.Response:
    """Send a request to an app without a socket."""

    async def send() -> httpx.Response:
        auth = (sandbox.user_id, sandbox.api_key)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://sandbox", auth=auth
        ) as client:
            return await client.get(path)

    return anyio.run(send, backend=backend)


def test_without_a_server(backend: str) -> None:
    """The API and the page work without a server."""
    sandbox = Sandbox(latency=(0.001, 0.002))
    assert sandbox.meetings() == get(sandbox, sandbox, "/api/lemcal/meetings", backend).json()
    assert 200 == get(sandbox, sandbox, "/", backend).status_code


@pytest.mark.parametrize(
    "fault", [faults.reset_before_processing(), faults.reset_after_processing(), faults.truncated()]
)
def test_faults_that_break_the_connection(backend: str, fault: faults.Fault) -> None:
    """Without a connection to break, the app raises ConnectionResetError."""
    sandbox = Sandbox()
    sandbox.inject(fault)
    with pytest.raises(ConnectionResetError):
        get(sandbox, sandbox, "/api/lemcal/me", backend)


def test_mounted_in_another_app(backend: str) -> None:
    """The sandbox works under another path, with its own 404 and 405 responses."""
    sandbox = Sandbox()
    app = Starlette(routes=[Mount("/lemcal", sandbox)])
    assert 200 == get(app, sandbox, "/lemcal/api/lemcal/me", backend).status_code
    missing = get(app, sandbox, "/lemcal/api/lemcal/nothing", backend)
    assert (404, "18") == (missing.status_code, missing.headers["x-ratelimit-remaining"])
    assert 405 == get(app, sandbox, "/lemcal/_sandbox/bookings", backend).status_code
    assert ["/me", "/nothing"] == [seen.path for seen in sandbox.requests]


def test_lifespan(backend: str) -> None:
    """The lifespan protocol is supported."""
    sent: list[str] = []
    messages: list[Message] = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]

    async def receive() -> Message:
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def run_lifespan() -> None:
        await Sandbox()({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    anyio.run(run_lifespan, backend=backend)
    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == sent
