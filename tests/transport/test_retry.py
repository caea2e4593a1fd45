"""The retry layer: what it repeats, how long it waits, and how much of an answer it reads."""

import asyncio
import gc
import gzip
import logging
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpcore
import httpx
import pytest
import respx
import tenacity

from lemcal_async import RetryPolicy
from lemcal_async.errors import DeadlineExceededError, ResponseDecodeError
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox.faults import Fault
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport, _layers
from lemcal_async.transport._call import CallState, call_of, extension

from .conftest import MakeWire
from .loopback import Loopback

QUICK = RetryPolicy(backoff=0.01)
HOOK = {"targetUrl": "https://example.com/hook", "anyMeetingType": True}
URL = "https://lemcal.example.com/me"
OWN = {"Retry-After": "0.01", "X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0"}

REFUSED = httpx.ConnectError("refused")
CONNECTING_TOOK_LONG = httpx.ConnectTimeout("slow")
NO_CONNECTION_FREE = httpx.PoolTimeout("full")
PROXY_FAILED = httpx.ProxyError("502 Bad Gateway")
BROKEN = httpx.ReadError("reset")
ANSWER_TOOK_LONG = httpx.ReadTimeout("slow")
SENDING_BROKE = httpx.WriteError("reset")
NO_HTTP = httpx.RemoteProtocolError("not HTTP")
UNPACKING_FAILED = httpx.DecodingError("not gzip")
OUR_FAULT = httpx.LocalProtocolError("a header with a line break")
NO_SUCH_SCHEME = httpx.UnsupportedProtocol("ftp")

UNSENT = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError

Outcome = httpx.Response | Exception


class Script(httpx.AsyncBaseTransport):
    """A wire on which each attempt ends as written; it reports its sending, unless told otherwise."""

    def __init__(self, *outcomes: Outcome, reports_sending: bool = True) -> None:
        self._outcomes = iter(outcomes)
        self.reports_sending = reports_sending
        self.attempts = 0
        self.bodies: list[bytes] = []
        self.entered = False
        self.closed = False

    async def __aenter__(self) -> Self:
        """Note it."""
        self.entered = True
        return self

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Take the next outcome."""
        self.attempts += 1
        self.bodies.append(b"".join([part async for part in request.stream]))  # type: ignore[union-attr]  # async
        outcome = next(self._outcomes)
        if not isinstance(outcome, UNSENT) and "trace" in request.extensions:
            info = {"request": httpcore.Request(request.method, URL, extensions=request.extensions)}
            await request.extensions["trace"]("http11.send_request_headers.started", info)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        """Note it."""
        self.closed = True


def connect(make_wire: MakeWire, sandbox: Sandbox, policy: RetryPolicy = QUICK) -> httpx.AsyncClient:
    """Return a plain client with the retry layer on a real wire."""
    return httpx.AsyncClient(
        transport=RetryTransport(make_wire(), policy),
        base_url=sandbox.base_url,
        auth=(sandbox.user_id, sandbox.api_key),
    )


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Serve a sandbox without a rate limit, which is another layer's."""
    with Sandbox(limit=None).serve() as sandbox:
        yield sandbox


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let all waits end at once, and return how long they would have been."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)
    return slept


def request_of_client(method: str = "GET") -> httpx.Request:
    """Return a request as ``AsyncLemcal`` makes it."""
    return httpx.Request(method, URL, extensions=extension(CallState(method, "/me", redact=str)))


async def send(
    wire: httpx.AsyncBaseTransport, policy: RetryPolicy = QUICK, method: str = "GET", **options: Any
) -> httpx.Response:
    """Send one request through the retry layer."""
    layer = RetryTransport(wire, policy, **options)
    return await layer.handle_async_request(httpx.Request(method, URL))


# Real faults of a real server. A POST is repeated only where the server has refused it.
@pytest.mark.parametrize(
    ("fault", "get", "post"),
    [
        (faults.too_many_requests("0.01"), [429, 200], [429, 200]),
        (faults.too_many_requests(None), [429, 200], [429, 200]),
        (faults.status(503, headers=OWN), [503, 200], [503, 200]),
        (faults.status(503, headers={"Retry-After": "0.01"}), [503, 200], [503]),  # a proxy's
        (faults.status(500), [500, 200], [500]),
        (faults.html_error(502), [502, 200], [502]),
        (faults.status(504), [504, 200], [504]),
        (faults.truncated(), [200, 200], [200]),
        (faults.reset_before_processing(), [None, 200], [None]),
        (faults.reset_after_processing(), [None, 200], [None]),
        (faults.status(400), [400], [400]),
        (faults.status(401), [401], [401]),
        (faults.status(409), [409], [409]),
        (faults.redirect("/api/lemcal/meetings"), [302], [302]),
        (faults.html_200(), [200], [200]),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.anyio
async def test_what_is_repeated(
    *,
    make_wire: MakeWire,
    sandbox: Sandbox,
    fault: Fault,
    get: list[int | None],
    post: list[int | None],
    method: str,
) -> None:
    """By the answers that the server gave, None for none."""
    sandbox.inject(fault)
    expected = get if method == "GET" else post
    broken = isinstance(fault, faults.Reset | faults.Truncated)
    async with connect(make_wire, sandbox) as client:
        if method == "GET":
            assert expected[-1] == (await client.get("/me")).status_code
        elif broken:
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await client.post("/hooks", json=HOOK)
        else:
            assert expected[-1] == (await client.post("/hooks", json=HOOK)).status_code
    assert expected == [seen.status_code for seen in sandbox.requests]


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        (faults.too_many_requests("0.01"), [429, 204]),
        (faults.status(503), [503, 204]),
        (faults.status(500), [500, 204]),
        (faults.reset_before_processing(), [None, 204]),
        # The first attempt did it, and the second finds nothing left.
        (faults.reset_after_processing(), [None, 404]),
        (faults.truncated(), [204, 404]),
    ],
)
@pytest.mark.anyio
async def test_a_delete_is_repeated_until_it_is_done(
    make_wire: MakeWire, sandbox: Sandbox, fault: Fault, statuses: list[int | None]
) -> None:
    """That its retry finds nothing is the success of an earlier attempt."""
    async with connect(make_wire, sandbox) as client:
        hook = (await client.post("/hooks", json=HOOK)).json()
        sandbox.inject(fault)
        answer = await client.delete(f"/hooks/{hook['_id']}")
    assert (204, b"") == (answer.status_code, answer.content)
    assert statuses == [seen.status_code for seen in sandbox.requests[1:]]
    assert [] == sandbox.hooks()


@pytest.mark.anyio
async def test_a_delete_that_finds_nothing_at_once(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """It has not succeeded."""
    async with connect(make_wire, sandbox) as client:
        answer = await client.delete("/hooks/hoo_unknown")
    assert 404 == answer.status_code


@pytest.mark.anyio
async def test_a_get_whose_retry_finds_nothing() -> None:
    """It has not succeeded either."""
    assert 404 == (await send(Script(httpx.Response(503), httpx.Response(404)))).status_code


@pytest.mark.parametrize(
    ("error", "get", "post"),
    [
        (REFUSED, 2, 2),
        (CONNECTING_TOOK_LONG, 2, 2),
        (NO_CONNECTION_FREE, 2, 2),
        (PROXY_FAILED, 2, 2),
        (BROKEN, 2, 1),
        (SENDING_BROKE, 2, 1),
        (ANSWER_TOOK_LONG, 2, 1),
        (NO_HTTP, 2, 1),
        (UNPACKING_FAILED, 1, 1),
        (OUR_FAULT, 1, 1),
        (NO_SUCH_SCHEME, 1, 1),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
@pytest.mark.anyio
async def test_attempts_by_error(error: httpx.RequestError, get: int, post: int, method: str) -> None:
    """What was never sent is repeated for every method, what may have been processed for two."""
    wire = Script(error, httpx.Response(200))
    expected = get if method in {"GET", "DELETE"} else post
    if expected == 2:
        assert 200 == (await send(wire, method=method)).status_code
    else:
        with pytest.raises(type(error)) as caught:
            await send(wire, method=method)
        assert caught.value is error
    assert expected == wire.attempts


@pytest.mark.parametrize("error", [REFUSED, CONNECTING_TOOK_LONG, NO_CONNECTION_FREE, PROXY_FAILED])
@pytest.mark.parametrize(("method", "attempts"), [("GET", 2), ("DELETE", 2), ("POST", 1), ("PUT", 1)])
@pytest.mark.anyio
async def test_a_wire_that_proves_nothing(error: httpx.RequestError, method: str, attempts: int) -> None:
    """Its failures to connect may be resets after the server has acted: some wires call those so, too."""
    wire = Script(error, httpx.Response(200), reports_sending=False)
    request = httpx.Request(method, URL)
    if attempts == 2:
        assert 200 == (await RetryTransport(wire, QUICK).handle_async_request(request)).status_code
    else:
        with pytest.raises(type(error)):
            await RetryTransport(wire, QUICK).handle_async_request(request)
    assert (attempts, True) == (wire.attempts, call_of(request).sent)


@pytest.mark.parametrize(
    ("status", "headers", "sent"),
    [
        *[(200, OWN, True), (404, OWN, True), (500, OWN, True), (503, {}, True)],
        *[(401, OWN, False), (429, OWN, False), (429, {}, False), (503, OWN, False)],
    ],
)
@pytest.mark.anyio
async def test_what_an_answer_says_of_the_request(
    status: int, headers: dict[str, str], *, sent: bool
) -> None:
    """Refusals have changed nothing; after any other answer the request may have been carried out."""
    request = httpx.Request("POST", URL)
    wire = Script(httpx.Response(status, headers=headers))
    await RetryTransport(wire, RetryPolicy(attempts=1)).handle_async_request(request)
    assert (sent, False) == (call_of(request).sent, call_of(request).maybe_processed)


@pytest.mark.anyio
async def test_a_wire_that_proves_it_by_its_events() -> None:
    """One that has reported of this attempt that it connects, and not that it sends."""

    class Connecting(Script):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.extensions["trace"]("connection.connect_tcp.started", {})
            return await super().handle_async_request(request)

    wire = Connecting(REFUSED, httpx.Response(200), reports_sending=False)
    assert 200 == (await send(wire, method="POST")).status_code


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ZeroDivisionError("no"), httpx.TransportError, "ZeroDivisionError: no"),
        (OSError(5, "wire cut"), httpx.NetworkError, "OSError: [Errno 5] wire cut"),
        (TimeoutError(), httpx.NetworkError, "TimeoutError: "),
    ],
)
@pytest.mark.parametrize(("method", "attempts"), [("GET", 2), ("POST", 1)])
@pytest.mark.anyio
async def test_what_other_libraries_raise(
    error: Exception, kind: type[Exception], text: str, method: str, attempts: int
) -> None:
    """It becomes an error of httpx, and is retried as what may have been processed."""
    wire = Script(*[error] * attempts)
    layer = RetryTransport(wire, RetryPolicy(attempts=2, backoff=0))
    with pytest.raises(kind) as caught:
        await layer.handle_async_request(request_of_client(method))
    assert (kind, text, attempts) == (type(caught.value), str(caught.value), wire.attempts)


@pytest.mark.anyio
async def test_what_an_app_raises_in_a_plain_client() -> None:
    """It passes as it is, with its traceback: a test of the app wants to see it."""

    async def app(*_: Any) -> None:
        raise ZeroDivisionError

    layers = RetryTransport(RateLimitTransport(httpx.ASGITransport(app), Unlimited()), QUICK)
    async with httpx.AsyncClient(transport=layers) as client:
        with pytest.raises(ZeroDivisionError) as caught:
            await client.get(URL)
    assert "app" == caught.traceback[-1].name


@pytest.mark.anyio
async def test_an_assertion_passes() -> None:
    """A mock transport makes it, for the test that it is part of."""
    wire = Script(AssertionError("not mocked"))
    with pytest.raises(AssertionError, match="not mocked"):
        await send(wire)
    assert 1 == wire.attempts


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_wire_that_cancels_by_itself() -> None:
    """Nobody asked for it, so it is a failure, and does not end the task."""

    class Canceling(Script):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.attempts == 0:
                self.attempts += 1
                raise asyncio.CancelledError
            return await super().handle_async_request(request)

    wire = Canceling(httpx.Response(200))
    answer = await RetryTransport(wire, QUICK).handle_async_request(request_of_client())
    assert 200 == answer.status_code
    assert 2 == wire.attempts


@pytest.mark.parametrize(
    ("first", "body", "done"),
    [
        (httpx.Response(500), b"hook not found", True),
        (httpx.Response(500), b'{"error": "Hook not found"}', True),
        (httpx.Response(502), b"", True),
        (BROKEN, b"hook not found", True),
        (httpx.Response(503, headers={"Retry-After": "0"}), b"", True),  # a proxy's
        (httpx.Response(500), b"API key not found", False),
        (httpx.Response(500), b"<html><title>404 Not Found</title></html>", False),
        (httpx.Response(500), b"Not Found", False),
        (httpx.Response(429, headers=OWN), b"hook not found", False),
        (httpx.Response(503, headers=OWN), b"hook not found", False),
        (REFUSED, b"", False),
    ],
)
@pytest.mark.anyio
async def test_a_delete_whose_retry_finds_nothing(first: Outcome, body: bytes, *, done: bool) -> None:
    """It has succeeded if an earlier attempt may have been processed, and the service says what is gone."""
    answer = await send(Script(first, httpx.Response(404, content=body)), method="DELETE")
    assert (204 if done else 404) == answer.status_code


@pytest.mark.anyio
async def test_nobody_listens(make_wire: MakeWire) -> None:
    """The last attempt's error is raised, after as many as allowed."""
    with Loopback() as server:
        pass
    request = httpx.Request("POST", server.url)
    async with RetryTransport(make_wire(), RetryPolicy(attempts=3, backoff=0.01)) as layer:
        with pytest.raises(httpx.ConnectError):
            await layer.handle_async_request(request)
    assert 3 == call_of(request).attempts


@pytest.mark.anyio
async def test_the_last_answer_is_returned(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """After as many attempts as allowed."""
    sandbox.inject(faults.status(502), times=2)
    sandbox.inject(faults.status(503, "the last"))
    async with connect(make_wire, sandbox, RetryPolicy(attempts=3, backoff=0.01)) as client:
        answer = await client.get("/me")
    assert (503, "the last") == (answer.status_code, answer.text)
    assert 3 == len(sandbox.requests)


@pytest.mark.parametrize("outcome", [httpx.Response(429), httpx.Response(503), REFUSED])
@pytest.mark.anyio
async def test_one_attempt_means_no_retries(outcome: Outcome) -> None:
    """Whatever it ends with."""
    wire = Script(outcome)
    if isinstance(outcome, httpx.Response):
        assert outcome is await send(wire, RetryPolicy(attempts=1))
    else:
        with pytest.raises(httpx.ConnectError):
            await send(wire, RetryPolicy(attempts=1))
    assert 1 == wire.attempts


@pytest.mark.anyio
async def test_the_policy_of_the_call_wins() -> None:
    """Over that of the transport."""
    wire = Script(httpx.Response(503), httpx.Response(200))
    call = CallState("GET", "/me", retry=RetryPolicy(attempts=1))
    request = httpx.Request("GET", URL, extensions=extension(call))
    assert 503 == (await RetryTransport(wire, QUICK).handle_async_request(request)).status_code
    assert 1 == call.attempts


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "1.283"}, 1.283, 1.283),
        ({"Retry-After": "2"}, 2, 2),
        ({"Retry-After": "0"}, 0, 0),
        (
            {"Retry-After": "2, Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)"},
            2,
            2,
        ),
        (
            {"Retry-After": "Tue, 16 Feb 2021 08:02:42 GMT", "Date": "Tue, 16 Feb 2021 08:02:35 GMT"},
            7,
            7,
        ),
        ({"Retry-After": "Tue, 16 Feb 2021 08:02:42 GMT"}, 0.2, 0.4),
        ({"Retry-After": "soon"}, 0.2, 0.4),
        ({}, 0.2, 0.4),
    ],
)
@pytest.mark.anyio
async def test_the_wait_after_a_429(
    slept: list[float], headers: dict[str, str], least: float, most: float
) -> None:
    """As long as Retry-After says, whatever its form; the backoff when it says nothing."""
    wire = Script(httpx.Response(429, headers=headers), httpx.Response(200))
    assert 200 == (await send(wire, RetryPolicy(backoff=0.4), "POST")).status_code
    (wait,) = slept
    assert least <= wait <= most


@pytest.mark.parametrize(("retry_after", "least", "most"), [("0.01", 0.2, 0.4), ("1.5", 1.5, 1.5)])
@pytest.mark.anyio
async def test_the_wait_after_a_503(slept: list[float], retry_after: str, least: float, most: float) -> None:
    """The longer of Retry-After, which every answer carries, and the backoff."""
    wire = Script(httpx.Response(503, headers={"Retry-After": retry_after}), httpx.Response(200))
    await send(wire, RetryPolicy(backoff=0.4))
    (wait,) = slept
    assert least <= wait <= most


@pytest.mark.parametrize("outcome", [httpx.Response(500, headers={"Retry-After": "1.5"}), BROKEN])
@pytest.mark.anyio
async def test_the_wait_after_other_failures(slept: list[float], outcome: Outcome) -> None:
    """It doubles up to its bound, half of it at random; Retry-After is no order there."""
    await send(Script(*[outcome] * 4, httpx.Response(200)), RetryPolicy(backoff=0.1, backoff_max=0.3))
    for full, wait in zip([0.1, 0.2, 0.3, 0.3], slept, strict=True):
        assert full / 2 <= wait <= full


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.anyio
async def test_a_retry_after_above_the_longest_wait(slept: list[float], status: int) -> None:
    """It is returned at once, with the value on it."""
    wire = Script(httpx.Response(status, headers={"Retry-After": "61"}))
    answer = await send(wire, RetryPolicy(max_wait=60))
    assert (status, "61") == (answer.status_code, answer.headers["retry-after"])
    assert [] == slept


@pytest.mark.anyio
async def test_what_the_limiter_holds_is_not_waited_twice(slept: list[float]) -> None:
    """The layer below makes the request wait for that long anyway."""

    class Limiting(Script):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            call_of(request).paused_for = 0.3 if self.attempts == 0 else 9
            return await super().handle_async_request(request)

    refused = httpx.Response(429, headers={"Retry-After": "0.5"})
    await send(Limiting(refused, refused, httpx.Response(200)))
    assert [pytest.approx(0.2), 0] == slept


@pytest.mark.anyio
async def test_below_it_the_limiter_waits(make_wire: MakeWire, sandbox: Sandbox, slept: list[float]) -> None:
    """With the rate limit between, a 429 is waited out there, for as long as it says, and not here, too."""
    sandbox.inject(faults.too_many_requests("0.2"))
    transport = RetryTransport(RateLimitTransport(make_wire(), LocalRateLimiter()), QUICK)
    async with httpx.AsyncClient(
        transport=transport, base_url=sandbox.base_url, auth=(sandbox.user_id, sandbox.api_key)
    ) as client:
        assert 200 == (await client.get("/me")).status_code
    first, second = (seen.at for seen in sandbox.requests)
    assert 0.2 <= second - first
    assert 0.0 == max(slept)


@pytest.mark.anyio
async def test_a_retry_that_the_deadline_does_not_allow(slept: list[float]) -> None:
    """It is refused at once, and says after what time there is a chance."""
    call = CallState("GET", "/me", deadline=anyio.current_time() + 5)
    request = httpx.Request("GET", URL, extensions=extension(call))
    wire = Script(
        httpx.Response(429, headers={"Retry-After": "1"}), httpx.Response(429, headers={"Retry-After": "8"})
    )
    with pytest.raises(DeadlineExceededError, match=r"GET /me: .* wait 8 s, but only [45]") as caught:
        await RetryTransport(wire, QUICK).handle_async_request(request)
    error = caught.value
    assert (8, 2, 1) == (error.retry_after, error.attempts, error.waited)
    assert (None, None) == (error.__cause__, error.__context__)
    assert [1] == slept


@pytest.mark.anyio
async def test_a_deadline_that_allows_the_retry(slept: list[float]) -> None:
    """It changes nothing."""
    call = CallState("GET", "/me", deadline=anyio.current_time() + 5)
    request = httpx.Request("GET", URL, extensions=extension(call))
    wire = Script(httpx.Response(429, headers={"Retry-After": "1"}), httpx.Response(200))
    assert 200 == (await RetryTransport(wire, QUICK).handle_async_request(request)).status_code
    assert ([1], 1) == (slept, call.waited)


@pytest.mark.anyio
async def test_no_wait_is_left_behind() -> None:
    """Canceled while it waits, it ends at once and does not try again."""
    wire = Script(httpx.Response(429, headers={"Retry-After": "30"}))
    with anyio.move_on_after(0.05) as scope:
        await send(wire)
    assert scope.cancelled_caught
    assert 1 == wire.attempts


async def parts() -> AsyncIterator[bytes]:
    """Make a body that can be read once."""
    yield b'{"targetUrl": "https://example.com/parts",'
    yield b'"anyMeetingType": true}'


@pytest.mark.parametrize(
    ("body", "target"),
    [({"json": HOOK}, "https://example.com/hook"), ({"content": parts}, "https://example.com/parts")],
)
@pytest.mark.anyio
async def test_the_body_is_sent_again(
    make_wire: MakeWire, sandbox: Sandbox, body: dict[str, Any], target: str
) -> None:
    """Whole, even if it can be read only once."""
    sandbox.inject(faults.too_many_requests("0.01"), times=2)
    body = {name: value() if callable(value) else value for name, value in body.items()}
    async with connect(make_wire, sandbox) as client:
        answer = await client.post("/hooks", **body)
    assert 200 == answer.status_code
    assert [target] == [hook["targetUrl"] for hook in sandbox.hooks()]
    assert [429, 429, 200] == [seen.status_code for seen in sandbox.requests]


@pytest.mark.anyio
async def test_every_attempt_has_the_same_body() -> None:
    """To the byte."""
    wire = Script(httpx.Response(429), REFUSED, httpx.Response(200))
    await RetryTransport(wire, QUICK).handle_async_request(httpx.Request("POST", URL, content=parts()))
    assert 1 == len(set(wire.bodies))
    assert b'{"targetUrl": "https://example.com/parts","anyMeetingType": true}' == wire.bodies[0]


@pytest.mark.parametrize("body", [b"", bytes(3000)])
@pytest.mark.anyio
async def test_a_compressed_answer(body: bytes) -> None:
    """It is decoded, and its headers no longer say otherwise."""
    packed = gzip.compress(body)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(packed)), "X-Kept": "yes"}
    wire = Script(httpx.Response(200, headers=headers, stream=Stream(packed)))
    answer = await send(wire)
    assert body == answer.content
    assert ("yes", None, None) == (
        answer.headers["x-kept"],
        answer.headers.get("content-length"),
        answer.headers.get("content-encoding"),
    )


class Stream(httpx.AsyncByteStream):
    """A body that comes in parts."""

    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def aclose(self) -> None:
        """Note it."""
        self.closed = True


@pytest.mark.anyio
async def test_compressed_on_the_wire(make_wire: MakeWire, server: Loopback) -> None:
    """The connection is used again afterward."""
    async with httpx.AsyncClient(transport=RetryTransport(make_wire())) as client:
        answers = [await client.get(f"{server.url}/gzip/5000") for _ in range(2)]
    assert [bytes(5000)] * 2 == [answer.content for answer in answers]
    assert [1, 1] == server.connections


@pytest.mark.parametrize(
    ("encoding", "body", "match"),
    [
        ("gzip", b"no gzip", "not gzip, contrary to its header"),
        ("gzip", gzip.compress(bytes(3000), mtime=0)[:-9], "is truncated"),
        ("br", b"\x0b\x02\x80", "compressed with br, not gzip or deflate as requested"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "compressed with gzip, gzip"),
    ],
)
@pytest.mark.anyio
async def test_what_cannot_be_decompressed(encoding: str, body: bytes, match: str) -> None:
    """It is an answer, so asking again would be no use; of a failure, the status is told all the same."""
    headers = {"Content-Encoding": encoding}
    wire = Script(httpx.Response(200, headers=headers, stream=Stream(body)))
    with pytest.raises(ResponseDecodeError, match=match) as caught:
        await send(wire)
    assert (1, 200) == (wire.attempts, caught.value.status_code)
    answer = await send(Script(httpx.Response(400, headers=headers, stream=Stream(body))))
    assert (400, b"") == (answer.status_code, answer.content)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("text", [b'{"_id": "usr_1"}', b"[1, 2]", b'"text"'])
@pytest.mark.anyio
async def test_a_body_that_the_wire_has_decompressed(encoding: str, text: bytes) -> None:
    """Some leave the header as it was. It is not decompressed once more."""
    headers = {"Content-Encoding": encoding}
    answer = await send(Script(httpx.Response(200, headers=headers, stream=Stream(text))))
    assert (text, None) == (answer.content, answer.headers.get("content-encoding"))


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(b"[" * 3000, mtime=0), zlib.compress(b"[" * 3000), zlib.compress(b"[" * 3000)[2:-4]],
)
@pytest.mark.anyio
async def test_each_kind_of_compression(packed: bytes) -> None:
    """Called deflate, it comes with a header or without."""
    encoding = "gzip" if packed[:2] == b"\x1f\x8b" else "deflate"
    answer = await send(
        Script(httpx.Response(200, headers={"Content-Encoding": encoding}, stream=Stream(packed)))
    )
    assert b"[" * 3000 == answer.content


@pytest.mark.anyio
async def test_headers_that_are_not_ascii() -> None:
    """Those of a compressed answer are passed on to the byte."""
    city = (b"X-City", "Zürich".encode("latin-1"))
    headers = [(b"Content-Encoding", b"gzip"), city]
    answer = await send(Script(httpx.Response(200, headers=headers, stream=Stream(gzip.compress(b"{}")))))
    assert (b"{}", [city]) == (answer.content, answer.headers.raw)


@pytest.mark.anyio
async def test_another_encoding_that_the_client_asked_for() -> None:
    """A plain client with brotli reads it by itself."""
    response = httpx.Response(200, headers={"Content-Encoding": "br"}, stream=Stream(b"\x0b\x02\x80"))
    request = httpx.Request("GET", URL, headers={"Accept-Encoding": "gzip, br"})
    answer = await RetryTransport(Script(response), QUICK).handle_async_request(request)
    assert b"\x0b\x02\x80" == b"".join([part async for part in answer.aiter_raw()])
    assert "br" == answer.headers["content-encoding"]


@pytest.mark.anyio
async def test_a_plain_client_knows_how_long_it_took() -> None:
    """Although the answer is read before the client starts its clock."""
    wire = Script(httpx.Response(200, stream=Stream(b"{}")), httpx.Response(200, content=b"{}"))
    async with httpx.AsyncClient(transport=RetryTransport(wire)) as client:
        for _ in range(2):
            assert 0 < (await client.get(URL)).elapsed.total_seconds() < 60


@pytest.mark.anyio
async def test_a_body_that_breaks() -> None:
    """It is closed, and counts as a failure of the attempt."""
    stream = Stream(b"{", BROKEN)
    wire = Script(httpx.Response(200, stream=stream), httpx.Response(200, content=b"{}"))
    assert b"{}" == (await send(wire)).content
    assert stream.closed


@pytest.mark.parametrize("size", [1000, 1001])
@pytest.mark.anyio
async def test_the_bound_itself_is_allowed(make_wire: MakeWire, server: Loopback, size: int) -> None:
    """One byte more is not."""
    async with httpx.AsyncClient(transport=RetryTransport(make_wire(), max_response_bytes=1000)) as client:
        if size > 1000:
            with pytest.raises(ResponseDecodeError, match="over 1000 bytes"):
                await client.get(f"{server.url}/gzip/{size}")
        else:
            assert bytes(size) == (await client.get(f"{server.url}/gzip/{size}")).content


@pytest.mark.parametrize(
    ("path", "bound", "connections"),
    [
        ("/endless", 100, [1, 2]),
        ("/endless", 3_000_000, [1, 2]),
        ("/gzip/30000000", 1_000_000, [1, 1]),  # came whole: only what it would become is too large
        ("/gzip/30000000", 10_000, [1, 2]),
    ],
)
@pytest.mark.anyio
async def test_too_large_an_answer(
    make_wire: MakeWire, server: Loopback, path: str, bound: int, connections: list[int]
) -> None:
    """Refused without a retry; no connection and no half-read generator is left behind."""
    async with make_wire(max_connections=1) as pool:
        layer = RetryTransport(pool, QUICK, max_response_bytes=bound)
        request = httpx.Request("GET", server.url + path)
        with pytest.raises(ResponseDecodeError, match=f"over {bound} bytes") as caught:
            await layer.handle_async_request(request)
        assert (1, "GET", path) == (caught.value.attempts, caught.value.method, caught.value.route)
        del caught, request
        gc.collect()
        await anyio.lowlevel.checkpoint()
        answer = await layer.handle_async_request(httpx.Request("GET", server.url))
        assert b"{}" == answer.content
        assert 1 == await anyio.to_thread.run_sync(lambda: server.settled(most=1))
    assert connections == server.connections


@pytest.mark.parametrize(("layers", "match"), [(1, "over 100000 bytes"), (2, "with gzip, gzip, not")])
@pytest.mark.anyio
async def test_a_bomb(layers: int, match: str) -> None:
    """However often it is compressed, what it would become does not fill the memory."""
    body = bytes(30_000_000)
    for _ in range(layers):
        body = gzip.compress(body)
    stream = Stream(*(body[at : at + 1000] for at in range(0, len(body), 1000)))
    headers = {"Content-Encoding": ", ".join(["gzip"] * layers)}
    wire = Script(httpx.Response(200, headers=headers, stream=stream))
    tracemalloc.start()
    try:
        with pytest.raises(ResponseDecodeError, match=match):
            await send(wire, max_response_bytes=100_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
    assert 1 == wire.attempts


@pytest.mark.anyio
async def test_too_large_an_answer_from_memory() -> None:
    """A transport that has read it already makes no difference."""
    with pytest.raises(ResponseDecodeError, match="over 3 bytes"):
        await send(Script(httpx.Response(200, content=b"1234")), max_response_bytes=3)


@pytest.mark.anyio
async def test_too_large_an_answer_of_another_transport() -> None:
    """A body that goes on for ever, closed or not, is not read for ever."""

    class Endless(httpx.AsyncByteStream):
        closed = False

        def __aiter__(self) -> "Endless":
            return self

        async def __anext__(self) -> bytes:
            return bytes(1000)

        async def aclose(self) -> None:
            self.closed = True

    stream = Endless()
    with anyio.fail_after(5), pytest.raises(ResponseDecodeError, match="over 3000 bytes"):
        await send(Script(httpx.Response(200, stream=stream)), max_response_bytes=3000)
    assert stream.closed


@pytest.mark.parametrize(("failures", "made"), [(0, 0), (1, 1), (3, 1)])
@pytest.mark.anyio
async def test_a_retry_object_is_made_when_there_is_something_to_retry(
    monkeypatch: pytest.MonkeyPatch, failures: int, made: int
) -> None:
    """It costs more than all the rest of a call; and one serves all attempts of one call."""
    count = 0

    class Counting(tenacity.AsyncRetrying):
        def __init__(self, **options: Any) -> None:
            nonlocal count
            count += 1
            super().__init__(**options)

    monkeypatch.setattr(tenacity, "AsyncRetrying", Counting)
    await send(Script(*[REFUSED] * failures, httpx.Response(200)))
    assert made == count


def test_there_is_no_wait_before_an_attempt() -> None:
    """Should tenacity ever ask for it, that is an error, and no wait of 0 s."""
    state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
    with pytest.raises(RuntimeError, match="no attempt"):
        _layers._attempt_of(state)


@pytest.mark.anyio
async def test_calls_do_not_mix(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """Each of many at once has its own count of attempts."""
    sandbox.inject(faults.status(503), times=60)
    requests = [httpx.Request("GET", f"{sandbox.base_url}/me") for _ in range(30)]
    policy = RetryPolicy(attempts=50, backoff=0.001)
    async with RetryTransport(make_wire(), policy) as layer, anyio.create_task_group() as group:
        for request in requests:
            group.start_soon(layer.handle_async_request, request)
    assert 90 == sum(call_of(request).attempts for request in requests) == len(sandbox.requests)


@pytest.mark.anyio
async def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each retry, one line, at INFO."""
    caplog.set_level(logging.INFO, "lemcal_async.retry")
    await send(Script(REFUSED, httpx.Response(503), httpx.Response(200)), RetryPolicy(attempts=4, backoff=0))
    assert [
        "GET /me: ConnectError on attempt 1 of 4; retrying in 0 s",
        "GET /me: 503 on attempt 2 of 4; retrying in 0 s",
    ] == caplog.messages


@pytest.mark.anyio
async def test_closing_closes_what_is_below() -> None:
    """Transports own each other downwards, as in httpx; and they are entered so."""
    wire = Script()
    await RetryTransport(RateLimitTransport(wire)).aclose()
    assert (False, True) == (wire.entered, wire.closed)
    wire = Script()
    async with RetryTransport(RateLimitTransport(wire)):
        assert (True, False) == (wire.entered, wire.closed)
    assert wire.closed


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    """Stand in for the network below the wire."""
    with respx.mock(using="httpcore") as router:
        yield router


@pytest.mark.anyio
async def test_all_layers_in_a_plain_client(router: respx.MockRouter) -> None:
    """They fit any client; and tests of others mock the network below them as they are used to."""
    route = router.get(URL).mock(
        side_effect=[httpx.ConnectError, httpx.Response(502), httpx.Response(200, json={"_id": "usr_1"})]
    )
    transport = RetryTransport(RateLimitTransport(PooledTransport(), LocalRateLimiter()), QUICK)
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.get(URL)
    assert {"_id": "usr_1"} == answer.json()
    assert 3 == route.call_count


@pytest.mark.anyio
async def test_a_long_answer_is_decoded_in_turns() -> None:
    """Others have theirs meanwhile: 12 MB take 30 ms."""
    body = b"".join(number.to_bytes(4, "big") for number in range(2_000_000))
    packed = gzip.compress(body, 1)

    class Parts(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for at in range(0, len(packed), 65_536):
                yield packed[at : at + 65_536]

    wire = httpx.MockTransport(
        lambda _: httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Parts())
    )
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        answer = await RetryTransport(wire).handle_async_request(httpx.Request("GET", URL))
        tasks.cancel_scope.cancel()
    assert body == answer.content
    assert turns >= 2
