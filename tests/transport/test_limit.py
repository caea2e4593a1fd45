"""The rate-limit layer: whose budget it asks for, what it reports of each request, and what it raises."""

import asyncio
import contextlib
import random
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
class Asked:
    """One question to a limiter."""

    key: Key
    priority: Priority
    timeout: float | None
    again: Permit | None


@attrs.define
class Recorder:
    """A limiter that grants at once, or after ``delay``, and writes down what it is asked and told."""

    delay: float = 0.0
    hold: float = 0.0
    refusal: WouldWait | None = None
    asked: list[Asked] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    permits: list[Permit] = attrs.field(factory=list)

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - the protocol's
        again: Permit | None = None,
    ) -> Permit:
        """Grant, or refuse."""
        self.asked.append(Asked(key, priority, timeout, again))
        await anyio.sleep(self.delay)
        if self.refusal is not None:
            raise self.refusal
        self.permits.append(RecordedPermit(self))
        return self.permits[-1]

    def snapshot(self, key: Key) -> RateLimit:
        """Return what nobody else would."""
        return RateLimit(limit=17, remaining=3, resets_in=1.0, queued=0, paused_for=0.0)


@attrs.frozen(eq=False)
class RecordedPermit:
    """A permit whose reports can be read."""

    recorder: Recorder

    def sent(self) -> None:
        """Take down the departure."""
        self.recorder.told.append("sent")

    def answered(self, status_code: int, quota: Quota) -> float:
        """Take down the answer, with what shows that its headers were read."""
        self.recorder.told.append(f"answered {status_code}, {quota.remaining} left")
        return self.recorder.hold

    def unsent(self) -> None:
        """Take down that it never left."""
        self.recorder.told.append("unsent")

    def unknown(self) -> None:
        """Take down that nobody knows."""
        self.recorder.told.append("unknown")


async def depart(request: httpx.Request, method: str | None = None) -> None:
    """Tell that the request leaves, as httpcore does."""
    info = {"request": httpcore.Request(method or request.method, "https://api.example.com")}
    await request.extensions["trace"]("http11.send_request_headers.started", info)


async def answer(request: httpx.Request) -> httpx.Response:
    """Answer, and tell nothing."""
    return httpx.Response(200, json=USER, headers={"X-RateLimit-Remaining": "7"})


async def depart_and_answer(request: httpx.Request) -> httpx.Response:
    """Answer, and tell when the request leaves."""
    await depart(request)
    return await answer(request)


def layer(handler: Handler = answer, limiter: RateLimiter | None = None) -> RateLimitTransport:
    """Return the layer on a wire that does as ``handler`` does."""
    return RateLimitTransport(httpx.MockTransport(handler), limiter)


def request_of(account: tuple[str, str] = ONE, **call: Any) -> httpx.Request:
    """Return a request as the client makes it, but for the key."""
    request = httpx.Request("GET", URL, extensions=extension(CallState("GET", "/me", **call)))
    return next(httpx.BasicAuth(*account).auth_flow(request))


def most_in(period: float, times: list[float]) -> int:
    """Return the greatest number of ``times`` in any ``period``."""
    return max(sum(start <= moment < start + period for moment in times) for start in times)


# Whose budget.


def test_the_recorder_is_a_rate_limiter() -> None:
    """Anything that has the two methods is."""
    assert isinstance(Recorder(), RateLimiter)


def test_the_limiter_is_the_process_wide_one_unless_given() -> None:
    """Whichever that is at the time."""
    given = LocalRateLimiter()
    assert (default_limiter(), given) == (layer().limiter, layer(limiter=given).limiter)


@pytest.mark.anyio
async def test_a_plain_client_shares_the_budget_of_the_sdk() -> None:
    """The same account at the same address: the key is told from the header where no call carries it."""
    limiter = LocalRateLimiter(3, 60.0)
    transport = layer(limiter=limiter)
    async with httpx.AsyncClient(transport=transport, auth=ONE) as client:
        await client.get(URL)
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(answer), limiter=limiter) as lemcal:
        await lemcal.me()
        assert 1 == lemcal.rate_limit.remaining
        assert 3 == lemcal.for_account(*TWO).rate_limit.remaining


@pytest.mark.anyio
async def test_the_key_of_the_call_comes_first() -> None:
    """The client knows it, and spares the layer the reading of headers."""
    recorder, key = Recorder(), Key("https://api.example.com", "0a" * 16)
    await layer(limiter=recorder).handle_async_request(request_of(key=key))
    assert [key] == [asked.key for asked in recorder.asked]


@pytest.mark.anyio
async def test_a_request_without_credentials_has_a_budget_too() -> None:
    """The server counts it somewhere."""
    recorder = Recorder()
    async with httpx.AsyncClient(transport=layer(limiter=recorder)) as client:
        await client.get(URL)
        await client.get(URL, auth=ONE)
    assert 2 == len({asked.key for asked in recorder.asked})


@pytest.mark.anyio
async def test_two_accounts_on_one_stack_do_not_delay_each_other() -> None:
    """One has used its budget up, the other goes."""
    transport = layer(limiter=LocalRateLimiter(1, 60.0))
    with anyio.fail_after(5):
        await transport.handle_async_request(request_of(ONE))
        await transport.handle_async_request(request_of(TWO))
    with anyio.move_on_after(0.05) as scope:
        await transport.handle_async_request(request_of(ONE))
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_what_the_limiter_is_asked() -> None:
    """The call's lane, and the time it has left."""
    recorder = Recorder()
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(answer), limiter=recorder) as lemcal:
        await lemcal.me()
        await lemcal.with_options(priority="bulk", deadline=9.0).me()
    first, second = recorder.asked
    assert ("interactive", None, None) == (first.priority, first.timeout, first.again)
    assert ("bulk", None) == (second.priority, second.again)
    assert 9.0 == pytest.approx(second.timeout, abs=0.5)


# What is reported: how the request ended, and when it left.


@pytest.mark.parametrize(
    ("handler", "expected"),
    [(answer, ["answered 200, 7 left"]), (depart_and_answer, ["sent", "answered 200, 7 left"])],
)
@pytest.mark.anyio
async def test_an_answer(handler: Handler, expected: list[str]) -> None:
    """It is reported with its headers, and the departure if the wire tells."""
    recorder = Recorder()
    await layer(handler, recorder).handle_async_request(request_of())
    assert expected == recorder.told


ERRORS = [
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ReadError,
    httpx.ReadTimeout,
    OSError,
]


class Wire(httpx.MockTransport):
    """A wire that promises to report when it sends, or does not."""

    def __init__(self, handler: Handler, *, reports_sending: bool) -> None:
        super().__init__(handler)
        self.reports_sending = reports_sending


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("reports_sending", "events", "told"),
    [
        (True, [], ["unsent"]),
        (False, ["connection.connect_tcp.started"], ["unsent"]),
        (False, [], ["unknown"]),
        (False, ["http11.send_request_headers.started"], ["sent", "unknown"]),
        (True, ["http2.send_request_headers.started"], ["sent", "unknown"]),
    ],
)
@pytest.mark.anyio
async def test_a_failure(
    error: type[Exception], *, reports_sending: bool, events: list[str], told: list[str]
) -> None:
    """Its name proves nothing: the slot goes back only if the wire shows that it sent nothing."""
    recorder = Recorder()

    async def fail(request: httpx.Request) -> httpx.Response:
        for name in events:
            info = {"request": httpcore.Request(request.method, "https://api.example.com")}
            await request.extensions["trace"](name, info)
        raise error("no way")

    transport = RateLimitTransport(Wire(fail, reports_sending=reports_sending), recorder)
    with pytest.raises(error):
        await transport.handle_async_request(request_of())
    assert told == recorder.told


@pytest.mark.anyio
async def test_what_was_reported_once_proves_nothing_later() -> None:
    """Each attempt counts by itself: a wire may send some requests by other means than others."""
    recorder = Recorder()

    async def fail(request: httpx.Request) -> httpx.Response:
        if len(recorder.permits) == 1:
            return await depart_and_answer(request)
        raise httpx.ConnectError("broken")

    transport = layer(fail, recorder)
    await transport.handle_async_request(request_of())
    with pytest.raises(httpx.ConnectError):
        await transport.handle_async_request(request_of())
    assert "unknown" == recorder.told[-1]


async def by_scope(send: Send, stuck: anyio.Event) -> None:
    """Cancel as anyio and trio do."""
    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await stuck.wait()
        group.cancel_scope.cancel()


async def natively(send: Send, stuck: anyio.Event) -> None:
    """Cancel as asyncio does."""
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
    ("tells", "leaves", "expected"),
    [
        (True, False, ["unsent"]),
        (True, True, ["sent", "unknown"]),
        (False, False, ["unknown"]),
    ],
)
@pytest.mark.anyio
async def test_canceled_on_the_wire(
    cancel: Cancel, *, tells: bool, leaves: bool, expected: list[str]
) -> None:
    """Before the request left the slot goes back; later, or if nobody can tell, it counts as used."""
    recorder, stuck = Recorder(), anyio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        if len(recorder.permits) == 1:
            return await (depart_and_answer if tells else answer)(request)
        if leaves:
            await depart(request)
        stuck.set()
        await anyio.sleep_forever()
        raise AssertionError

    transport = RateLimitTransport(Wire(hang, reports_sending=tells), recorder)
    await transport.handle_async_request(request_of())
    recorder.told.clear()
    with anyio.fail_after(5):
        await cancel(lambda: transport.handle_async_request(request_of()), stuck)
    assert expected == recorder.told


@pytest.mark.parametrize(("anyio_backend", "cancel"), CANCELLATIONS)
@pytest.mark.anyio
async def test_canceled_in_the_queue(cancel: Cancel) -> None:
    """Nothing was granted, so there is nothing to report; the wait counts all the same."""
    recorder, request, stuck = Recorder(delay=60.0), request_of(), anyio.Event()

    async def send() -> None:
        await layer(limiter=recorder).handle_async_request(request)

    async def wait() -> None:
        await anyio.sleep(0.02)
        stuck.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await cancel(send, stuck)
    assert [] == recorder.told
    assert 0.0 < call_of(request).waited < 5.0


@pytest.mark.anyio
async def test_a_refused_request_keeps_its_permit() -> None:
    """It shows it when it asks again, once; and what the limiter holds is not waited for twice."""
    recorder, request = Recorder(hold=1.5), request_of()
    statuses = [429, 503, 200]

    async def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(statuses.pop(0))

    transport = layer(respond, recorder)
    await transport.handle_async_request(request)
    assert (recorder.permits[0], 1.5) == (call_of(request).refused_permit, call_of(request).paused_for)
    await transport.handle_async_request(request)
    await transport.handle_async_request(request)
    assert [None, recorder.permits[0], None] == [asked.again for asked in recorder.asked]


@pytest.mark.anyio
async def test_a_request_used_twice_begins_a_new_call() -> None:
    """What became of the first is nothing to the second; a first layer in a plain client sees to it."""
    request = httpx.Request("GET", URL)
    first = begin_call(request)
    assert first is call_of(request) is begin_call(request)
    first.attempts = 1
    assert first is call_of(request)
    second = begin_call(request)
    assert second is call_of(request) is not first
    assert "GET /api/lemcal/me" == str(second)


# The wire's trace.


@pytest.mark.anyio
async def test_a_connect_is_not_the_request() -> None:
    """The CONNECT to a proxy leaves first; canceled or failed after that, the request itself has not."""
    recorder = Recorder()

    async def tunnel(request: httpx.Request) -> httpx.Response:
        await depart(request, method="CONNECT")
        raise httpx.ConnectError("the other side of the proxy is down")

    with pytest.raises(httpx.ConnectError):
        await layer(tunnel, recorder).handle_async_request(request_of())
    assert ["unsent"] == recorder.told


@pytest.mark.parametrize("make", [PooledTransport, HTTPX2Transport, httpx.AsyncHTTPTransport])
@pytest.mark.anyio
async def test_a_real_wire_tells(
    make: Callable[[], httpx.AsyncBaseTransport], lemcal_sandbox: Sandbox
) -> None:
    """The departure is known, on a new connection as on a used one; and callers' own traces go on."""
    recorder, events = Recorder(), []

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)

    async with httpx.AsyncClient(transport=RateLimitTransport(make(), recorder)) as client:
        for _ in range(2):
            request = client.build_request(
                "GET", f"{lemcal_sandbox.base_url}/me", extensions={"trace": trace}
            )
            answer = await client.send(request, auth=(lemcal_sandbox.user_id, lemcal_sandbox.api_key))
            assert lemcal_sandbox.user_id == answer.json()["_id"]
            assert trace is request.extensions["trace"]
    assert ["sent", "answered 200, 19 left", "sent", "answered 200, 18 left"] == recorder.told
    assert 1 == events.count("connection.connect_tcp.complete")
    told = (
        "send_request_headers.started",
        "receive_response_headers.complete",
        "receive_response_body.complete",
    )
    for name in told:
        assert 2 == events.count(f"http11.{name}")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.anyio
async def test_the_request_is_left_as_it_was(*, fails: bool) -> None:
    """Without a trace of ours, or with the caller's own."""

    async def wire(request: httpx.Request) -> httpx.Response:
        if fails:
            raise httpx.ConnectError("no")
        return await depart_and_answer(request)

    async def trace(name: str, info: dict[str, Any]) -> None:
        """Take note of nothing."""

    for extensions in ({}, {"trace": trace}):
        request = httpx.Request("GET", URL, extensions=extensions)
        with contextlib.suppress(httpx.ConnectError):
            await layer(wire, Recorder()).handle_async_request(request)
        assert extensions.get("trace") is request.extensions.get("trace")
        assert set(extensions) == set(request.extensions) - {"lemcal_async"}


@pytest.mark.anyio
async def test_slow_connections_do_not_pile_up() -> None:
    """What counts is when requests leave: between grant and departure may lie more than a period."""
    dice, arrivals = random.Random(1), list[float]()

    async def connect_slowly(request: httpx.Request) -> httpx.Response:
        await anyio.sleep(dice.choice([0.0, 0.05, 0.15]))
        await depart(request)
        arrivals.append(anyio.current_time())
        await anyio.sleep(dice.random() * 0.02)
        return httpx.Response(200)

    transport = layer(connect_slowly, LocalRateLimiter(5, 0.1))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(transport.handle_async_request, request_of())
    assert 20 == len(arrivals)
    assert most_in(0.1, arrivals) <= 5


# Refusals.


@pytest.mark.anyio
async def test_a_refused_request_goes_before_later_ones() -> None:
    """Its turn comes again as soon as the server allows; the others come after, in their order."""
    seen: list[str] = []
    arrived, all_queued = anyio.Event(), anyio.Event()

    async def refuse_once(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        if len(seen) > 1:
            return await answer(request)
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
    assert ["/a", "/a", "/b", "/c", "/d"] == seen


@pytest.mark.anyio
async def test_a_queue_longer_than_the_deadline() -> None:
    """It raises at once, says both lengths, and when to try again."""
    recorder = Recorder(refusal=WouldWait(6.06, refused=False))
    async with AsyncLemcal(
        *ONE, transport=httpx.MockTransport(answer), limiter=recorder, deadline=5.0
    ) as lemcal:
        with pytest.raises(DeadlineExceededError) as caught:
            await lemcal.me()
    assert (
        "GET /me: the rate limiter's queue is 6.06 s long, but only 5 s are left until the deadline; "
        "allow more time, or send fewer calls at once"
    ) == str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert (6.06, "GET", "/me") == (caught.value.retry_after, caught.value.method, caught.value.route)
    assert (1, None, None) == (caught.value.attempts, caught.value.__cause__, caught.value.__context__)


@pytest.mark.anyio
async def test_a_deadline_that_has_passed() -> None:
    """No time is left, not less than none."""
    transport = layer(limiter=Recorder(refusal=WouldWait(0.5, refused=False)))
    with pytest.raises(DeadlineExceededError, match=r"0\.5 s long, but only 0 s are left"):
        await transport.handle_async_request(request_of(deadline=anyio.current_time() - 3.0))


@pytest.mark.anyio
async def test_a_key_that_is_refused_for_long() -> None:
    """It is the server's 429 that stands, for this call as for the one that met it."""
    recorder = Recorder(refusal=WouldWait(86_399.6, refused=True))
    async with AsyncLemcal(*ONE, transport=httpx.MockTransport(answer), limiter=recorder) as lemcal:
        with pytest.raises(RateLimitError) as caught:
            await lemcal.me()
    assert (
        "GET /me: the server rejects this key for another 86400 s (429); "
        "wait until then, and find out who else uses the key"
    ) == str(caught.value)
    error = caught.value
    assert (429, 86_399.6, 17, 0) == (error.status_code, error.retry_after, error.limit, error.remaining)
    assert (None, None) == (error.__cause__, error.__context__)


@pytest.mark.anyio
async def test_an_order_to_wait_for_a_day_meets_all_calls() -> None:
    """The one that gets it, those that are queued, and those that come."""
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
async def test_the_wait_is_counted() -> None:
    """Over all attempts of a call, and shown on errors."""
    recorder, request = Recorder(delay=0.05), request_of()
    await layer(limiter=recorder).handle_async_request(request)
    assert 0.04 < call_of(request).waited < 5.0
    recorder.refusal = WouldWait(6.06, refused=False)
    with pytest.raises(DeadlineExceededError) as caught:
        await layer(limiter=recorder).handle_async_request(request)
    assert 0.08 < caught.value.waited < 5.0
    assert caught.value.waited == pytest.approx(call_of(request).waited, abs=0.001)


@pytest.mark.anyio
async def test_closing_closes_what_is_below() -> None:
    """Transports own each other downwards, as in httpx."""
    closed: list[str] = []

    class Wire(httpx.AsyncBaseTransport):
        async def aclose(self) -> None:
            closed.append("wire")

    await RateLimitTransport(Wire()).aclose()
    assert ["wire"] == closed


# The whole, against a server that counts.


@pytest.mark.parametrize("window", ["fixed", "sliding"])
@pytest.mark.anyio
async def test_no_429_from_a_server_that_counts(window: WindowKind) -> None:
    """25 calls at once, at 5 in 0.2 s: all answered, none refused, however it counts."""
    with Sandbox(limit=5, period=0.2, window=window).serve() as sandbox:
        async with sandbox.client(limiter=LocalRateLimiter(5, 0.2), retry=RetryPolicy(attempts=1)) as lemcal:
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    for _ in range(25):
                        group.start_soon(lemcal.me)
        assert [200] * 25 == [request.status_code for request in sandbox.requests]
        # A server that counts in windows lets the end of one and the beginning of the next go together.
        at_most = 5 if window == "sliding" else 10
        assert 5 <= most_in(0.2, [request.at for request in sandbox.requests]) <= at_most


@attrs.define
class LapsedOnce(RecordedPermit):
    """A permit that has run out by the time its request is to leave."""

    def sent(self) -> bool:  # type: ignore[override]
        """Refuse to have it sent."""
        self.recorder.told.append("lapsed")
        return False


@attrs.define
class Lapsing(Recorder):
    """A limiter whose first permit runs out, as of a process that stood still."""

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - the protocol's
        again: Permit | None = None,
    ) -> Permit:
        """Grant a permit that has run out first, and a good one then."""
        await super().acquire(key, priority=priority, timeout=timeout, again=again)
        if len(self.permits) == 1:
            self.permits[0] = LapsedOnce(self)
        return self.permits[-1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "wire", [PooledTransport, HTTPX2Transport, AiohttpTransport, httpx.AsyncHTTPTransport]
)
async def test_14_13_a_permit_that_ran_out_sends_nothing(
    wire: Callable[[], httpx.AsyncBaseTransport], anyio_backend_name: str
) -> None:
    """The call asks again and goes first; the server sees one request, and the caller no error."""
    if wire is AiohttpTransport and anyio_backend_name == "trio":
        pytest.skip("aiohttp runs on asyncio only")
    limiter = Lapsing()
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
    assert [None, limiter.permits[0]] == [asked.again for asked in limiter.asked]
    assert ["lapsed", "unsent", "sent"] == limiter.told[:3]
