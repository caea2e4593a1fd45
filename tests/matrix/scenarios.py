"""The scenarios for every transport: a call or two to the sandbox, and the expected outcome."""

import contextlib
import time
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    DeadlineExceededError,
    HookNotFoundError,
    LemcalError,
    RateLimitError,
)
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox, faults

from .transports import Transport

QUICK = RetryPolicy(max_wait=5)
ONCE = RetryPolicy(attempts=1)
TARGET = "https://example.com/webhooks"


class Service(Sandbox):
    """A sandbox that compresses its responses."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await GZipMiddleware(super().__call__, minimum_size=1)(scope, receive, send)


@attrs.frozen
class Lab:
    """A sandbox, and clients for it on the transport under test."""

    sandbox: Sandbox
    wire: Any

    def client(self, account: int = 0, **options: Any) -> AsyncLemcal:
        """Return a client, by default without a rate limit."""
        options = {"limiter": Unlimited(), "retry": QUICK, "base_url": _base_url(self.sandbox), **options}
        return self.sandbox.client(account, transport=self.wire, **options)

    def seen(self, method: str, path: str) -> int:
        """Count the requests received with this method and path."""
        return sum((method, path) == (seen.method, seen.path) for seen in self.sandbox.requests)


@contextlib.asynccontextmanager
async def lab(transport: Transport, **options: Any) -> AsyncIterator[Lab]:
    """Start a sandbox, and open the transport."""
    sandbox = Service(accounts=2, **{"limit": None, **options})
    async with contextlib.AsyncExitStack() as stack:
        if transport.has_network:
            stack.enter_context(sandbox.serve())
        yield Lab(sandbox, await stack.enter_async_context(transport.open(sandbox)))


def _base_url(sandbox: Sandbox) -> str:
    try:
        return sandbox.base_url
    except RuntimeError:
        return "http://localhost/api/lemcal"


Run = Callable[[Transport], Awaitable[None]]
SCENARIOS: dict[str, Run] = {}
NETWORK: set[str] = set()  # the scenarios that need a network


def scenario(name: str, *, network: bool = False) -> Callable[[Run], Run]:
    """Register a scenario under this name."""

    def register(run: Run) -> Run:
        SCENARIOS[name] = run
        if network:
            NETWORK.add(name)
        return run

    return register


@scenario("models, compressed responses")
async def reads(transport: Transport) -> None:
    """Compressed bodies are decompressed exactly once."""
    async with lab(transport, meetings=50) as here:
        assert here.sandbox.user_id == (await here.client().me()).id
        found = await here.client().meetings.list()
        assert [row["_id"] for row in here.sandbox.meetings()] == [meeting.id for meeting in found]


@scenario("request bodies, empty responses")
async def writes(transport: Transport) -> None:
    """A request body arrives unchanged, and a 204 has no body."""
    async with lab(transport) as here:
        hook = await here.client().hooks.create(f"{TARGET}?é=ü", any_meeting_type=True)
        assert hook is not None
        assert [f"{TARGET}?é=ü"] == [each["targetUrl"] for each in here.sandbox.hooks()]
        await here.client().hooks.delete(hook.id)
        assert [] == here.sandbox.hooks()


@scenario("service errors")
async def errors(transport: Transport) -> None:
    """Errors have the right class and the server's message."""
    async with lab(transport) as here:
        with pytest.raises(HookNotFoundError, match="404"):
            await here.client().hooks.delete("hoo_unknown")
        here.sandbox.inject(faults.status(402, "upgrade"))
        with pytest.raises(APIStatusError, match="upgrade"):
            await here.client().me()


@scenario("redirects are errors")
async def redirects(transport: Transport) -> None:
    """No second request is sent."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.redirect("/api/lemcal/meetings"))
        with pytest.raises(APIStatusError, match="302"):
            await here.client().me()
        assert 1 == len(here.sandbox.requests)


@scenario("cookies are not stored")
async def cookies(transport: Transport) -> None:
    """A retry sends no cookie."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.status(503, headers={"Set-Cookie": "a=b; Path=/", "Retry-After": "0"}))
        await here.client().me()
        assert "cookie" not in here.sandbox.requests[-1].headers


@scenario("accounts are isolated")
async def accounts(transport: Transport) -> None:
    """Each account receives its own data over the shared transport."""
    async with lab(transport) as here:
        for _ in range(2):
            for number, account in enumerate(here.sandbox.accounts):
                assert account.user_id == (await here.client(number).me()).id
                assert {account.user_id} == {
                    each.user_id for each in await here.client(number).meetings.list()
                }


async def _within_the_limit(transport: Transport, window: str) -> None:
    async with lab(transport, limit=8, period=0.6, window=window) as here:
        limiter = LocalRateLimiter(limit=8, period=0.6)
        await here.client(limiter=limiter).me()  # connects
        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(here.client(limiter=limiter).me)
        assert [] == [seen for seen in here.sandbox.requests if seen.status_code == 429]
        assert 31 == len(here.sandbox.requests)


@scenario("no 429, fixed window")
async def fixed_window(transport: Transport) -> None:
    """Calls that fill four windows."""
    await _within_the_limit(transport, "fixed")


@scenario("no 429, sliding window")
async def sliding_window(transport: Transport) -> None:
    """The same calls against a sliding window."""
    await _within_the_limit(transport, "sliding")


@scenario("429 is retried")
async def refused(transport: Transport) -> None:
    """Without retries, it raises RateLimitError."""
    async with lab(transport) as here:
        limiter = LocalRateLimiter(limit=8, period=0.6)
        here.sandbox.inject(faults.too_many_requests("0.2"))
        began = time.monotonic()
        await here.client(limiter=limiter).me()
        assert time.monotonic() - began >= 0.2
        here.sandbox.inject(faults.too_many_requests("0.2"))
        with pytest.raises(RateLimitError):
            await here.client(limiter=limiter, retry=ONCE).me()


@scenario("every request is counted")
async def counted(transport: Transport) -> None:
    """The transport sends no request that the limiter does not know about."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.status(503, headers={"Retry-After": "0"}))
        with pytest.raises(LemcalError):
            await here.client(retry=ONCE).me()
        assert 1 == len(here.sandbox.requests)


@scenario("GET is retried after a 500")
async def repeated(transport: Transport) -> None:
    """The GET is sent exactly twice."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.status(500))
        await here.client().me()
        assert 2 == len(here.sandbox.requests)


@scenario("GET is retried after a reset", network=True)
async def reset(transport: Transport) -> None:
    """Whether or not the server processed the request."""
    async with lab(transport) as here:
        for fault in (faults.reset_after_processing(), faults.reset_before_processing()):
            here.sandbox.inject(fault)
            assert here.sandbox.user_id == (await here.client().me()).id


@scenario("POST is not sent twice", network=True)
async def not_doubled(transport: Transport) -> None:
    """A POST reset after processing is not retried, and the error has ``maybe_processed``."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.reset_after_processing(), method="POST")
        with pytest.raises(APIConnectionError) as caught:
            await here.client().hooks.create(TARGET, any_meeting_type=True)
        assert caught.value.maybe_processed
        assert (1, 1) == (here.seen("POST", "/hooks"), len(here.sandbox.hooks()))


@scenario("a request that may have arrived keeps its slot", network=True)
async def slot(transport: Transport) -> None:
    """The server may have counted the request."""
    async with lab(transport) as here:
        limiter = LocalRateLimiter(limit=8, period=30)
        lemcal = here.client(limiter=limiter, retry=ONCE)
        here.sandbox.inject(faults.reset_after_processing(), method="POST")
        with pytest.raises(APIConnectionError):
            await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert 7 == lemcal.rate_limit.remaining


@scenario("truncated response is retried", network=True)
async def truncated(transport: Transport) -> None:
    """A GET is sent again."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.truncated())
        assert here.sandbox.user_id == (await here.client().me()).id
        assert 2 == len(here.sandbox.requests)


@scenario("connection refused", network=True)
async def connection_refused(transport: Transport) -> None:
    """Connecting to a closed port raises APIConnectionError."""
    async with lab(transport) as here:
        lemcal = here.client(base_url="http://127.0.0.1:9/api/lemcal", retry=ONCE)
        with pytest.raises(APIConnectionError):
            await lemcal.me()


@scenario("`timeout=`", network=True)
async def timeout(transport: Transport) -> None:
    """The timeout applies to one operation, and raises APITimeoutError."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.slow(8))
        with anyio.fail_after(5), pytest.raises(APITimeoutError):
            await here.client(timeout=0.4, retry=ONCE).me()
        # Several operations together may take longer.
        here.sandbox.inject(faults.slow(0.3), times=2)
        for _ in range(2):
            await here.client(timeout=0.5, retry=ONCE).me()


@scenario("`deadline=`", network=True)
async def deadline(transport: Transport) -> None:
    """The deadline applies to the whole call."""
    async with lab(transport) as here:
        here.sandbox.inject(faults.slow(8))
        with anyio.fail_after(5), pytest.raises(DeadlineExceededError):
            await here.client(deadline=0.4).me()


@scenario("cancellation", network=True)
async def cancellation(transport: Transport) -> None:
    """After a call is canceled at any moment, the next call works."""
    async with lab(transport) as here:
        lemcal = here.client()
        for steps in range(0, 40, 2):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lemcal.me)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            with anyio.fail_after(5):
                assert here.sandbox.user_id == (await lemcal.me()).id


@scenario("no secrets in errors", network=True)
async def secrets(transport: Transport) -> None:
    """No secret in any traceback frame's local variables, even after a timeout scope."""
    async with lab(transport) as here:
        for fault in (faults.reset_after_processing(), faults.slow(8)):
            here.sandbox.inject(fault)
            try:
                with anyio.fail_after(0.4):
                    await here.client(retry=ONCE, timeout=5).me()
            except Exception as error:
                _check_no_secrets(error, here)


def _check_no_secrets(error: BaseException, here: Lab) -> None:
    key = here.sandbox.api_key
    hidden = [key, b64encode(f"{here.sandbox.user_id}:{key}".encode()).decode()]
    rendered = traceback.TracebackException.from_exception(error, capture_locals=True)
    # Ignore the scenarios' own frames.
    own = [frame for frame in rendered.stack if "/tests/matrix/" in frame.filename]
    for frame in own:
        frame.locals = None
    text = "".join(rendered.format())
    assert not any(secret in text for secret in hidden), "a secret in a traceback"


@scenario("trio")
async def on_trio(transport: Transport) -> None:
    """The matrix runs this scenario on trio."""
    async with lab(transport) as here:
        assert here.sandbox.user_id == (await here.client().me()).id
        assert None is not await here.client().hooks.create(TARGET, any_meeting_type=True)
        with anyio.move_on_after(0):
            await here.client().me()
        assert [] != await here.client().meetings.list()
