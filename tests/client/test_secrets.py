"""Only the server ever sees the API key and the webhook token."""

import asyncio
import logging
import pickle
import re
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from lemcal_async import AsyncLemcal, Hook
from lemcal_async.errors import (
    APIConnectionError,
    AuthenticationError,
    ConfigurationError,
    DeadlineExceededError,
    LemcalError,
    ResponseDecodeError,
    ServerError,
)
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox.faults import Fault

from .conftest import AT_ONCE, KEY, ONCE, TARGET, TOKEN, USER_ID, Wire, failing, responding, unused_base_url

pytestmark = pytest.mark.anyio


def basic_of(user_id: str, api_key: str) -> str:
    """Return the base64 part of a Basic Authorization header."""
    return httpx.BasicAuth(user_id, api_key)._auth_header.removeprefix("Basic ")


def check_no_secrets(text: str, *secrets: str) -> None:
    """Check that a text contains none of the secrets, ignoring case."""
    for secret in (KEY, TOKEN, basic_of(USER_ID, KEY), *secrets):
        assert secret.lower() not in text.lower()


def everything_of(error: BaseException) -> str:
    """Return everything a program might show of an error, including a traceback with local variables.

    Frames of the tests are omitted: the caller is responsible for the secrets in its own variables.
    """
    rendered = traceback.TracebackException.from_exception(error, capture_locals=True)
    for frame in rendered.stack:
        if "/tests/" in frame.filename:
            frame.locals = None
    assert any(frame.locals for frame in rendered.stack)  # otherwise, this would check nothing
    assert rendered.__cause__ is rendered.__context__ is None
    texts = [str(error), repr(error), repr(vars(error)), "".join(rendered.format())]
    return "\n".join([*texts, repr(pickle.dumps(error))])


# --------------------------------------------------------------------------- repr and pickle


def test_repr_of_a_client() -> None:
    """The repr contains the user id and the base URL, but no secret."""
    for lemcal in (
        AsyncLemcal(USER_ID, KEY),
        AsyncLemcal(api_key=f"{USER_ID}:{KEY}"),
        AsyncLemcal(api_key=basic_of(USER_ID, KEY)),
        AsyncLemcal(USER_ID, lambda: KEY),
        AsyncLemcal("usr_1", "k1").for_account(USER_ID, KEY).with_options(deadline=1),
    ):
        for text in (str(lemcal), repr(lemcal), f"{lemcal}", repr(lemcal.rate_limit), repr(lemcal.hooks)):
            check_no_secrets(text)
        assert "https://api.lemcal.com" in repr(lemcal)
    assert USER_ID in repr(AsyncLemcal(USER_ID, KEY))


def test_client_cannot_be_pickled() -> None:
    """Neither a client nor a view can be pickled; the error says why."""
    for lemcal in (AsyncLemcal(USER_ID, KEY), AsyncLemcal(USER_ID, KEY).with_options(deadline=1)):
        with pytest.raises(TypeError, match="cannot be pickled: it holds an API key") as caught:
            pickle.dumps(lemcal)
        check_no_secrets(str(caught.value))


def test_parts_of_a_client_cannot_be_pickled() -> None:
    """No part of a client can be pickled."""
    lemcal = AsyncLemcal(USER_ID, KEY)
    for part in (lemcal._session, lemcal.meetings, lemcal._session._authorize()):
        with pytest.raises(TypeError):
            pickle.dumps(part)


async def test_repr_of_a_hook() -> None:
    """The repr omits the token in the target URL."""
    hook = (
        await responding(json={"_id": "hoo_1", "targetUrl": TARGET})
        .client()
        .hooks.create(TARGET, any_meeting_type=True)
    )
    assert TARGET == hook.target_url
    assert "https://example.com/lemcal?..." in repr(hook)
    check_no_secrets(repr(hook))
    check_no_secrets(str([hook]))


# --------------------------------------------------------------------------- logs


async def test_logs(lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """No logger, including those of libraries and the event loop, logs a secret, even at the lowest level."""
    secrets = (lemcal_sandbox.api_key, basic_of(lemcal_sandbox.user_id, lemcal_sandbox.api_key))
    with caplog.at_level(0):
        async with lemcal_sandbox.client(retry=AT_ONCE, on_bad_row="skip") as lemcal:
            lemcal_sandbox.inject(faults.status(500, f"key {lemcal_sandbox.api_key}"))
            lemcal_sandbox.inject(faults.too_many_requests("0.01"))
            lemcal_sandbox.inject(faults.reset_before_processing())
            lemcal_sandbox.inject(faults.json([{"name": TOKEN}]))
            await lemcal.meetings.list()
            hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
            await lemcal.hooks.delete(hook.id)
            sibling = lemcal.for_account(USER_ID, KEY)
            with pytest.raises(AuthenticationError):
                await sibling.me()
    names = {record.name for record in caplog.records}
    assert {"lemcal_async", "lemcal_async.retry", "lemcal_async.ratelimit"} <= names
    for record in caplog.records:
        check_no_secrets(f"{record.getMessage()} {record.args!r} {vars(record)!r}", *secrets)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("lemcal_"))
    for line in (
        "GET /meetings: 500 on attempt 1 of 5; retrying in 0 s",
        "GET /meetings: 200 on attempt 4",
        "DELETE /hooks/{id}: 204 on attempt 1",
    ):
        assert line in ours


async def test_log_of_calls_without_a_response(caplog: pytest.LogCaptureFixture) -> None:
    """Each call that fails or is canceled is logged as one line, with the error's class and the attempts."""
    caplog.set_level(logging.DEBUG, "lemcal_async")
    with pytest.raises(APIConnectionError):
        await failing(httpx.ReadError(f"reset {KEY}")).client(retry=AT_ONCE).me()
    hanging = httpx.MockTransport(lambda _: anyio.sleep_forever())  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceededError):
        await Wire().client(transport=hanging, deadline=0.05).meetings.list()
    with anyio.move_on_after(0.05):
        await Wire().client(transport=hanging).hooks.create(TARGET, any_meeting_type=True)
    limiter = LocalRateLimiter(limit=1, period=60)
    lemcal = Wire().client(limiter=limiter, deadline=5)
    await lemcal.me()
    with pytest.raises(DeadlineExceededError):
        await lemcal.me()
    lines = [each.getMessage() for each in caplog.records if each.name == "lemcal_async"]
    assert [
        "GET /me: APIConnectionError; attempts: 5",
        "GET /meetings: DeadlineExceededError; attempts: 1",
        "POST /hooks: Cancelled; attempts: 1",
        "GET /me: 200 on attempt 1",
        "GET /me: DeadlineExceededError; attempts: 0",
    ] == lines


def test_no_handlers() -> None:
    """The library installs no log handlers."""
    assert [] == logging.getLogger("lemcal_async").handlers


# --------------------------------------------------------------------------- errors

Do = Callable[[AsyncLemcal], Awaitable[object]]


async def create(lemcal: AsyncLemcal) -> object:
    """Send a token with ``hooks.create``."""
    return await lemcal.hooks.create(TARGET, any_meeting_type=True)


async def request(lemcal: AsyncLemcal) -> object:
    """Send a token with ``request``."""
    return await lemcal.request("POST", "/hooks", json={"targetUrl": TARGET}, into=Hook)


async def error_of(do: Do, lemcal: AsyncLemcal, kind: type[LemcalError]) -> str:
    """Return everything a program might show of the error that a call raises."""
    with pytest.raises(kind) as caught:
        await do(lemcal)
    return everything_of(caught.value)


@pytest.mark.parametrize("do", [create, request])
async def test_connection_failure(do: Do) -> None:
    """The error shows no secret, although the request is in local variables."""
    async with AsyncLemcal(USER_ID, KEY, base_url=unused_base_url(), retry=AT_ONCE) as lemcal:
        check_no_secrets(await error_of(do, lemcal, APIConnectionError))
        check_no_secrets(await error_of(lambda lemcal: lemcal.me(), lemcal, APIConnectionError))


@pytest.mark.parametrize("do", [create, request])
@pytest.mark.parametrize("failure", [httpx.ReadError(f"reset {KEY}"), httpx.ReadTimeout("")])
async def test_broken_connection(do: Do, failure: httpx.RequestError) -> None:
    """The error shows no secret, even if the transport's message contains one."""
    check_no_secrets(await error_of(do, failing(failure).client(), APIConnectionError))


@pytest.mark.parametrize("do", [create, request])
@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AuthenticationError), (400, LemcalError), (409, LemcalError), (500, ServerError)],
)
async def test_error_response_that_echoes_secrets(do: Do, status: int, kind: type[LemcalError]) -> None:
    """Secrets in the server's message, headers and body are not shown."""
    words = f"{USER_ID}:{KEY} {basic_of(USER_ID, KEY)} cannot have {TARGET}"
    wire = responding(status, json={"error": words}, headers={"X-Echo": basic_of(USER_ID, KEY)})
    check_no_secrets(await error_of(do, wire.client(), kind))


@pytest.mark.parametrize("do", [create, request])
@pytest.mark.parametrize(
    "content",
    [
        f'{{"targetUrl": "{TARGET}"}}',
        f'{{"targetUrl": "{TARGET}',
        f'[{{"targetUrl": "{TARGET}", "key": "{KEY}"}}]',
        f'"{TARGET} {KEY}"',
        f"<html><title>{TARGET} {KEY}</title></html>",
        f'{{"_id": ["{KEY}"], "createdAt": "{KEY}", "targetUrl": "{TARGET}"}}',
    ],
)
async def test_undecodable_response(do: Do, content: str) -> None:
    """A decode error describes the problem with the body, without its content."""
    check_no_secrets(await error_of(do, responding(content=content).client(), ResponseDecodeError))


@pytest.mark.parametrize("do", [create, request])
async def test_response_over_the_size_limit(do: Do) -> None:
    """The error does not show the part of the body that was read."""
    wire = responding(content=f'{{"targetUrl": "{TARGET}", "key": "{KEY}"}}')
    check_no_secrets(await error_of(do, wire.client(max_response_bytes=10), ResponseDecodeError))


@pytest.mark.parametrize("do", [create, request])
@pytest.mark.parametrize(
    "fault",
    [faults.slow(30), faults.status(503, headers={"Retry-After": "20"}), faults.too_many_requests("20")],
)
async def test_exceeded_deadline(lemcal_sandbox: Sandbox, do: Do, fault: Fault) -> None:
    """The error shows no secret, whichever layer raises it."""
    lemcal_sandbox.inject(fault)
    async with lemcal_sandbox.client(deadline=0.1) as lemcal:
        text = await error_of(do, lemcal, DeadlineExceededError)
    check_no_secrets(text, lemcal_sandbox.api_key, basic_of(lemcal_sandbox.user_id, lemcal_sandbox.api_key))


@pytest.mark.parametrize("do", [create, request])
async def test_deadline_exceeded_in_the_queue(do: Do) -> None:
    """The error shows no secret if nothing was sent."""
    lemcal = Wire().client(limiter=LocalRateLimiter(limit=1, period=30), deadline=1)
    await lemcal.me()
    check_no_secrets(await error_of(do, lemcal, DeadlineExceededError))


async def test_closed_client() -> None:
    """The token, an argument of the refused call, is not shown."""
    lemcal = Wire().client()
    await lemcal.aclose()
    check_no_secrets(await error_of(create, lemcal, ConfigurationError))


def frames_of(error: BaseException) -> str:
    """Return all frames reachable from an error, with their local variables, except those of this file."""
    shown = []
    seen: set[int] = set()
    remaining: list[BaseException | None] = [error]
    while remaining:
        each = remaining.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        remaining += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
        rendered = traceback.StackSummary.extract(traceback.walk_tb(each.__traceback__), capture_locals=True)
        shown += [f"{frame.filename}:{frame.lineno} {frame.name} {frame.locals}" for frame in rendered]
    return "\n".join(frame for frame in shown if f"{__file__}:" not in frame)


async def cancel_after(turns: int, call: Callable[[], Awaitable[object]]) -> BaseException | None:
    """Cancel a call after some turns of the event loop; return its exception, or None if it had finished."""
    ended: list[BaseException] = []

    async def run() -> None:
        try:
            await call()
        except BaseException as error:
            ended.append(error)
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    return ended[0] if ended else None


EVERY_TURN = pytest.param(range(70), marks=pytest.mark.storm, id="every turn")


@pytest.mark.parametrize("moments", [pytest.param(range(0, 50, 7), id="some turns"), EVERY_TURN])
@pytest.mark.parametrize("do", [create, request])
async def test_canceled_at_any_moment(lemcal_sandbox: Sandbox, do: Do, moments: range) -> None:
    """No frame of the traceback holds a secret, on a new or a reused connection."""
    basic = basic_of(lemcal_sandbox.user_id, lemcal_sandbox.api_key)
    lemcal_sandbox.inject(faults.slow(0.02), times=1_000)
    where: set[str] = set()
    for turns in moments:
        for warm in (False, True):
            async with lemcal_sandbox.client(limiter=Unlimited()) as lemcal:
                if warm:
                    await lemcal.me()
                error = await cancel_after(turns, lambda lemcal=lemcal: do(lemcal))  # type: ignore[misc]
            if error is not None:
                frames = frames_of(error)
                check_no_secrets(frames, lemcal_sandbox.api_key, basic)
                where.add(re.sub(r"\d+", "", frames.rpartition("\n")[2].partition(" {")[0]))
    assert len(where) >= 1
    assert all("/lemcal_async/" in place or "/anyio/" in place for place in where)


async def test_canceled_on_a_transport_with_secrets_in_its_frames() -> None:
    """The transport's frames are removed from the traceback, because their variables cannot be masked."""
    arrived = anyio.Event()

    async def hold(request: httpx.Request) -> httpx.Response:
        everything = (request.headers["authorization"], request.content, KEY)
        arrived.set()
        await anyio.sleep_forever()
        raise AssertionError(everything)

    lemcal = Wire().client(transport=httpx.MockTransport(hold))
    ended: list[BaseException] = []

    async def run() -> None:
        try:
            await create(lemcal)
        except BaseException as error:
            ended.append(error)
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await arrived.wait()
        group.cancel_scope.cancel()
    rendered = traceback.format_tb(ended[0].__traceback__)
    assert "in hold" not in "".join(rendered)
    assert "_layers.py" in rendered[-1]
    check_no_secrets(frames_of(ended[0]))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_timeout(lemcal_sandbox: Sandbox) -> None:
    """The TimeoutError's cause is the cancellation, whose frames hold no secret."""
    lemcal_sandbox.inject(faults.slow(30))
    async with lemcal_sandbox.client(limiter=Unlimited()) as lemcal:
        with pytest.raises(TimeoutError) as caught:
            await asyncio.wait_for(create(lemcal), 0.2)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    frames = frames_of(caught.value)
    check_no_secrets(frames, lemcal_sandbox.api_key, basic_of(lemcal_sandbox.user_id, lemcal_sandbox.api_key))
    assert "/transport/_layers.py:" in frames
    assert not [library for library in ("/h11/", "/httpcore/", "/anyio/") if library in frames]


async def test_the_callers_context_is_kept() -> None:
    """An exception that the program was handling during the call remains the context, with all its frames."""
    lemcal = failing(httpx.ReadError("reset")).client()
    own_error = ValueError("mine")
    try:
        fail(own_error)
    except ValueError:
        with pytest.raises(APIConnectionError) as caught:
            await lemcal.me()
        assert caught.value.__context__ is own_error
    assert "in fail" in "".join(traceback.format_tb(own_error.__traceback__))


def fail(error: Exception) -> None:
    """Raise the error."""
    raise error


async def test_exception_that_passes_through_every_layer() -> None:
    """No layer's frame holds a secret when an exception such as KeyboardInterrupt passes through it."""

    class Stop(BaseException):
        """An exception that no layer handles."""

    def stop(request: httpx.Request) -> httpx.Response:
        raise Stop

    with pytest.raises(Stop) as caught:
        await create(Wire(stop).client(retry=AT_ONCE))
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
    assert len(frames) > 3
    check_no_secrets(repr([frame.locals for frame in frames]))


CREDENTIALS: dict[str, dict[str, Any]] = {
    "user id disagrees": {"user_id": "usr_other", "api_key": f"{USER_ID}:{KEY}"},
    "lemlist style": {"user_id": "", "api_key": KEY},
    "lemlist style, combined": {"user_id": None, "api_key": f":{KEY}"},
    "no user id": {"user_id": None, "api_key": KEY},
    "swapped": {"user_id": KEY, "api_key": USER_ID},
    "contains a space": {"api_key": f"{KEY} {TOKEN}"},
    "function that does not return a string": {"api_key": KEY.encode},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "password in the base URL": {"base_url": f"https://{USER_ID}:{KEY}@example.com"},
    "query in the base URL": {"base_url": f"https://example.com/?apikey={KEY}"},
    "base URL without a host": {"base_url": f"https:///{KEY}"},
    "transport": {"transport": object()},
    "limiter": {"limiter": object()},
    "retry": {"retry": 3},
    "timeout": {"timeout": -1},
    "deadline": {"deadline": 0},
    "on_bad_row": {"on_bad_row": "ignore"},
    "max_response_bytes": {"max_response_bytes": 0},
    "plain http": {"base_url": "http://example.com"},
}


@pytest.mark.parametrize("wrong", [*CREDENTIALS, *SETTINGS])
async def test_configuration_error(wrong: str) -> None:
    """The error shows no secret, whether __init__ or the first call raises it."""
    options = {**CREDENTIALS, **SETTINGS}[wrong]
    wire = Wire()
    with pytest.raises(ConfigurationError) as caught:
        await wire.client(**options).me()
    check_no_secrets(everything_of(caught.value))
    if wrong in CREDENTIALS:
        with pytest.raises(ConfigurationError) as caught:
            await wire.client().for_account(**{"user_id": USER_ID, **options}).me()
        check_no_secrets(everything_of(caught.value))
    assert [] == wire.requests


def test_configuration_error_for_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error contains the variable's name, but not its value."""
    monkeypatch.setenv("LEMCAL_API_KEY", f"{KEY} {TOKEN}")
    with pytest.raises(ConfigurationError, match="LEMCAL_API_KEY") as caught:
        AsyncLemcal()
    check_no_secrets(everything_of(caught.value))


async def test_invalid_hook() -> None:
    """The error does not contain the target URL, which usually contains a token."""
    wire = Wire()
    hooks = wire.client().hooks
    wrong: list[Callable[[], Awaitable[object]]] = [
        lambda: hooks.create(TARGET.replace("https", "ftp"), any_meeting_type=True),
        lambda: hooks.create(f"{TARGET} {KEY}", any_meeting_type=True),
        lambda: hooks.create(TARGET),
        lambda: hooks.create(TARGET, meeting_type_id="met_1", any_meeting_type=True),
        lambda: hooks.create(TARGET, meeting_type_id="met/1"),
        lambda: wire.client().request("POST", "/hooks", json={"targetUrl": TARGET, "set": {1}}),
    ]
    for call in wrong:
        with pytest.raises(ConfigurationError) as caught:
            await call()
        check_no_secrets(everything_of(caught.value))
    assert [] == wire.requests


async def test_failing_key_function_shows_no_earlier_key() -> None:
    """The cached last key is not shown."""
    keys = iter([KEY])
    lemcal = responding(json={"_id": "usr_1"}).client(api_key=lambda: next(keys), retry=ONCE)
    await lemcal.me()
    with pytest.raises(RuntimeError) as caught:
        await lemcal.me()
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
    check_no_secrets(repr([frame.locals for frame in frames]))
