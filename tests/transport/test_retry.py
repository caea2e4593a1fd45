"""The retry layer: what it retries, how long it waits, and how it reads responses."""

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
from lemcal_async.errors import ConfigurationError, DeadlineExceededError, ResponseDecodeError
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
SERVICE_HEADERS = {"Retry-After": "0.01", "X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0"}

CONNECT_ERROR = httpx.ConnectError("refused")
CONNECT_TIMEOUT = httpx.ConnectTimeout("slow")
POOL_TIMEOUT = httpx.PoolTimeout("full")
PROXY_ERROR = httpx.ProxyError("502 Bad Gateway")
READ_ERROR = httpx.ReadError("reset")
READ_TIMEOUT = httpx.ReadTimeout("slow")
WRITE_ERROR = httpx.WriteError("reset")
PROTOCOL_ERROR = httpx.RemoteProtocolError("not HTTP")
DECODING_ERROR = httpx.DecodingError("not gzip")
LOCAL_PROTOCOL_ERROR = httpx.LocalProtocolError("a header with a line break")
UNSUPPORTED_PROTOCOL = httpx.UnsupportedProtocol("ftp")

UNSENT = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError

Outcome = httpx.Response | Exception


class FakeWire(httpx.AsyncBaseTransport):
    """A wire with scripted outcomes; by default, it reports sending."""

    def __init__(self, *outcomes: Outcome, reports_sending: bool = True) -> None:
        self._outcomes = iter(outcomes)
        self.reports_sending = reports_sending
        self.attempts = 0
        self.bodies: list[bytes] = []
        self.entered = False
        self.closed = False

    async def __aenter__(self) -> Self:
        """Record the call."""
        self.entered = True
        return self

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return or raise the next outcome."""
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
        """Record the call."""
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
    """Serve a sandbox without a rate limit."""
    with Sandbox(limit=None).serve() as sandbox:
        yield sandbox


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let all waits end immediately; return their durations."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)
    return waits


def request_of_client(method: str = "GET") -> httpx.Request:
    """Return a request as ``AsyncLemcal`` creates it."""
    return httpx.Request(method, URL, extensions=extension(CallState(method, "/me", redact=str)))


async def send(
    wire: httpx.AsyncBaseTransport, policy: RetryPolicy = QUICK, method: str = "GET", **options: Any
) -> httpx.Response:
    """Send one request through the retry layer."""
    layer = RetryTransport(wire, policy, **options)
    return await layer.handle_async_request(httpx.Request(method, URL))


# Real faults of a real server. A POST is retried only if the server refused it.
@pytest.mark.parametrize(
    ("fault", "get", "post"),
    [
        (faults.too_many_requests("0.01"), [429, 200], [429, 200]),
        (faults.too_many_requests(None), [429, 200], [429, 200]),
        (faults.status(503, headers=SERVICE_HEADERS), [503, 200], [503, 200]),
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
async def test_retries_by_fault(
    *,
    make_wire: MakeWire,
    sandbox: Sandbox,
    fault: Fault,
    get: list[int | None],
    post: list[int | None],
    method: str,
) -> None:
    """Compares the status codes that the server sent, None for no response."""
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
    assert expected == [request.status_code for request in sandbox.requests]


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        (faults.too_many_requests("0.01"), [429, 204]),
        (faults.status(503), [503, 204]),
        (faults.status(500), [500, 204]),
        (faults.reset_before_processing(), [None, 204]),
        # The first attempt deleted the hook, so the second does not find it.
        (faults.reset_after_processing(), [None, 404]),
        (faults.truncated(), [204, 404]),
    ],
)
@pytest.mark.anyio
async def test_delete_is_retried(
    make_wire: MakeWire, sandbox: Sandbox, fault: Fault, statuses: list[int | None]
) -> None:
    """A 404 for the retry means that an earlier attempt succeeded."""
    async with connect(make_wire, sandbox) as client:
        hook = (await client.post("/hooks", json=HOOK)).json()
        sandbox.inject(fault)
        response = await client.delete(f"/hooks/{hook['_id']}")
    assert (204, b"") == (response.status_code, response.content)
    assert statuses == [request.status_code for request in sandbox.requests[1:]]
    assert [] == sandbox.hooks()


@pytest.mark.anyio
async def test_first_404_of_a_delete(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """Without an earlier attempt, the 404 is returned."""
    async with connect(make_wire, sandbox) as client:
        response = await client.delete("/hooks/hoo_unknown")
    assert 404 == response.status_code


@pytest.mark.anyio
async def test_404_of_a_retried_get() -> None:
    """The 404 is returned."""
    assert 404 == (await send(FakeWire(httpx.Response(503), httpx.Response(404)))).status_code


@pytest.mark.parametrize(
    ("error", "get", "post"),
    [
        (CONNECT_ERROR, 2, 2),
        (CONNECT_TIMEOUT, 2, 2),
        (POOL_TIMEOUT, 2, 2),
        (PROXY_ERROR, 2, 2),
        (READ_ERROR, 2, 1),
        (WRITE_ERROR, 2, 1),
        (READ_TIMEOUT, 2, 1),
        (PROTOCOL_ERROR, 2, 1),
        (DECODING_ERROR, 1, 1),
        (LOCAL_PROTOCOL_ERROR, 1, 1),
        (UNSUPPORTED_PROTOCOL, 1, 1),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
@pytest.mark.anyio
async def test_attempts_by_error(error: httpx.RequestError, get: int, post: int, method: str) -> None:
    """Unsent requests are retried for every method, others only for GET and DELETE."""
    wire = FakeWire(error, httpx.Response(200))
    expected = get if method in {"GET", "DELETE"} else post
    if expected == 2:
        assert 200 == (await send(wire, method=method)).status_code
    else:
        with pytest.raises(type(error)) as caught:
            await send(wire, method=method)
        assert caught.value is error
    assert expected == wire.attempts


@pytest.mark.parametrize("error", [CONNECT_ERROR, CONNECT_TIMEOUT, POOL_TIMEOUT, PROXY_ERROR])
@pytest.mark.parametrize(("method", "attempts"), [("GET", 2), ("DELETE", 2), ("POST", 1), ("PUT", 1)])
@pytest.mark.anyio
async def test_wire_that_does_not_report_sending(
    error: httpx.RequestError, method: str, attempts: int
) -> None:
    """Its connect errors may be resets after processing, so a POST is not retried."""
    wire = FakeWire(error, httpx.Response(200), reports_sending=False)
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
        *[
            (200, SERVICE_HEADERS, True),
            (404, SERVICE_HEADERS, True),
            (500, SERVICE_HEADERS, True),
            (503, {}, True),
        ],
        *[
            (401, SERVICE_HEADERS, False),
            (429, SERVICE_HEADERS, False),
            (429, {}, False),
            (503, SERVICE_HEADERS, False),
        ],
    ],
)
@pytest.mark.anyio
async def test_sent_by_status(status: int, headers: dict[str, str], *, sent: bool) -> None:
    """After any response except a refusal, the request may have been processed."""
    request = httpx.Request("POST", URL)
    wire = FakeWire(httpx.Response(status, headers=headers))
    await RetryTransport(wire, RetryPolicy(attempts=1)).handle_async_request(request)
    assert (sent, False) == (call_of(request).sent, call_of(request).maybe_processed)


@pytest.mark.anyio
async def test_wire_that_proves_by_its_events_that_nothing_was_sent() -> None:
    """It reported connecting in this attempt, but not sending."""

    class Connecting(FakeWire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.extensions["trace"]("connection.connect_tcp.started", {})
            return await super().handle_async_request(request)

    wire = Connecting(CONNECT_ERROR, httpx.Response(200), reports_sending=False)
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
async def test_exceptions_of_other_libraries(
    error: Exception, kind: type[Exception], text: str, method: str, attempts: int
) -> None:
    """They become httpx's errors; the request may have been processed."""
    wire = FakeWire(*[error] * attempts)
    layer = RetryTransport(wire, RetryPolicy(attempts=2, backoff=0))
    with pytest.raises(kind) as caught:
        await layer.handle_async_request(request_of_client(method))
    assert (kind, text, attempts) == (type(caught.value), str(caught.value), wire.attempts)


@pytest.mark.anyio
async def test_exception_of_an_app_in_a_plain_client() -> None:
    """It passes unchanged, with its traceback, because a test of the app needs it."""

    async def app(*_: Any) -> None:
        raise ZeroDivisionError

    layers = RetryTransport(RateLimitTransport(httpx.ASGITransport(app), Unlimited()), QUICK)
    async with httpx.AsyncClient(transport=layers) as client:
        with pytest.raises(ZeroDivisionError) as caught:
            await client.get(URL)
    assert "app" == caught.traceback[-1].name


@pytest.mark.anyio
async def test_assertion_errors_pass_unchanged() -> None:
    """A mock transport raises them for its test."""
    wire = FakeWire(AssertionError("not mocked"))
    with pytest.raises(AssertionError, match="not mocked"):
        await send(wire)
    assert 1 == wire.attempts


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_wire_that_raises_cancelled_error() -> None:
    """Without a cancellation, this is a failure that does not end the task."""

    class Canceling(FakeWire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.attempts == 0:
                self.attempts += 1
                raise asyncio.CancelledError
            return await super().handle_async_request(request)

    wire = Canceling(httpx.Response(200))
    response = await RetryTransport(wire, QUICK).handle_async_request(request_of_client())
    assert 200 == response.status_code
    assert 2 == wire.attempts


@pytest.mark.parametrize(
    ("first", "body", "success"),
    [
        (httpx.Response(500), b"hook not found", True),
        (httpx.Response(500), b'{"error": "Hook not found"}', True),
        (httpx.Response(502), b"", True),
        (READ_ERROR, b"hook not found", True),
        (httpx.Response(503, headers={"Retry-After": "0"}), b"", True),  # a proxy's
        (httpx.Response(500), b"API key not found", False),
        (httpx.Response(500), b"<html><title>404 Not Found</title></html>", False),
        (httpx.Response(500), b"Not Found", False),
        (httpx.Response(429, headers=SERVICE_HEADERS), b"hook not found", False),
        (httpx.Response(503, headers=SERVICE_HEADERS), b"hook not found", False),
        (CONNECT_ERROR, b"", False),
    ],
)
@pytest.mark.anyio
async def test_404_of_a_retried_delete(first: Outcome, body: bytes, *, success: bool) -> None:
    """It is a success if an earlier attempt may have been processed and the 404 is about the hook."""
    response = await send(FakeWire(first, httpx.Response(404, content=body)), method="DELETE")
    assert (204 if success else 404) == response.status_code


@pytest.mark.anyio
async def test_connection_refused(make_wire: MakeWire) -> None:
    """After the maximum number of attempts, the last error is raised."""
    with Loopback() as server:
        pass
    request = httpx.Request("POST", server.url)
    async with RetryTransport(make_wire(), RetryPolicy(attempts=3, backoff=0.01)) as layer:
        with pytest.raises(httpx.ConnectError):
            await layer.handle_async_request(request)
    assert 3 == call_of(request).attempts


@pytest.mark.anyio
async def test_the_last_response_is_returned(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """After the maximum number of attempts, the last response is returned."""
    sandbox.inject(faults.status(502), times=2)
    sandbox.inject(faults.status(503, "the last"))
    async with connect(make_wire, sandbox, RetryPolicy(attempts=3, backoff=0.01)) as client:
        response = await client.get("/me")
    assert (503, "the last") == (response.status_code, response.text)
    assert 3 == len(sandbox.requests)


@pytest.mark.parametrize("outcome", [httpx.Response(429), httpx.Response(503), CONNECT_ERROR])
@pytest.mark.anyio
async def test_one_attempt_means_no_retries(outcome: Outcome) -> None:
    """The outcome does not matter."""
    wire = FakeWire(outcome)
    if isinstance(outcome, httpx.Response):
        assert outcome is await send(wire, RetryPolicy(attempts=1))
    else:
        with pytest.raises(httpx.ConnectError):
            await send(wire, RetryPolicy(attempts=1))
    assert 1 == wire.attempts


@pytest.mark.anyio
async def test_policy_of_the_call_has_priority() -> None:
    """It overrides the transport's policy."""
    wire = FakeWire(httpx.Response(503), httpx.Response(200))
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
async def test_wait_after_a_429(
    waits: list[float], headers: dict[str, str], least: float, most: float
) -> None:
    """Retry-After in any format, or the backoff if it is missing or invalid."""
    wire = FakeWire(httpx.Response(429, headers=headers), httpx.Response(200))
    assert 200 == (await send(wire, RetryPolicy(backoff=0.4), "POST")).status_code
    (wait,) = waits
    assert least <= wait <= most


@pytest.mark.parametrize(("retry_after", "least", "most"), [("0.01", 0.2, 0.4), ("1.5", 1.5, 1.5)])
@pytest.mark.anyio
async def test_wait_after_a_503(waits: list[float], retry_after: str, least: float, most: float) -> None:
    """The longer of the backoff and Retry-After, which every response has."""
    wire = FakeWire(httpx.Response(503, headers={"Retry-After": retry_after}), httpx.Response(200))
    await send(wire, RetryPolicy(backoff=0.4))
    (wait,) = waits
    assert least <= wait <= most


@pytest.mark.parametrize("outcome", [httpx.Response(500, headers={"Retry-After": "1.5"}), READ_ERROR])
@pytest.mark.anyio
async def test_wait_after_other_failures(waits: list[float], outcome: Outcome) -> None:
    """The backoff doubles up to its maximum, half of it random; Retry-After is ignored."""
    await send(FakeWire(*[outcome] * 4, httpx.Response(200)), RetryPolicy(backoff=0.1, backoff_max=0.3))
    for full, wait in zip([0.1, 0.2, 0.3, 0.3], waits, strict=True):
        assert full / 2 <= wait <= full


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.anyio
async def test_retry_after_above_max_wait(waits: list[float], status: int) -> None:
    """The response is returned immediately, including the header."""
    wire = FakeWire(httpx.Response(status, headers={"Retry-After": "61"}))
    response = await send(wire, RetryPolicy(max_wait=60))
    assert (status, "61") == (response.status_code, response.headers["retry-after"])
    assert [] == waits


@pytest.mark.anyio
async def test_pause_of_the_limiter_is_deducted(waits: list[float]) -> None:
    """The layer below waits for that time anyway."""

    class Limiting(FakeWire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            call_of(request).paused_for = 0.3 if self.attempts == 0 else 9
            return await super().handle_async_request(request)

    refused = httpx.Response(429, headers={"Retry-After": "0.5"})
    await send(Limiting(refused, refused, httpx.Response(200)))
    assert [pytest.approx(0.2), 0] == waits


@pytest.mark.anyio
async def test_rate_limit_layer_waits_after_a_429(
    make_wire: MakeWire, sandbox: Sandbox, waits: list[float]
) -> None:
    """With a rate-limit layer below, the retry layer does not wait after a 429."""
    sandbox.inject(faults.too_many_requests("0.2"))
    transport = RetryTransport(RateLimitTransport(make_wire(), LocalRateLimiter()), QUICK)
    async with httpx.AsyncClient(
        transport=transport, base_url=sandbox.base_url, auth=(sandbox.user_id, sandbox.api_key)
    ) as client:
        assert 200 == (await client.get("/me")).status_code
    first, second = (request.at for request in sandbox.requests)
    assert 0.2 <= second - first
    assert 0.0 == max(waits)


@pytest.mark.anyio
async def test_retry_beyond_the_deadline(waits: list[float]) -> None:
    """The error is immediate, and says after what time another call has a chance."""
    call = CallState("GET", "/me", deadline=anyio.current_time() + 5)
    request = httpx.Request("GET", URL, extensions=extension(call))
    wire = FakeWire(
        httpx.Response(429, headers={"Retry-After": "1"}), httpx.Response(429, headers={"Retry-After": "8"})
    )
    with pytest.raises(DeadlineExceededError, match=r"GET /me: .* wait 8 s, but only [45]") as caught:
        await RetryTransport(wire, QUICK).handle_async_request(request)
    error = caught.value
    assert (8, 2, 1) == (error.retry_after, error.attempts, error.waited)
    assert (None, None) == (error.__cause__, error.__context__)
    assert [1] == waits


@pytest.mark.anyio
async def test_retry_within_the_deadline(waits: list[float]) -> None:
    """The deadline has no effect."""
    call = CallState("GET", "/me", deadline=anyio.current_time() + 5)
    request = httpx.Request("GET", URL, extensions=extension(call))
    wire = FakeWire(httpx.Response(429, headers={"Retry-After": "1"}), httpx.Response(200))
    assert 200 == (await RetryTransport(wire, QUICK).handle_async_request(request)).status_code
    assert ([1], 1) == (waits, call.waited)


@pytest.mark.anyio
async def test_cancellation_ends_a_wait() -> None:
    """A call canceled while waiting ends immediately, without another attempt."""
    wire = FakeWire(httpx.Response(429, headers={"Retry-After": "30"}))
    with anyio.move_on_after(0.05) as scope:
        await send(wire)
    assert scope.cancelled_caught
    assert 1 == wire.attempts


async def parts() -> AsyncIterator[bytes]:
    """Yield a body that can be read only once."""
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
    """The whole body is sent, even if it can be read only once."""
    sandbox.inject(faults.too_many_requests("0.01"), times=2)
    body = {name: value() if callable(value) else value for name, value in body.items()}
    async with connect(make_wire, sandbox) as client:
        response = await client.post("/hooks", **body)
    assert 200 == response.status_code
    assert [target] == [hook["targetUrl"] for hook in sandbox.hooks()]
    assert [429, 429, 200] == [request.status_code for request in sandbox.requests]


@pytest.mark.anyio
async def test_every_attempt_has_the_same_body() -> None:
    """The bodies of all attempts are identical."""
    wire = FakeWire(httpx.Response(429), CONNECT_ERROR, httpx.Response(200))
    await RetryTransport(wire, QUICK).handle_async_request(httpx.Request("POST", URL, content=parts()))
    assert 1 == len(set(wire.bodies))
    assert b'{"targetUrl": "https://example.com/parts","anyMeetingType": true}' == wire.bodies[0]


@pytest.mark.parametrize("body", [b"", bytes(3000)])
@pytest.mark.anyio
async def test_compressed_response(body: bytes) -> None:
    """The body is decompressed, and the encoding headers are removed."""
    packed = gzip.compress(body)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(packed)), "X-Kept": "yes"}
    wire = FakeWire(httpx.Response(200, headers=headers, stream=Stream(packed)))
    response = await send(wire)
    assert body == response.content
    assert ("yes", None, None) == (
        response.headers["x-kept"],
        response.headers.get("content-length"),
        response.headers.get("content-encoding"),
    )


class Stream(httpx.AsyncByteStream):
    """A body that arrives in parts."""

    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def aclose(self) -> None:
        """Record the call."""
        self.closed = True


@pytest.mark.anyio
async def test_compressed_response_on_real_wires(make_wire: MakeWire, server: Loopback) -> None:
    """The connection is reused."""
    async with httpx.AsyncClient(transport=RetryTransport(make_wire())) as client:
        responses = [await client.get(f"{server.url}/gzip/5000") for _ in range(2)]
    assert [bytes(5000)] * 2 == [response.content for response in responses]
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
async def test_undecodable_compressed_body(encoding: str, body: bytes, match: str) -> None:
    """There is no retry; an error response is returned without its body."""
    headers = {"Content-Encoding": encoding}
    wire = FakeWire(httpx.Response(200, headers=headers, stream=Stream(body)))
    with pytest.raises(ResponseDecodeError, match=match) as caught:
        await send(wire)
    assert (1, 200) == (wire.attempts, caught.value.status_code)
    response = await send(FakeWire(httpx.Response(400, headers=headers, stream=Stream(body))))
    assert (400, b"") == (response.status_code, response.content)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("text", [b'{"_id": "usr_1"}', b"[1, 2]", b'"text"'])
@pytest.mark.anyio
async def test_body_already_decompressed_by_the_wire(encoding: str, text: bytes) -> None:
    """The body is not decompressed again if the wire has kept the header."""
    headers = {"Content-Encoding": encoding}
    response = await send(FakeWire(httpx.Response(200, headers=headers, stream=Stream(text))))
    assert (text, None) == (response.content, response.headers.get("content-encoding"))


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(b"[" * 3000, mtime=0), zlib.compress(b"[" * 3000), zlib.compress(b"[" * 3000)[2:-4]],
)
@pytest.mark.anyio
async def test_compression_formats(packed: bytes) -> None:
    """``deflate`` may be zlib's format or raw."""
    encoding = "gzip" if packed[:2] == b"\x1f\x8b" else "deflate"
    response = await send(
        FakeWire(httpx.Response(200, headers={"Content-Encoding": encoding}, stream=Stream(packed)))
    )
    assert b"[" * 3000 == response.content


@pytest.mark.anyio
async def test_headers_that_are_not_ascii() -> None:
    """The raw headers of a compressed response are kept."""
    city = (b"X-City", "Zürich".encode("latin-1"))
    headers = [(b"Content-Encoding", b"gzip"), city]
    response = await send(FakeWire(httpx.Response(200, headers=headers, stream=Stream(gzip.compress(b"{}")))))
    assert (b"{}", [city]) == (response.content, response.headers.raw)


@pytest.mark.anyio
async def test_other_encoding_accepted_by_the_client() -> None:
    """A plain client with brotli decodes the body itself."""
    compressed = httpx.Response(200, headers={"Content-Encoding": "br"}, stream=Stream(b"\x0b\x02\x80"))
    request = httpx.Request("GET", URL, headers={"Accept-Encoding": "gzip, br"})
    response = await RetryTransport(FakeWire(compressed), QUICK).handle_async_request(request)
    assert b"\x0b\x02\x80" == b"".join([part async for part in response.aiter_raw()])
    assert "br" == response.headers["content-encoding"]


@pytest.mark.anyio
async def test_elapsed_in_a_plain_client() -> None:
    """``elapsed`` includes the time before the layer returned the response."""
    wire = FakeWire(httpx.Response(200, stream=Stream(b"{}")), httpx.Response(200, content=b"{}"))
    async with httpx.AsyncClient(transport=RetryTransport(wire)) as client:
        for _ in range(2):
            assert 0 < (await client.get(URL)).elapsed.total_seconds() < 60


@pytest.mark.anyio
async def test_interrupted_body() -> None:
    """The stream is closed, and the attempt has failed."""
    stream = Stream(b"{", READ_ERROR)
    wire = FakeWire(httpx.Response(200, stream=stream), httpx.Response(200, content=b"{}"))
    assert b"{}" == (await send(wire)).content
    assert stream.closed


@pytest.mark.parametrize("size", [1000, 1001])
@pytest.mark.anyio
async def test_response_of_the_maximum_size(make_wire: MakeWire, server: Loopback, size: int) -> None:
    """The maximum is allowed; one more byte is an error."""
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
        ("/gzip/30000000", 1_000_000, [1, 1]),  # fully received; only the decompressed body is too large
        ("/gzip/30000000", 10_000, [1, 2]),
    ],
)
@pytest.mark.anyio
async def test_oversized_response(
    make_wire: MakeWire, server: Loopback, path: str, bound: int, connections: list[int]
) -> None:
    """It raises without a retry, and leaks no connection or unfinished generator."""
    async with make_wire(max_connections=1) as pool:
        layer = RetryTransport(pool, QUICK, max_response_bytes=bound)
        request = httpx.Request("GET", server.url + path)
        with pytest.raises(ResponseDecodeError, match=f"over {bound} bytes") as caught:
            await layer.handle_async_request(request)
        assert (1, "GET", path) == (caught.value.attempts, caught.value.method, caught.value.route)
        del caught, request
        gc.collect()
        await anyio.lowlevel.checkpoint()
        response = await layer.handle_async_request(httpx.Request("GET", server.url))
        assert b"{}" == response.content
        assert 1 == await anyio.to_thread.run_sync(lambda: server.settled(at_most=1))
    assert connections == server.connections


@pytest.mark.parametrize(("layers", "match"), [(1, "over 100000 bytes"), (2, "with gzip, gzip, not")])
@pytest.mark.anyio
async def test_decompression_bomb(layers: int, match: str) -> None:
    """Memory use stays small, even if the body is compressed repeatedly."""
    body = bytes(30_000_000)
    for _ in range(layers):
        body = gzip.compress(body)
    stream = Stream(*(body[at : at + 1000] for at in range(0, len(body), 1000)))
    headers = {"Content-Encoding": ", ".join(["gzip"] * layers)}
    wire = FakeWire(httpx.Response(200, headers=headers, stream=stream))
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
async def test_oversized_response_of_an_in_memory_transport() -> None:
    """The limit also applies if the transport has already read the body."""
    with pytest.raises(ResponseDecodeError, match="over 3 bytes"):
        await send(FakeWire(httpx.Response(200, content=b"1234")), max_response_bytes=3)


@pytest.mark.anyio
async def test_endless_body_that_ignores_closing() -> None:
    """Reading stops even if the body continues after it was closed."""

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
        await send(FakeWire(httpx.Response(200, stream=stream)), max_response_bytes=3000)
    assert stream.closed


@pytest.mark.parametrize(("failures", "expected"), [(0, 0), (1, 1), (3, 1)])
@pytest.mark.anyio
async def test_retry_object_is_created_only_for_retries(
    monkeypatch: pytest.MonkeyPatch, failures: int, expected: int
) -> None:
    """Creating it costs more than the rest of a call; a call creates at most one."""
    count = 0

    class Counting(tenacity.AsyncRetrying):
        def __init__(self, **options: Any) -> None:
            nonlocal count
            count += 1
            super().__init__(**options)

    monkeypatch.setattr(tenacity, "AsyncRetrying", Counting)
    await send(FakeWire(*[CONNECT_ERROR] * failures, httpx.Response(200)))
    assert expected == count


def test_no_result_before_an_attempt() -> None:
    """If tenacity asked for the result too early, it would be an error."""
    state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
    with pytest.raises(RuntimeError, match="no attempt"):
        _layers._attempt_of(state)


@pytest.mark.anyio
async def test_concurrent_calls_count_their_own_attempts(make_wire: MakeWire, sandbox: Sandbox) -> None:
    """Concurrent calls do not share state."""
    sandbox.inject(faults.status(503), times=60)
    requests = [httpx.Request("GET", f"{sandbox.base_url}/me") for _ in range(30)]
    policy = RetryPolicy(attempts=50, backoff=0.001)
    async with RetryTransport(make_wire(), policy) as layer, anyio.create_task_group() as group:
        for request in requests:
            group.start_soon(layer.handle_async_request, request)
    assert 90 == sum(call_of(request).attempts for request in requests) == len(sandbox.requests)


@pytest.mark.anyio
async def test_retries_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each retry logs one line at INFO."""
    caplog.set_level(logging.INFO, "lemcal_async.retry")
    await send(
        FakeWire(CONNECT_ERROR, httpx.Response(503), httpx.Response(200)),
        RetryPolicy(attempts=4, backoff=0),
    )
    assert [
        "GET /me: ConnectError on attempt 1 of 4; retrying in 0 s",
        "GET /me: 503 on attempt 2 of 4; retrying in 0 s",
    ] == caplog.messages


@pytest.mark.anyio
async def test_layers_enter_and_close_the_wrapped_transport() -> None:
    """A layer owns its wire, as in httpx."""
    wire = FakeWire()
    await RetryTransport(RateLimitTransport(wire)).aclose()
    assert (False, True) == (wire.entered, wire.closed)
    wire = FakeWire()
    async with RetryTransport(RateLimitTransport(wire)):
        assert (True, False) == (wire.entered, wire.closed)
    assert wire.closed


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    """Mock httpcore below the wire."""
    with respx.mock(using="httpcore") as router:
        yield router


@pytest.mark.anyio
async def test_all_layers_in_a_plain_client(router: respx.MockRouter) -> None:
    """The layers work in any client, and tests can mock httpcore below them."""
    route = router.get(URL).mock(
        side_effect=[httpx.ConnectError, httpx.Response(502), httpx.Response(200, json={"_id": "usr_1"})]
    )
    transport = RetryTransport(RateLimitTransport(PooledTransport(), LocalRateLimiter()), QUICK)
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.get(URL)
    assert {"_id": "usr_1"} == response.json()
    assert 3 == route.call_count


@pytest.mark.anyio
async def test_decompressing_a_large_body_yields_to_other_tasks() -> None:
    """12 MB take 30 ms."""
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

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        response = await RetryTransport(wire).handle_async_request(httpx.Request("GET", URL))
        tasks.cancel_scope.cancel()
    assert body == response.content
    assert turns >= 2


def test_invalid_arguments() -> None:
    """The layers refuse invalid arguments when they are created."""
    wire = FakeWire()
    with pytest.raises(ConfigurationError, match=r"^max_response_bytes=0: it must be a whole number"):
        RetryTransport(wire, max_response_bytes=0)
    with pytest.raises(ConfigurationError, match=r"^policy= must be of type RetryPolicy, not int$"):
        RetryTransport(wire, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"^limiter= must be of type RateLimiter, not int$"):
        RateLimitTransport(wire, 20)  # type: ignore[arg-type]
