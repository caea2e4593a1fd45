"""The rate-limit layer: the keys it uses, the outcomes it reports, and the errors it raises."""

import asyncio
import contextlib
import random
import re
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpcore
import httpx
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async._headers import Quota
from lemcal_async._urls import DEFAULT_BASE_URL
from lemcal_async.errors import DeadlineExceededError, RateLimitError
from lemcal_async.ratelimit import (
    Key,
    LocalRateLimiter,
    Permit,
    Priority,
    RateLimit,
    RateLimiter,
    WouldWait,
    default_limiter,
)
from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._ratelimit import WindowKind
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport
from lemcal_async.transport._call import CallState, begin_call, call_of, extension
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

URL = f"{DEFAULT_BASE_URL}/me"
USER = {"_id": "usr_1", "email": "ada@example.com"}
ONE = ("usr_1", "first-Kq83-hush")
TWO = ("usr_2", "second-Vn51-hush")

Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]
Send = Callable[[], Coroutine[Any, Any, object]]
Cancel = Callable[[Send, anyio.Event], Coroutine[Any, Any, None]]


@attrs.frozen
class Acquisition:
    """The arguments of a call to ``acquire``."""

    key: Key
    priority: Priority
    timeout: float | None
    again: Permit | None


@attrs.define
class Recorder:
    """A limiter that grants after ``delay``, and records acquisitions and reports."""

    delay: float = 0.0
    pause: float = 0.0
    refusal: WouldWait | None = None
    acquisitions: list[Acquisition] = attrs.field(factory=list)
    reports: list[str] = attrs.field(factory=list)
    permits: list[Permit] = attrs.field(factory=list)

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - part of the protocol
        again: Permit | None = None,
    ) -> Permit:
        """Grant or refuse a permit."""
        self.acquisitions.append(Acquisition(key, priority, timeout, again))
        await anyio.sleep(self.delay)
        if self.refusal is not None:
            raise self.refusal
        self.permits.append(RecordedPermit(self))
        return self.permits[-1]

    def snapshot(self, key: Key) -> RateLimit:
        """Return recognizable values."""
        return RateLimit(limit=17, remaining=3, resets_in=1.0, queued=0, paused_for=0.0)


@attrs.frozen(eq=False)
class RecordedPermit:
    """A permit that records the reports it receives."""

    recorder: Recorder

    def sent(self) -> None:
        """Record that the request was sent."""
        self.recorder.reports.append("sent")

    def answered(self, status_code: int, quota: Quota) -> float:
        """Record the response, including a value from its headers."""
        self.recorder.reports.append(f"answered {status_code}, {quota.remaining} left")
        return self.recorder.pause

    def unsent(self) -> None:
        """Record that the request was not sent."""
        self.recorder.reports.append("unsent")

    def unknown(self) -> None:
        """Record that the outcome is unknown."""
        self.recorder.reports.append("unknown")


async def report_sending(request: httpx.Request, method: str | None = None) -> None:
    """Report that the request is being sent, as httpcore does."""
    info = {"request": httpcore.Request(method or request.method, "https://api.example.com")}
    await request.extensions["trace"]("http11.send_request_headers.started", info)


async def respond(request: httpx.Request) -> httpx.Response:
    """Respond without reporting anything."""
    return httpx.Response(200, json=USER, headers={"X-RateLimit-Remaining": "7"})


async def report_and_respond(request: httpx.Request) -> httpx.Response:
    """Report that the request is being sent, and respond."""
    await report_sending(request)
    return await respond(request)


def layer(handler: Handler = respond, limiter: RateLimiter | None = None) -> RateLimitTransport:
    """Return the layer on a mock transport with this handler."""
    return RateLimitTransport(httpx.MockTransport(handler), limiter)


def request_of(account: tuple[str, str] = ONE, **call: Any) -> httpx.Request:
    """Return a request as the client creates it, but without the key."""
    request = httpx.Request("GET", URL, extensions=extension(CallState("GET", "/me", **call)))
    return next(httpx.BasicAuth(*account).auth_flow(request))


def max_in_period(period: float, times: list[float]) -> int:
    """Return the maximum number of ``times`` within any ``period``."""
    return max(sum(start <= moment < start + period for moment in times) for start in times)


# Keys.


def test_the_recorder_is_a_rate_limiter() -> None:
    """Any object with the two methods is a rate limiter."""
    assert isinstance(Recorder(), RateLimiter)


def test_the_limiter_is_the_process_wide_one_unless_given() -> None:
    """The default is looked up at the time of use."""
    given = LocalRateLimiter()
    assert (default_limiter(), given) == (layer().limiter, layer(limiter=given).limiter)


@pytest.mark.anyio
async def test_plain_client_shares_the_limit_of_the_sdk() -> None:
    """For a request of a plain client, the key is derived from the URL and the header."""
    limiter = LocalRateLimiter(3, 60.0)
    transport = layer(limiter=limiter)
    async with httpx.AsyncClient(transport=transport, auth=ONE) as client:
        await client.get(URL)
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(respond), limiter=limiter) as lemcal:
        await lemcal.me()
        assert 1 == lemcal.rate_limit.remaining
        assert 3 == lemcal.for_account(*TWO).rate_limit.remaining


@pytest.mark.anyio
async def test_the_key_of_the_call_has_priority() -> None:
    """The client knows the key, so the layer does not derive it."""
    recorder, key = Recorder(), Key("https://api.example.com", "0a" * 16)
    await layer(limiter=recorder).handle_async_request(request_of(key=key))
    assert [key] == [acquisition.key for acquisition in recorder.acquisitions]


@pytest.mark.anyio
async def test_request_without_credentials_has_a_key() -> None:
    """The server may count such requests, too."""
    recorder = Recorder()
    async with httpx.AsyncClient(transport=layer(limiter=recorder)) as client:
        await client.get(URL)
        await client.get(URL, auth=ONE)
    assert 2 == len({acquisition.key for acquisition in recorder.acquisitions})


@pytest.mark.anyio
async def test_two_accounts_on_one_stack_do_not_delay_each_other() -> None:
    """One account has reached its limit; the other still sends."""
    transport = layer(limiter=LocalRateLimiter(1, 60.0))
    with anyio.fail_after(5):
        await transport.handle_async_request(request_of(ONE))
        await transport.handle_async_request(request_of(TWO))
    with anyio.move_on_after(0.05) as scope:
        await transport.handle_async_request(request_of(ONE))
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_arguments_of_acquire() -> None:
    """The call's priority and remaining time are passed on."""
    recorder = Recorder()
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(respond), limiter=recorder) as lemcal:
        await lemcal.me()
        await lemcal.with_options(priority="bulk", deadline=9.0).me()
    first, second = recorder.acquisitions
    assert ("interactive", None, None) == (first.priority, first.timeout, first.again)
    assert ("bulk", None) == (second.priority, second.again)
    assert 9.0 == pytest.approx(second.timeout, abs=0.5)


# Reports: how the request ended, and when it was sent.


@pytest.mark.parametrize(
    ("handler", "expected"),
    [(respond, ["answered 200, 7 left"]), (report_and_respond, ["sent", "answered 200, 7 left"])],
)
@pytest.mark.anyio
async def test_response_is_reported(handler: Handler, expected: list[str]) -> None:
    """The headers are reported, too, and the sending if the wire reports it."""
    recorder = Recorder()
    await layer(handler, recorder).handle_async_request(request_of())
    assert expected == recorder.reports


ERRORS = [
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ReadError,
    httpx.ReadTimeout,
    OSError,
]


class Wire(httpx.MockTransport):
    """A wire that may promise to report when it sends."""

    def __init__(self, handler: Handler, *, reports_sending: bool) -> None:
        super().__init__(handler)
        self.reports_sending = reports_sending


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("reports_sending", "events", "reports"),
    [
        (True, [], ["unsent"]),
        (False, ["connection.connect_tcp.started"], ["unsent"]),
        (False, [], ["unknown"]),
        (False, ["http11.send_request_headers.started"], ["sent", "unknown"]),
        (True, ["http2.send_request_headers.started"], ["sent", "unknown"]),
    ],
)
@pytest.mark.anyio
async def test_failure_is_reported(
    error: type[Exception], *, reports_sending: bool, events: list[str], reports: list[str]
) -> None:
    """The type of error proves nothing: the slot is returned only if the wire proves that it sent nothing."""
    recorder = Recorder()

    async def fail(request: httpx.Request) -> httpx.Response:
        for name in events:
            info = {"request": httpcore.Request(request.method, "https://api.example.com")}
            await request.extensions["trace"](name, info)
        raise error("no way")

    transport = RateLimitTransport(Wire(fail, reports_sending=reports_sending), recorder)
    with pytest.raises(error):
        await transport.handle_async_request(request_of())
    assert reports == recorder.reports


@pytest.mark.anyio
async def test_events_of_one_attempt_prove_nothing_about_another() -> None:
    """A wire may send different requests in different ways."""
    recorder = Recorder()

    async def fail(request: httpx.Request) -> httpx.Response:
        if len(recorder.permits) == 1:
            return await report_and_respond(request)
        raise httpx.ConnectError("broken")

    transport = layer(fail, recorder)
    await transport.handle_async_request(request_of())
    with pytest.raises(httpx.ConnectError):
        await transport.handle_async_request(request_of())
    assert "unknown" == recorder.reports[-1]


async def by_scope(send: Send, stuck: anyio.Event) -> None:
    """Cancel with a cancel scope."""
    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await stuck.wait()
        group.cancel_scope.cancel()


async def natively(send: Send, stuck: anyio.Event) -> None:
    """Cancel with ``Task.cancel()``."""
    task = asyncio.ensure_future(send())
    await stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


CANCELLATIONS = [
    pytest.param("asyncio", by_scope, id="asyncio-scope"),
    pytest.param("asyncio", natively, id="asyncio-native"),
    pytest.param("trio", by_scope, id="trio-scope"),
]


@pytest.mark.parametrize(("anyio_backend", "cancel"), CANCELLATIONS)
@pytest.mark.parametrize(
    ("reports", "sends", "expected"),
    [
        (True, False, ["unsent"]),
        (True, True, ["sent", "unknown"]),
        (False, False, ["unknown"]),
    ],
)
@pytest.mark.anyio
async def test_canceled_on_the_wire(
    cancel: Cancel, *, reports: bool, sends: bool, expected: list[str]
) -> None:
    """The slot is returned if the request was certainly not sent; otherwise, it counts as used."""
    recorder, stuck = Recorder(), anyio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        if len(recorder.permits) == 1:
            return await (report_and_respond if reports else respond)(request)
        if sends:
            await report_sending(request)
        stuck.set()
        await anyio.sleep_forever()
        raise AssertionError

    transport = RateLimitTransport(Wire(hang, reports_sending=reports), recorder)
    await transport.handle_async_request(request_of())
    recorder.reports.clear()
    with anyio.fail_after(5):
        await cancel(lambda: transport.handle_async_request(request_of()), stuck)
    assert expected == recorder.reports


@pytest.mark.parametrize(("anyio_backend", "cancel"), CANCELLATIONS)
@pytest.mark.anyio
async def test_canceled_in_the_queue(cancel: Cancel) -> None:
    """Without a permit there is nothing to report, but the wait counts."""
    recorder, request, stuck = Recorder(delay=60.0), request_of(), anyio.Event()

    async def send() -> None:
        await layer(limiter=recorder).handle_async_request(request)

    async def wait() -> None:
        await anyio.sleep(0.02)
        stuck.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await cancel(send, stuck)
    assert [] == recorder.reports
    assert 0.0 < call_of(request).waited < 5.0


@pytest.mark.anyio
async def test_refused_request_presents_its_permit() -> None:
    """The next acquisition, and only that, has the permit; the limiter's pause is recorded."""
    recorder, request = Recorder(pause=1.5), request_of()
    statuses = [429, 503, 200]

    async def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(statuses.pop(0))

    transport = layer(respond, recorder)
    await transport.handle_async_request(request)
    assert (recorder.permits[0], 1.5) == (call_of(request).refused_permit, call_of(request).paused_for)
    await transport.handle_async_request(request)
    await transport.handle_async_request(request)
    assert [None, recorder.permits[0], None] == [acquisition.again for acquisition in recorder.acquisitions]


@pytest.mark.anyio
async def test_sending_a_request_again_begins_a_new_call() -> None:
    """The second call does not inherit the state of the first."""
    request = httpx.Request("GET", URL)
    first = begin_call(request)
    assert first is call_of(request) is begin_call(request)
    first.begun = 1
    assert first is call_of(request)
    second = begin_call(request)
    assert second is call_of(request) is not first
    assert "GET /api/lemcal/me" == str(second)


# Trace events of the wire.


@pytest.mark.anyio
async def test_connect_to_a_proxy_is_not_the_request() -> None:
    """If the CONNECT request fails, the request itself was not sent."""
    recorder = Recorder()

    async def tunnel(request: httpx.Request) -> httpx.Response:
        await report_sending(request, method="CONNECT")
        raise httpx.ConnectError("the other side of the proxy is down")

    with pytest.raises(httpx.ConnectError):
        await layer(tunnel, recorder).handle_async_request(request_of())
    assert ["unsent"] == recorder.reports


@pytest.mark.parametrize("make", [PooledTransport, HTTPX2Transport, httpx.AsyncHTTPTransport])
@pytest.mark.anyio
async def test_real_wires_report_sending(
    make: Callable[[], httpx.AsyncBaseTransport], lemcal_sandbox: Sandbox
) -> None:
    """Both new and reused connections report it, and the caller's own trace callback still works."""
    recorder, events = Recorder(), []

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)

    async with httpx.AsyncClient(transport=RateLimitTransport(make(), recorder)) as client:
        for _ in range(2):
            request = client.build_request(
                "GET", f"{lemcal_sandbox.base_url}/me", extensions={"trace": trace}
            )
            response = await client.send(request, auth=(lemcal_sandbox.user_id, lemcal_sandbox.api_key))
            assert lemcal_sandbox.user_id == response.json()["_id"]
            assert trace is request.extensions["trace"]
    assert ["sent", "answered 200, 19 left", "sent", "answered 200, 18 left"] == recorder.reports
    assert 1 == events.count("connection.connect_tcp.complete")
    expected = (
        "send_request_headers.started",
        "receive_response_headers.complete",
        "receive_response_body.complete",
    )
    for name in expected:
        assert 2 == events.count(f"http11.{name}")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.anyio
async def test_trace_extension_is_restored(*, fails: bool) -> None:
    """Afterward, the request has the caller's callback or none."""

    async def wire(request: httpx.Request) -> httpx.Response:
        if fails:
            raise httpx.ConnectError("no")
        return await report_and_respond(request)

    async def trace(name: str, info: dict[str, Any]) -> None:
        """Ignore the event."""

    for extensions in ({}, {"trace": trace}):
        request = httpx.Request("GET", URL, extensions=extensions)
        with contextlib.suppress(httpx.ConnectError):
            await layer(wire, Recorder()).handle_async_request(request)
        assert extensions.get("trace") is request.extensions.get("trace")
        assert set(extensions) == set(request.extensions) - {"lemcal_async"}


@pytest.mark.anyio
async def test_slow_connections_do_not_pile_up() -> None:
    """The limit applies to sending: a request may be sent more than a period after its permit."""
    rng, arrivals = random.Random(1), list[float]()

    async def connect_slowly(request: httpx.Request) -> httpx.Response:
        await anyio.sleep(rng.choice([0.0, 0.05, 0.15]))
        await report_sending(request)
        arrivals.append(anyio.current_time())
        await anyio.sleep(rng.random() * 0.02)
        return httpx.Response(200)

    transport = layer(connect_slowly, LocalRateLimiter(5, 0.1))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(transport.handle_async_request, request_of())
    assert 20 == len(arrivals)
    assert max_in_period(0.1, arrivals) <= 5


# Refusals.


@pytest.mark.anyio
async def test_refused_request_goes_first() -> None:
    """It is sent as soon as the server allows, and the others follow in order."""
    paths: list[str] = []
    arrived, all_queued = anyio.Event(), anyio.Event()

    async def refuse_once(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if len(paths) > 1:
            return await respond(request)
        arrived.set()
        await all_queued.wait()
        return httpx.Response(429, headers={"Retry-After": "0.1"})

    transport = RetryTransport(layer(refuse_once, LocalRateLimiter(1, 0.05)))

    async def send(path: str) -> None:
        response = await transport.handle_async_request(
            httpx.Request("GET", f"https://api.example.com{path}")
        )
        assert 200 == response.status_code

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(send, "/a")
            await arrived.wait()
            for path in ("/b", "/c", "/d"):
                group.start_soon(send, path)
                await anyio.wait_all_tasks_blocked()
            all_queued.set()
    assert ["/a", "/a", "/b", "/c", "/d"] == paths


@pytest.mark.anyio
async def test_queue_longer_than_the_deadline() -> None:
    """The error is immediate, and names both times and when to try again."""
    recorder = Recorder(refusal=WouldWait(6.06, refused=False))
    async with AsyncLemcal(
        *ONE, transport=httpx.MockTransport(respond), limiter=recorder, deadline=5.0
    ) as lemcal:
        with pytest.raises(DeadlineExceededError) as caught:
            await lemcal.me()
    assert (
        "GET /me: the rate limiter's queue is 6.06 s long, but only N s are left until the deadline; "
        "allow more time, or send fewer calls at once"
    ) == re.sub(r"only (5|4\.\d+) s", "only N s", str(caught.value))
    assert isinstance(caught.value, TimeoutError)
    assert (6.06, "GET", "/me") == (caught.value.retry_after, caught.value.method, caught.value.route)
    assert (0, None, None) == (caught.value.attempts, caught.value.__cause__, caught.value.__context__)


@pytest.mark.anyio
async def test_deadline_that_has_passed() -> None:
    """The message says 0 s, not a negative time."""
    transport = layer(limiter=Recorder(refusal=WouldWait(0.5, refused=False)))
    with pytest.raises(DeadlineExceededError, match=r"0\.5 s long, but only 0 s are left"):
        await transport.handle_async_request(request_of(deadline=anyio.current_time() - 3.0))


@pytest.mark.anyio
async def test_long_refusal_of_a_key() -> None:
    """The call raises the RateLimitError of the server's earlier 429."""
    recorder = Recorder(refusal=WouldWait(86_399.6, refused=True))
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(respond), limiter=recorder) as lemcal:
        with pytest.raises(RateLimitError) as caught:
            await lemcal.me()
    assert (
        "GET /me: the server refuses this key for another 86400 s (429); "
        "wait until then, and find out who else uses the key"
    ) == str(caught.value)
    error = caught.value
    assert (429, 86_399.6, 17, 0) == (error.status_code, error.retry_after, error.limit, error.remaining)
    assert (None, None) == (error.__cause__, error.__context__)


@pytest.mark.anyio
async def test_retry_after_of_a_day_fails_all_calls() -> None:
    """The call that receives it, queued calls, and later calls raise."""
    hits = 0

    async def refuse(request: httpx.Request) -> httpx.Response:
        nonlocal hits
        hits += 1
        await anyio.sleep(0.02)
        return httpx.Response(429, headers={"Retry-After": "86400"})

    raised: list[RateLimitError] = []
    async with AsyncLemcal(
        *ONE, transport=httpx.MockTransport(refuse), limiter=LocalRateLimiter(2, 60.0)
    ) as lemcal:

        async def call() -> None:
            with pytest.raises(RateLimitError) as caught:
                await lemcal.me()
            raised.append(caught.value)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                for _ in range(6):
                    group.start_soon(call)
            await call()
    assert (7, 2) == (len(raised), hits)
    assert all(86_400 == pytest.approx(error.retry_after, abs=5) for error in raised)


@pytest.mark.anyio
async def test_waiting_time_is_recorded() -> None:
    """It is the total over all attempts of a call, and is on errors."""
    recorder, request = Recorder(delay=0.05), request_of()
    await layer(limiter=recorder).handle_async_request(request)
    assert 0.04 < call_of(request).waited < 5.0
    recorder.refusal = WouldWait(6.06, refused=False)
    with pytest.raises(DeadlineExceededError) as caught:
        await layer(limiter=recorder).handle_async_request(request)
    assert 0.08 < caught.value.waited < 5.0
    assert caught.value.waited == pytest.approx(call_of(request).waited, abs=0.001)


@pytest.mark.anyio
async def test_closing_closes_the_wrapped_transport() -> None:
    """A layer owns its wire, as in httpx."""
    closed: list[str] = []

    class Wire(httpx.AsyncBaseTransport):
        async def aclose(self) -> None:
            closed.append("wire")

    await RateLimitTransport(Wire()).aclose()
    assert ["wire"] == closed


# End to end, against a server with a rate limit.


@pytest.mark.parametrize("window", ["fixed", "sliding"])
@pytest.mark.anyio
async def test_no_429_from_a_real_server(window: WindowKind) -> None:
    """25 concurrent calls at 5 per 0.2 s: none receives a 429, for either kind of window."""
    with Sandbox(limit=5, period=0.2, window=window).serve() as sandbox:
        async with sandbox.client(limiter=LocalRateLimiter(5, 0.2), retry=RetryPolicy(attempts=1)) as lemcal:
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    for _ in range(25):
                        group.start_soon(lemcal.me)
        assert [200] * 25 == [request.status_code for request in sandbox.requests]
        # With fixed windows, requests at the end of one and the start of the next can be close together.
        allowed = 5 if window == "sliding" else 10
        assert 5 <= max_in_period(0.2, [request.at for request in sandbox.requests]) <= allowed


@attrs.define
class ExpiredPermit(RecordedPermit):
    """A permit that has expired when its request is about to be sent."""

    def sent(self) -> bool:  # type: ignore[override]
        """Report the expiry."""
        self.recorder.reports.append("expired")
        return False


@attrs.define
class ExpiringLimiter(Recorder):
    """A limiter whose first permit expires, as in a suspended process."""

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - part of the protocol
        again: Permit | None = None,
    ) -> Permit:
        """Grant an expired permit first, and then valid ones."""
        await super().acquire(key, priority=priority, timeout=timeout, again=again)
        if len(self.permits) == 1:
            self.permits[0] = ExpiredPermit(self)
        return self.permits[-1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "wire", [PooledTransport, HTTPX2Transport, AiohttpTransport, httpx.AsyncHTTPTransport]
)
async def test_expired_permit_sends_nothing(
    wire: Callable[[], httpx.AsyncBaseTransport], anyio_backend_name: str
) -> None:
    """The call acquires a new permit with priority; the server receives one request."""
    if wire is AiohttpTransport and anyio_backend_name == "trio":
        pytest.skip("aiohttp runs on asyncio only")
    limiter = ExpiringLimiter()
    with Sandbox().serve() as sandbox:
        async with (
            wire() as transport,
            AsyncLemcal(
                sandbox.user_id,
                sandbox.api_key,
                base_url=sandbox.base_url,
                transport=transport,
                limiter=limiter,
                retry=RetryPolicy(attempts=1),
            ) as lemcal,
        ):
            await lemcal.me()
        assert 1 == len(sandbox.requests)
    assert [None, limiter.permits[0]] == [acquisition.again for acquisition in limiter.acquisitions]
    assert ["expired", "unsent", "sent"] == limiter.reports[:3]
