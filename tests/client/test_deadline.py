"""A deadline covers queue, retries and slow responses; a call known to miss its deadline fails at once."""

import gzip
import json
from collections.abc import AsyncIterator
from types import ModuleType

import anyio
import httpx
import pytest

from lemcal_async import RetryPolicy, _compression, _decoding
from lemcal_async.errors import AuthenticationError, DeadlineExceededError, LemcalError
from lemcal_async.ratelimit import Key, LocalRateLimiter, Permit, Priority, Unlimited
from lemcal_async.sandbox import Sandbox, faults

from .conftest import AT_ONCE, KEY, TARGET, Wire, check_plain, failing, responding, wait_for_requests

pytestmark = pytest.mark.anyio

AGAIN = "it may have been processed: check before you send it again"


class Stopwatch:
    """Measures seconds since its creation, on the event loop's clock."""

    def __init__(self) -> None:
        self._started = anyio.current_time()

    @property
    def seconds(self) -> float:
        """Seconds elapsed."""
        return anyio.current_time() - self._started


async def test_slow_response(lemcal_sandbox: Sandbox) -> None:
    """The call ends at its deadline with a TimeoutError."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(deadline=0.2) as lemcal:
        watch = Stopwatch()
        with pytest.raises(
            TimeoutError, match=r"^GET /me: no response within the deadline of 0\.2 s; allow more time$"
        ) as caught:
            await lemcal.me()
        assert 0.19 <= watch.seconds < 20
    error = caught.value
    assert isinstance(error, DeadlineExceededError)
    assert (None, 1, "GET", "/me", None) == (
        error.retry_after,
        error.attempts,
        error.method,
        error.route,
        error.status_code,
    )
    check_plain(error)


async def test_attempts_share_the_deadline(lemcal_sandbox: Sandbox) -> None:
    """Many short attempts together exceed the deadline."""
    lemcal_sandbox.inject(faults.slow(30), times=5)
    async with lemcal_sandbox.client(deadline=0.3, timeout=0.1, retry=AT_ONCE) as lemcal:
        watch = Stopwatch()
        with pytest.raises(
            DeadlineExceededError, match=r"the deadline of 0\.3 s \([23] attempts, "
        ) as caught:
            await lemcal.me()
        assert 0.29 <= watch.seconds < 20
    assert caught.value.attempts > 1
    check_plain(caught.value)


async def test_response_within_the_deadline(lemcal_sandbox: Sandbox) -> None:
    """A call with retries and a pause succeeds within its deadline."""
    lemcal_sandbox.inject(faults.status(500))
    lemcal_sandbox.inject(faults.too_many_requests("0.05"))
    async with lemcal_sandbox.client(deadline=10, retry=AT_ONCE) as lemcal:
        assert 12 == len(await lemcal.meetings.list())
    assert [500, 429, 200] == [seen.status_code for seen in lemcal_sandbox.requests]


async def test_queue_known_to_exceed_the_deadline(lemcal_sandbox: Sandbox) -> None:
    """The call fails at once, with ``retry_after`` set, and sends nothing."""
    limiter = LocalRateLimiter(limit=1, period=30)
    async with lemcal_sandbox.client(limiter=limiter) as lemcal:
        await lemcal.me()
        watch = Stopwatch()
        with pytest.raises(
            DeadlineExceededError, match=r"queue is [23]\d(\.\d)? s long, but only (10|\d\.\d+) s"
        ) as caught:
            await lemcal.with_options(deadline=10).meetings.list()
        assert watch.seconds < 9
    error = caught.value
    assert error.retry_after == pytest.approx(30, abs=2)
    assert ("GET", "/meetings", 0) == (error.method, error.route, lemcal.rate_limit.queued)
    assert 0 == error.attempts
    check_plain(error)
    assert 1 == len(lemcal_sandbox.requests)


async def test_error_reports_the_last_response(lemcal_sandbox: Sandbox) -> None:
    """The error contains the last response, whether the deadline or a retry's delay ended the call."""
    lemcal_sandbox.inject(faults.json_error(500, "boom"), times=9)
    slowly = RetryPolicy(backoff=30.0, backoff_max=30.0)
    async with lemcal_sandbox.client(deadline=10, retry=slowly) as lemcal:
        with pytest.raises(
            DeadlineExceededError, match=r"last attempt: 500 boom; allow more time, or try again later$"
        ) as caught:
            await lemcal.me()
    assert (500, "boom", 1) == (caught.value.status_code, caught.value.server_message, caught.value.attempts)
    check_plain(caught.value)
    lemcal_sandbox.clear_faults()
    async with lemcal_sandbox.client(deadline=0.3, retry=AT_ONCE) as lemcal:
        lemcal_sandbox.inject(faults.status(502))
        lemcal_sandbox.inject(faults.slow(30))
        with pytest.raises(
            DeadlineExceededError,
            match=r"within the deadline of 0\.3 s \(2 attempts, .*\); last attempt: 502",
        ) as caught:
            await lemcal.me()
    assert 502 == caught.value.status_code


async def test_error_reports_the_last_failure() -> None:
    """The error contains the last connection error or timeout."""
    for failure, text in (
        (httpx.ConnectError("refused"), "last attempt: refused"),
        (httpx.ReadTimeout(""), r"last attempt: waiting for the response took longer than 30 s \(timeout=\)"),
    ):
        lemcal = failing(failure).client(deadline=10, retry=RetryPolicy(backoff=30.0, backoff_max=30.0))
        with pytest.raises(DeadlineExceededError, match=text) as caught:
            await lemcal.me()
        assert (None, None) == (caught.value.status_code, caught.value.server_message)
        check_plain(caught.value)


async def test_last_response_is_redacted() -> None:
    """A key echoed in the last response is masked, as in every other error."""
    wire = responding(500, text=f"no such key {KEY}")
    lemcal = wire.client(deadline=10, retry=RetryPolicy(backoff=30.0, backoff_max=30.0))
    with pytest.raises(DeadlineExceededError, match=r"last attempt: 500 no such key \*\*\*;") as caught:
        await lemcal.me()
    assert "no such key ***" == caught.value.server_message


async def test_queue_within_the_deadline(lemcal_sandbox: Sandbox) -> None:
    """A call that can get its turn before the deadline waits for it."""
    limiter = LocalRateLimiter(limit=1, period=0.2)
    async with lemcal_sandbox.client(limiter=limiter, deadline=5) as lemcal:
        await lemcal.me()
        watch = Stopwatch()
        await lemcal.me()
        assert 0.1 <= watch.seconds < 5
    assert 2 == len(lemcal_sandbox.requests)


async def test_retry_delay_known_to_exceed_the_deadline(lemcal_sandbox: Sandbox) -> None:
    """If ``Retry-After`` exceeds the remaining time, the call fails at once."""
    lemcal_sandbox.inject(faults.status(503, headers={"Retry-After": "20"}))
    async with lemcal_sandbox.client(deadline=10) as lemcal:
        watch = Stopwatch()
        with pytest.raises(
            DeadlineExceededError, match="a retry would have to wait 20 s, but only"
        ) as caught:
            await lemcal.me()
        assert watch.seconds < 9
    assert (20, 1) == (caught.value.retry_after, caught.value.attempts)
    check_plain(caught.value)


@pytest.mark.parametrize("limited", [True, False])
async def test_pause_known_to_exceed_the_deadline(lemcal_sandbox: Sandbox, limited: bool) -> None:  # noqa: FBT001 - a case
    """After such a 429, the call fails at once, with and without a limiter."""
    lemcal_sandbox.inject(faults.too_many_requests("20"))
    limiter = None if limited else Unlimited()
    async with lemcal_sandbox.client(deadline=10, limiter=limiter) as lemcal:
        watch = Stopwatch()
        with pytest.raises(DeadlineExceededError) as caught:
            await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert watch.seconds < 9
    assert caught.value.retry_after == pytest.approx(20, abs=1)
    assert "processed" not in str(caught.value)
    check_plain(caught.value)


async def test_post_past_its_deadline(lemcal_sandbox: Sandbox) -> None:
    """The POST was sent, so the error says that it may have been processed."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(deadline=0.2) as lemcal:
        with pytest.raises(DeadlineExceededError, match=f"; {AGAIN}$") as caught:
            await lemcal.hooks.create(TARGET, any_meeting_type=True)
    check_plain(caught.value)
    assert 1 == len(lemcal_sandbox.hooks())


class GrantFirst(Unlimited):
    """A limiter that grants a fixed number of requests."""

    def __init__(self, requests: int) -> None:
        self._left = requests

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - the protocol's
        again: Permit | None = None,
    ) -> Permit:
        """Grant the request, or wait forever."""
        if not self._left:
            await anyio.sleep_forever()
        self._left -= 1
        return await super().acquire(key)


async def test_unsent_post() -> None:
    """A POST still queued at its deadline was not sent, and the error does not claim otherwise."""
    wire = Wire()
    with pytest.raises(
        DeadlineExceededError, match=r"0\.05 s; allow more time, or send fewer calls at once$"
    ) as caught:
        await wire.client(deadline=0.05, limiter=GrantFirst(0)).hooks.create(TARGET, any_meeting_type=True)
    check_plain(caught.value)
    assert [] == wire.requests
    assert 0 == caught.value.attempts


async def test_refused_post_that_is_queued_again() -> None:
    """A POST that was only refused was not processed."""
    wire = responding(429, headers={"Retry-After": "0"})
    lemcal = wire.client(deadline=0.05, limiter=GrantFirst(1), retry=AT_ONCE)
    with pytest.raises(DeadlineExceededError, match=r"deadline of 0\.05 s") as caught:
        await lemcal.hooks.create(TARGET, any_meeting_type=True)
    assert 1 == len(wire.requests) == caught.value.attempts
    assert "processed" not in str(caught.value)


async def test_within_a_longer_outer_timeout(lemcal_sandbox: Sandbox) -> None:
    """The call's own deadline applies, and the outer block continues."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(deadline=0.1) as lemcal:
        with anyio.fail_after(20):
            with pytest.raises(DeadlineExceededError):
                await lemcal.me()
            assert lemcal_sandbox.user_id == (await lemcal.with_options(deadline=5).me()).id


async def test_within_a_shorter_outer_timeout(lemcal_sandbox: Sandbox) -> None:
    """The caller's timeout raises a plain TimeoutError."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(deadline=20) as lemcal:
        with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.1):
            await lemcal.me()
        assert TimeoutError is type(caught.value)
        assert not isinstance(caught.value, LemcalError)
        assert lemcal_sandbox.user_id == (await lemcal.me()).id


async def test_canceled_calls_leak_nothing(lemcal_sandbox: Sandbox) -> None:
    """Canceled calls release their places in the queue and their connections, so the next call works."""
    lemcal_sandbox.inject(faults.slow(30), times=3)
    async with lemcal_sandbox.client() as lemcal:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(lemcal.me)
            await wait_for_requests(lemcal_sandbox, 3)
            group.cancel_scope.cancel()
        assert 0 == lemcal.rate_limit.queued
        assert lemcal_sandbox.user_id == (await lemcal.me()).id


async def test_each_call_has_its_own_deadline(lemcal_sandbox: Sandbox) -> None:
    """Of several concurrent calls of one client, only the slow one fails."""
    lemcal_sandbox.inject(faults.slow(30), path="/me")
    late: list[DeadlineExceededError] = []
    async with lemcal_sandbox.client(deadline=20) as lemcal:

        async def call() -> None:
            with pytest.raises(DeadlineExceededError) as caught:
                await lemcal.with_options(deadline=0.1).me()
            late.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            for _ in range(5):
                group.start_soon(lemcal.meetings.list)
    assert ["/me"] == [error.route for error in late]
    assert 5 == sum(seen.status_code == 200 for seen in lemcal_sandbox.requests)


@pytest.mark.parametrize("module", [_compression, _decoding])
async def test_decoding_counts_toward_the_deadline(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that arrives in time but takes too long to decompress or decode exceeds the deadline."""
    scopes: list[anyio.CancelScope] = []

    def bounded(seconds: float) -> anyio.CancelScope:
        scopes.append(anyio.CancelScope(deadline=anyio.current_time() + seconds))
        return scopes[-1]

    async def expire() -> None:
        scopes[0].deadline = anyio.current_time()  # expires now, however fast the machine is
        await anyio.sleep_forever()

    monkeypatch.setattr(anyio, "move_on_after", bounded)
    monkeypatch.setattr(module, "checkpoint", expire)
    monkeypatch.setattr(_decoding, "_TURN", 0.0)
    body = gzip.compress(json.dumps([{"_id": f"mee_{number}"} for number in range(200_000)]).encode())

    class Parts(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield body

    headers = {"Content-Encoding": "gzip"}
    wire = Wire(lambda _: httpx.Response(200, headers=headers, stream=Parts()))
    with pytest.raises(DeadlineExceededError, match="within the deadline of 60 s") as caught:
        await wire.client(deadline=60).meetings.list()
    check_plain(caught.value)
    if module is _decoding:
        assert 200 == caught.value.status_code
        assert "GET /meetings: the response arrived, but was not decoded" in str(caught.value)


async def test_rotation_does_not_extend_the_deadline() -> None:
    """A call that starts over with a new key has only the remaining time."""
    keys = iter(["old", "new"])
    deadlines: list[float] = []

    async def refuse(request: httpx.Request) -> httpx.Response:
        deadlines.append(anyio.current_effective_deadline())
        return httpx.Response(401)

    lemcal = Wire().client(api_key=lambda: next(keys), deadline=30, transport=httpx.MockTransport(refuse))
    with pytest.raises(AuthenticationError):
        await lemcal.me()
    first, second = deadlines
    assert first == second < anyio.current_time() + 30
