"""The errors of real calls: their class, their message, and that they are plain values."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    DuplicateHookError,
    HookNotFoundError,
    LemcalError,
    MeetingTypeNotFoundError,
    MethodNotAllowedError,
    NotFoundError,
    PermissionDeniedError,
    PlanRequiredError,
    RateLimitError,
    ResponseDecodeError,
    ServerError,
)
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox.faults import Fault

from .conftest import AT_ONCE, KEY, ONCE, TARGET, USER_ID, Wire, check_plain, failing, unused_base_url

pytestmark = pytest.mark.anyio

OWN = {"Retry-After": "0", "X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0"}
AGAIN = "it may have been processed: check before you send it again"

Do = Callable[[AsyncLemcal], Awaitable[object]]
GET: Do = lambda lemcal: lemcal.meetings.list()  # noqa: E731 - short names for the tables below
GET_TYPE: Do = lambda lemcal: lemcal.meeting_types.get("met_1")  # noqa: E731
POST: Do = lambda lemcal: lemcal.hooks.create(TARGET, any_meeting_type=True)  # noqa: E731
DELETE: Do = lambda lemcal: lemcal.hooks.delete("hoo_1")  # noqa: E731


# --------------------------------------------------------------------------- error responses

STATUSES: list[tuple[Fault, Do, type[APIStatusError], int, str | None]] = [
    (faults.status(400, "Invalid targetUrl"), POST, BadRequestError, 400, "Invalid targetUrl"),
    (
        faults.status(400, "No API key provided", content_type=None),
        GET,
        AuthenticationError,
        400,
        "No API key provided",
    ),
    (faults.status(401), GET, AuthenticationError, 401, "Unauthorized"),
    (faults.json_error(402, "Upgrade", error_code="PLAN"), GET, PlanRequiredError, 402, "Upgrade"),
    (faults.not_ok(403, "Not yours"), GET, PermissionDeniedError, 403, "Not yours"),
    (
        faults.not_ok(403, "User linked to this API key is blocked"),
        GET,
        AuthenticationError,
        403,
        "User linked to this API key is blocked",
    ),
    (faults.html_error(403), GET, PermissionDeniedError, 403, "403 Forbidden"),
    (faults.unsuccessful(404, "No such thing", error_code="X"), GET, NotFoundError, 404, "No such thing"),
    (
        faults.status(404, "No user found for this API key"),
        GET,
        AuthenticationError,
        404,
        "No user found for this API key",
    ),
    (
        faults.status(404, "meeting type not found"),
        GET_TYPE,
        MeetingTypeNotFoundError,
        404,
        "meeting type not found",
    ),
    (faults.status(404, "hook not found"), DELETE, HookNotFoundError, 404, "hook not found"),
    (faults.status(405), GET, MethodNotAllowedError, 405, "Method Not Allowed"),
    (faults.status(409, "Duplicate hook"), POST, DuplicateHookError, 409, "Duplicate hook"),
    (faults.status(409, "Busy"), DELETE, ConflictError, 409, "Busy"),
    (faults.status(418), GET, APIStatusError, 418, "I'm a Teapot"),
    (faults.too_many_requests("1.25"), GET, RateLimitError, 429, "Too Many Requests"),
    (faults.status(500, "{}"), GET, ServerError, 500, None),
    (faults.status(503), POST, ServerError, 503, "Service Unavailable"),
    (
        faults.redirect("https://elsewhere.example/x?apikey=1"),
        GET,
        APIStatusError,
        302,
        "Found. Redirecting to https://elsewhere.example/x?***",
    ),
    (faults.status(304), GET, APIStatusError, 304, None),
]


@pytest.mark.parametrize(("fault", "do", "kind", "status", "words"), STATUSES)
async def test_error_responses(  # noqa: PLR0917 - pytest passes by name
    lemcal_sandbox: Sandbox, fault: Fault, do: Do, kind: type[APIStatusError], status: int, words: str | None
) -> None:
    """The error names the method, route, status and server message, on one line."""
    lemcal_sandbox.inject(fault)
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        with pytest.raises(kind) as caught:
            await do(lemcal)
    error = caught.value
    seen = lemcal_sandbox.requests[0]
    route = seen.path.replace("met_1", "{id}").replace("hoo_1", "{id}")
    assert kind is type(error)
    assert (status, words, seen.method, route, 1) == (
        error.status_code,
        error.server_message,
        error.method,
        error.route,
        error.attempts,
    )
    assert str(error).startswith(f"{seen.method} {route}: {status} ")
    assert (words or "") in str(error)
    assert 0 <= error.waited < 1
    from_service = fault != faults.html_error(403)  # every response of the service has Retry-After
    assert from_service == isinstance(error.retry_after, float)
    check_plain(error)
    assert 1 == len(lemcal_sandbox.requests)


@pytest.mark.parametrize("location", ["/api/lemcal/me", "https://elsewhere.example/"])
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(lemcal_sandbox: Sandbox, code: int, location: str) -> None:
    """A redirect could return the wrong response, and send the credentials to another host."""
    lemcal_sandbox.inject(faults.redirect(location, code))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(APIStatusError, match="Redirects are never followed") as caught:
            await lemcal.meetings.list()
    assert code == caught.value.status_code
    assert ["/meetings"] == [seen.path for seen in lemcal_sandbox.requests]


async def test_error_states_attempts_and_waits(lemcal_sandbox: Sandbox) -> None:
    """The error and its message contain the number of attempts and the time waited."""
    lemcal_sandbox.inject(faults.status(502), times=3)
    retry = RetryPolicy(attempts=3, backoff=0.04, backoff_max=0.04)
    async with lemcal_sandbox.client(retry=retry) as lemcal:
        with pytest.raises(ServerError, match=r"\(\"Bad Gateway\", 3 attempts, 0\.[01] s waited\)") as caught:
            await lemcal.meetings.list()
    assert 3 == caught.value.attempts == len(lemcal_sandbox.requests)
    assert 0.04 <= caught.value.waited < 0.5
    check_plain(caught.value)


async def test_429_without_retries(lemcal_sandbox: Sandbox) -> None:
    """RateLimitError has the limit that the server reported."""
    lemcal_sandbox.inject(faults.too_many_requests("1.25"))
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        with pytest.raises(RateLimitError, match=r"try again in 1\.\d s") as caught:
            await lemcal.me()
    assert (1.25, 20, 0) == (caught.value.retry_after, caught.value.limit, caught.value.remaining)
    check_plain(caught.value)


async def test_429_with_a_long_retry_after(lemcal_sandbox: Sandbox) -> None:
    """The call fails at once with ``retry_after``, and the next call is not even sent."""
    lemcal_sandbox.inject(faults.too_many_requests("86400"))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(RateLimitError) as caught:
            await lemcal.me()
        assert 86400 == caught.value.retry_after
        with pytest.raises(RateLimitError, match="the server refuses this key for another 8") as caught:
            await lemcal.me()
    assert ("/me", 20, 0) == (caught.value.route, caught.value.limit, caught.value.remaining)
    check_plain(caught.value)
    assert 1 == len(lemcal_sandbox.requests)


async def test_post_with_status_500_is_not_retried(lemcal_sandbox: Sandbox) -> None:
    """A 500 can be a business error: the POST is not retried, but may have been processed."""
    lemcal_sandbox.inject(faults.status(500), times=2)
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        with pytest.raises(ServerError, match="may have been processed anyway: check before"):
            await POST(lemcal)
    assert 1 == len(lemcal_sandbox.requests)


async def test_server_message_is_redacted(lemcal_sandbox: Sandbox) -> None:
    """A key in the server's message is masked."""
    words = f"bad key {lemcal_sandbox.api_key} of {lemcal_sandbox.user_id}"
    lemcal_sandbox.inject(faults.json_error(401, words))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(AuthenticationError) as caught:
            await lemcal.me()
    assert f"bad key *** of {lemcal_sandbox.user_id}" == caught.value.server_message


# --------------------------------------------------------------------------- no response


@pytest.mark.parametrize(("do", "call"), [(GET, "GET /meetings"), (POST, "POST /hooks")])
async def test_connection_refused(do: Do, call: str) -> None:
    """Nothing was sent, so every method is retried, and nothing can have been processed."""
    async with AsyncLemcal(USER_ID, KEY, base_url=unused_base_url(), retry=AT_ONCE) as lemcal:
        with pytest.raises(
            APIConnectionError, match=rf"^{call}: no response.*127\.0\.0\.1:\d+.*5 attempts"
        ) as caught:
            await do(lemcal)
        assert 20 == lemcal.rate_limit.remaining  # and the limiter did not count it
    error = caught.value
    assert call == f"{error.method} {error.route}"
    assert (False, 5, None, None) == (
        error.maybe_processed,
        error.attempts,
        error.status_code,
        error.server_message,
    )
    assert "processed" not in str(error)
    check_plain(error)


@pytest.mark.parametrize(
    ("fault", "processed"), [(faults.reset_before_processing(), 0), (faults.reset_after_processing(), 1)]
)
async def test_post_on_a_reset_connection(lemcal_sandbox: Sandbox, fault: Fault, processed: int) -> None:
    """The POST is not retried: the client cannot tell whether it was processed."""
    lemcal_sandbox.inject(fault)
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        with pytest.raises(APIConnectionError, match=AGAIN) as caught:
            await POST(lemcal)
        assert (True, 1) == (caught.value.maybe_processed, caught.value.attempts)
        check_plain(caught.value)
        assert processed == len(lemcal_sandbox.hooks())
        assert 1 == len(lemcal_sandbox.requests)
        await lemcal.hooks.create(TARGET, any_meeting_type=True, exist_ok=True)  # as the docstring recommends
    assert 1 == len(lemcal_sandbox.hooks())


async def test_post_with_a_truncated_response(lemcal_sandbox: Sandbox) -> None:
    """Without the id in the body, the POST may have been processed, too."""
    lemcal_sandbox.inject(faults.truncated())
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        with pytest.raises(APIConnectionError, match=AGAIN) as caught:
            await POST(lemcal)
    assert caught.value.maybe_processed
    assert (1, 1) == (len(lemcal_sandbox.requests), len(lemcal_sandbox.hooks()))
    check_plain(caught.value)


async def test_get_on_a_reset_connection(lemcal_sandbox: Sandbox) -> None:
    """The GET is retried until no attempts are left."""
    lemcal_sandbox.inject(faults.reset_before_processing(), times=3)
    async with lemcal_sandbox.client(retry=RetryPolicy(attempts=3, backoff=0.0)) as lemcal:
        with pytest.raises(
            APIConnectionError,
            match=r"^GET /meetings: no response from 127\.0\.0\.1:\d+: \S.* \(3 attempts, .* later$",
        ) as caught:
            await GET(lemcal)
        assert 12 == len(await lemcal.meetings.list())
    assert 3 == caught.value.attempts
    check_plain(caught.value)


async def test_post_with_a_slow_response(lemcal_sandbox: Sandbox) -> None:
    """The TimeoutError says what took too long, and that the POST may have been processed."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(timeout=0.05, retry=AT_ONCE) as lemcal:
        with pytest.raises(
            TimeoutError, match=rf"waiting for the response took longer than 0\.05 s \(timeout=\); {AGAIN}"
        ) as caught:
            await POST(lemcal)
    error = caught.value
    assert isinstance(error, APITimeoutError)
    assert (True, 1) == (error.maybe_processed, error.attempts)
    check_plain(error)
    assert 1 == len(lemcal_sandbox.hooks())


async def test_get_with_a_slow_response_is_retried(lemcal_sandbox: Sandbox) -> None:
    """The second attempt may be faster."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(timeout=0.2, retry=AT_ONCE) as lemcal:
        assert 12 == len(await lemcal.meetings.list())


@pytest.mark.parametrize(
    ("failure", "kind", "processed", "words"),
    [
        (httpx.ConnectTimeout(""), APITimeoutError, False, "connecting took longer than 30 s"),
        (httpx.PoolTimeout(""), APITimeoutError, False, "waiting for a connection took longer"),
        (httpx.WriteTimeout(""), APITimeoutError, True, "sending took longer"),
        (httpx.ReadTimeout(""), APITimeoutError, True, "waiting for the response took longer"),
        (httpx.ConnectError("refused"), APIConnectionError, False, "refused"),
        (httpx.ProxyError("502 Bad Gateway"), APIConnectionError, False, "502 Bad Gateway"),
        (httpx.UnsupportedProtocol("ftp"), APIConnectionError, True, "ftp"),
        (OSError(5, "wire cut"), APIConnectionError, True, r"OSError: \[Errno 5\] wire cut"),
        (KeyError("host"), APIConnectionError, True, "KeyError: 'host'"),
        (httpx.ReadError(""), APIConnectionError, True, "ReadError"),
        (httpx.WriteError("broken\npipe"), APIConnectionError, True, "broken pipe"),
        (httpx.RemoteProtocolError("Server disconnected"), APIConnectionError, True, "Server disconnected"),
    ],
)
async def test_transport_errors(
    failure: Exception,
    kind: type[APIConnectionError],
    processed: bool,  # noqa: FBT001 - a case
    words: str,
) -> None:
    """Any transport exception becomes one of two errors, with its message and without its request."""
    wire = failing(failure)
    with pytest.raises(kind, match=rf"^POST /hooks: no response from api\.lemcal\.com: {words}") as caught:
        await POST(wire.client())
    error = caught.value
    assert (kind, processed, processed) == (type(error), error.maybe_processed, AGAIN in str(error))
    check_plain(error)


async def test_decompression_failure_in_the_transport() -> None:
    """There is a response, so a retry would not help."""
    wire = failing(httpx.DecodingError("bad gzip"))
    with pytest.raises(
        ResponseDecodeError, match=r"^GET /meetings: the response cannot be .*: bad gzip$"
    ) as caught:
        await GET(wire.client(retry=AT_ONCE))
    assert 1 == len(wire.requests)
    check_plain(caught.value)


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.PoolTimeout("")])
async def test_transport_that_does_not_report_sending(failure: httpx.RequestError) -> None:
    """Without proof that it was not sent, a POST is not retried and may have been processed."""
    wire = failing(failure)
    wire.reports_sending = False
    with pytest.raises(APIConnectionError, match=AGAIN) as caught:
        await POST(wire.client(retry=AT_ONCE))
    assert (True, 1) == (caught.value.maybe_processed, len(wire.requests))


async def test_transport_message_is_redacted() -> None:
    """A key in the transport's message is masked."""
    with pytest.raises(APIConnectionError, match=r"illegal header \*\*\*; it may|illegal header \*\*\*$"):
        await GET(failing(httpx.LocalProtocolError(f"illegal header {KEY}")).client())


def in_turn(*outcomes: httpx.Response | httpx.RequestError) -> Wire:
    """Return a wire that produces the given outcomes, one per attempt."""
    left = list(outcomes)

    def handler(request: httpx.Request) -> httpx.Response:
        outcome = left.pop(0)
        if isinstance(outcome, httpx.RequestError):
            raise outcome
        return outcome

    return Wire(handler)


async def test_maybe_processed_covers_all_attempts() -> None:
    """An earlier attempt may have been processed, even if the last one could not connect."""
    wire = in_turn(httpx.ReadError("reset"), httpx.ConnectError("refused"))
    with pytest.raises(APIConnectionError, match="refused") as caught:
        await DELETE(wire.client(retry=RetryPolicy(attempts=2, backoff=0.0)))
    assert caught.value.maybe_processed


@pytest.mark.parametrize("status", [429, 503])
async def test_maybe_processed_ignores_refused_attempts(status: int) -> None:
    """A request that was refused was not processed."""
    wire = in_turn(httpx.Response(status, headers=OWN), httpx.ConnectError("refused"))
    with pytest.raises(APIConnectionError) as caught:
        await POST(wire.client(retry=RetryPolicy(attempts=2, backoff=0.0)))
    assert (False, False) == (caught.value.maybe_processed, "processed" in str(caught.value))
    assert 2 == len(wire.requests)


async def test_post_with_a_503_from_a_proxy() -> None:
    """The service may have processed the POST, so it is not retried, and the error says so."""
    wire = in_turn(httpx.Response(503, headers={"Retry-After": "0"}))
    with pytest.raises(ServerError, match="may have been processed anyway: check before") as caught:
        await POST(wire.client(retry=AT_ONCE))
    assert (503, 1) == (caught.value.status_code, len(wire.requests))


async def test_conflict_after_a_retry() -> None:
    """The error says that an earlier attempt of the same call may have created the hook."""
    wire = in_turn(httpx.Response(503, headers=OWN), httpx.Response(409, text="Duplicate hook"))
    with pytest.raises(DuplicateHookError, match="An earlier attempt of this call may have created the hook"):
        await POST(wire.client(retry=AT_ONCE))


@pytest.mark.parametrize(
    ("first", "body"), [(429, b"hook not found"), (500, b"API key not found"), (500, b"<html>404</html>")]
)
async def test_delete_with_404_on_a_retry(first: int, body: bytes) -> None:
    """A 404 on a retry is an error if the first attempt was refused, or if the 404 is not about the hook."""
    wire = in_turn(httpx.Response(first, headers=OWN), httpx.Response(404, content=body))
    with pytest.raises(APIStatusError) as caught:
        await DELETE(wire.client(retry=AT_ONCE))
    assert (404, 2) == (caught.value.status_code, caught.value.attempts)


# --------------------------------------------------------------------------- undecodable 2xx responses


async def test_decode_errors_are_plain(lemcal_sandbox: Sandbox) -> None:
    """Decode errors name the call, like all other errors."""
    async with lemcal_sandbox.client() as lemcal:
        for fault in (faults.html_200(), faults.empty_200(), faults.json([{}]), faults.status(200, "{oops")):
            lemcal_sandbox.inject(fault)
            with pytest.raises(ResponseDecodeError, match=r"^GET /meetings: ") as caught:
                await GET(lemcal)
            error = caught.value
            assert ("GET", "/meetings", 200, 1) == (
                error.method,
                error.route,
                error.status_code,
                error.attempts,
            )
            check_plain(error)


async def test_response_over_the_size_limit(lemcal_sandbox: Sandbox) -> None:
    """The rest of the response is not read, and the call is not retried."""
    async with lemcal_sandbox.client(max_response_bytes=1000) as lemcal:
        with pytest.raises(
            ResponseDecodeError, match=r"^GET /meetings: the response is over 1000 bytes"
        ) as caught:
            await GET(lemcal)
        assert lemcal_sandbox.user_id == (await lemcal.me()).id
    check_plain(caught.value)
    assert 2 == len(lemcal_sandbox.requests)


async def test_every_error_of_a_call_is_a_lemcal_error(lemcal_sandbox: Sandbox) -> None:
    """A single except clause catches every error of a call."""
    lemcal_sandbox.inject(faults.status(500))
    lemcal_sandbox.inject(faults.reset_before_processing())
    lemcal_sandbox.inject(faults.html_200())
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        for _ in range(3):
            with pytest.raises(LemcalError):
                await lemcal.me()


async def test_one_call_is_one_request(lemcal_sandbox: Sandbox) -> None:
    """Without retries and a limiter, each call sends exactly one request."""
    lemcal_sandbox.inject(faults.status(500))
    async with lemcal_sandbox.client(retry=ONCE, limiter=Unlimited()) as lemcal:
        with pytest.raises(ServerError):
            await lemcal.me()
        user: Any = (await lemcal.request("GET", "/me")).data
    assert json.dumps(lemcal_sandbox.user_id) == json.dumps(user["_id"])
    assert [500, 200] == [seen.status_code for seen in lemcal_sandbox.requests]


async def test_message_of_the_cause() -> None:
    """An exception without a message, as for an untrusted certificate on trio, gets that of its cause."""
    failure = httpx.ConnectError("")
    failure.__cause__ = OSError("certificate verify failed:\nself-signed")
    with pytest.raises(
        APIConnectionError, match=r"no response from api\.lemcal\.com: certificate verify failed: self"
    ):
        await GET(failing(failure).client())


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (
            httpx.ConnectError("refused"),
            "refused; check the base URL, the network and any proxy, or try again later",
        ),
        (httpx.ReadError("reset"), "reset; try again later"),
        (httpx.ReadTimeout(""), r"\(timeout=\); try again later, or allow more time"),
    ],
)
async def test_advice_without_a_response(failure: httpx.RequestError, advice: str) -> None:
    """The error of a GET says what to do."""
    with pytest.raises(APIConnectionError, match=f"{advice}$"):
        await GET(failing(failure).client(retry=RetryPolicy(attempts=1)))
