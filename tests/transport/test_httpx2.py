"""httpx2's transports below the layers, and the layers in httpx2's client."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import httpx2
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import APIConnectionError, APITimeoutError
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.transport import RateLimitTransport, RetryTransport

from .conftest import MakeWire
from .loopback import Loopback

TARGET = "https://example.com/webhooks"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Serve a sandbox."""
    with Sandbox(limit=None).serve() as sandbox:
        yield sandbox


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


# ------------------------------------------------------------------ httpx2's transports


@pytest.mark.anyio
async def test_httpx2_transport(sandbox: Sandbox) -> None:
    """An httpx2 transport replaces the wire; the layers stay."""
    async with httpx2.AsyncHTTPTransport() as wire:
        lemcal = sandbox.client(transport=wire)
        assert sandbox.user_id == (await lemcal.me()).id
        hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert hook is not None
        await lemcal.hooks.delete(hook.id)
        sandbox.inject(faults.status(500))
        assert 12 == len(await lemcal.meetings.list())
        assert [200, 200, 204, 500, 200] == [request.status_code for request in sandbox.requests]


@pytest.mark.parametrize("fault", [faults.reset_after_processing(), faults.truncated()])
@pytest.mark.anyio
async def test_post_that_may_have_been_processed(sandbox: Sandbox, fault: faults.Fault) -> None:
    """The POST is not retried, and the error does not mention the transport's library."""
    async with httpx2.AsyncHTTPTransport() as wire:
        sandbox.inject(fault)
        with pytest.raises(APIConnectionError, match="POST /hooks: no response") as caught:
            await sandbox.client(transport=wire).hooks.create(TARGET, any_meeting_type=True)
    assert caught.value.maybe_processed
    assert (None, None) == (caught.value.__cause__, caught.value.__context__)
    assert 1 == len(sandbox.requests)


@pytest.mark.anyio
async def test_nothing_was_sent(server: Loopback) -> None:
    """httpcore2's events prove it, so a POST is retried."""
    async with httpx2.AsyncHTTPTransport() as wire:
        lemcal = AsyncLemcal(
            "usr_x",
            "secret",
            base_url="http://127.0.0.1:9",
            transport=wire,
            limiter=LocalRateLimiter(),
            retry=RetryPolicy(attempts=2, max_wait=0.01),
        )
        with pytest.raises(APIConnectionError) as caught:
            await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert (2, False) == (caught.value.attempts, caught.value.maybe_processed)
        assert 20 == lemcal.rate_limit.remaining


@pytest.mark.anyio
async def test_timeouts_of_httpx2(server: Loopback) -> None:
    """They have the same names as httpx's."""
    async with httpx2.AsyncHTTPTransport() as wire:
        lemcal = AsyncLemcal(
            "usr_x",
            "secret",
            base_url=server.url,
            transport=wire,
            limiter=Unlimited(),
            retry=RetryPolicy(attempts=1),
            timeout=0.05,
        )
        with pytest.raises(APITimeoutError, match=r"0\.05 s"):
            await lemcal.request("GET", "/hold")


# ------------------------------------------------------------------ the layers in httpx2's client


def layers(make_wire: MakeWire) -> RetryTransport:
    """Return all layers."""
    return RetryTransport(RateLimitTransport(make_wire(), LocalRateLimiter()), RetryPolicy(max_wait=1))


async def parts() -> AsyncIterator[bytes]:
    """Yield a body that can be read only once."""
    yield b'{"targetUrl": "https://example.com/parts",'
    yield b'"anyMeetingType": true}'


@pytest.mark.anyio
async def test_httpx2_client(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """An httpx2 client receives httpx2 responses through all layers."""
    auth = (sandbox.user_id, sandbox.api_key)
    wire: Any = layers(make_wire)
    async with httpx2.AsyncClient(transport=wire, base_url=sandbox.base_url, auth=auth) as client:
        sandbox.inject(faults.too_many_requests("0.01"))
        response = await client.get("/me")
        assert (200, sandbox.user_id) == (response.status_code, response.json()["_id"])
        assert response.elapsed.total_seconds() > 0
        created = await client.post("/hooks", content=parts())
        assert "https://example.com/parts" == created.json()["targetUrl"]
    assert [429, 200, 200] == [request.status_code for request in sandbox.requests]


@pytest.mark.anyio
async def test_wire_in_httpx2_client(make_wire: MakeWire, server: Loopback) -> None:
    """Streaming works, and errors are httpx2's."""
    wire: Any = make_wire(max_connections=1)
    async with httpx2.AsyncClient(transport=wire, timeout=5) as client:
        for _ in range(2):
            async with client.stream("GET", f"{server.url}/gzip/9000") as response:
                assert 9000 == sum([len(part) async for part in response.aiter_bytes()])
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get(f"{server.url}/cut")
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(f"{server.url}/hold", timeout=0.05)
        with pytest.raises(httpx2.ConnectError):
            await client.get("http://127.0.0.1:9")
        with anyio.fail_after(5):
            assert 200 == (await client.get(server.url)).status_code
    assert [1, 1] == server.connections[:2]


ALIASED = """
import httpx2
httpx2.alias_httpx()
import anyio
import httpx
assert httpx.AsyncClient is httpx2.AsyncClient
from lemcal_async import AsyncLemcal
from lemcal_async.sandbox import Sandbox, faults

async def main():
    with Sandbox().serve() as sandbox:
        for options in ({}, {"transport": httpx.AsyncHTTPTransport()}):
            async with sandbox.client(**options) as lemcal:
                sandbox.inject(faults.status(500))
                assert sandbox.user_id == (await lemcal.me()).id
                assert 12 == len(await lemcal.meetings.list())

for backend in ("asyncio", "trio"):
    anyio.run(main, backend=backend)
print("done")
"""


def test_everything_on_httpx2() -> None:
    """After ``httpx2.alias_httpx()``, httpx is not imported at all."""
    done = subprocess.run([sys.executable, "-c", ALIASED], capture_output=True, check=False, text=True)
    assert ("done\n", "") == (done.stdout, done.stderr)
