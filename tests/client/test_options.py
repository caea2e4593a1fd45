"""Siblings for other accounts, views with other options, key rotation, and rate-limit snapshots."""

import contextlib
import inspect
import os
import re
import subprocess
import sys

import anyio
import httpx
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy, __version__
from lemcal_async.errors import (
    APITimeoutError,
    AuthenticationError,
    ConfigurationError,
    DeadlineExceededError,
    HookNotFoundError,
    ServerError,
)
from lemcal_async.ratelimit import LocalRateLimiter, RateLimit, Unlimited
from lemcal_async.sandbox import Sandbox, faults

from .conftest import AT_ONCE, KEY, ONCE, TARGET, USER_ID, Wire

pytestmark = pytest.mark.anyio

OTHER_USER, OTHER_KEY = "usr_other", "second-key-77"


def basic(user_id: str, api_key: str) -> str:
    """Return the Authorization header that httpx would send."""
    return httpx.BasicAuth(user_id, api_key)._auth_header


# --------------------------------------------------------------------------- credentials


async def test_from_the_environment(lemcal_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials come from the environment, unless they are passed as arguments."""
    monkeypatch.setenv("LEMCAL_USER_ID", lemcal_sandbox.user_id)
    monkeypatch.setenv("LEMCAL_API_KEY", lemcal_sandbox.api_key)
    async with AsyncLemcal(base_url=lemcal_sandbox.base_url) as lemcal:
        assert lemcal_sandbox.user_id == (await lemcal.me()).id
    wire = Wire()
    await AsyncLemcal(OTHER_USER, OTHER_KEY, transport=wire).me()
    assert basic(OTHER_USER, OTHER_KEY) == wire.requests[0].headers["authorization"]


async def test_base_url_from_the_environment(
    lemcal_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is validated like the argument; the argument takes precedence."""
    account = (lemcal_sandbox.user_id, lemcal_sandbox.api_key)
    monkeypatch.setenv("LEMCAL_BASE_URL", f" {lemcal_sandbox.base_url}/\n")
    async with AsyncLemcal(*account) as lemcal:
        assert lemcal_sandbox.user_id == (await lemcal.me()).id
    assert "at https://example.com/api>" in repr(AsyncLemcal(*account, base_url="https://example.com/api"))
    monkeypatch.setenv("LEMCAL_BASE_URL", "http://hush@example.com")
    with pytest.raises(ConfigurationError, match=r"^LEMCAL_BASE_URL must not contain credentials") as caught:
        AsyncLemcal(*account)
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("LEMCAL_BASE_URL", "")
    assert "at https://api.lemcal.com/api/lemcal>" in repr(AsyncLemcal(*account))


async def test_for_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """``for_accounts`` ignores the environment and makes no calls itself; its siblings do."""
    monkeypatch.setenv("LEMCAL_USER_ID", USER_ID)
    monkeypatch.setenv("LEMCAL_API_KEY", KEY)
    wire, limiter = Wire(), LocalRateLimiter(limit=5, period=60)
    async with AsyncLemcal.for_accounts(transport=wire, limiter=limiter, user_agent="agency/1") as root:
        with pytest.raises(ConfigurationError, match=r"no account: use the client that for_account\("):
            await root.me()
        assert "<AsyncLemcal without an account at https://api.lemcal.com/api/lemcal>" == repr(root)
        assert [] == wire.requests
        client = root.for_account(OTHER_USER, OTHER_KEY)
        await client.me()
    (request,) = wire.requests
    assert basic(OTHER_USER, OTHER_KEY) == request.headers["authorization"]
    assert request.headers["user-agent"].endswith(" agency/1")
    assert 4 == client.rate_limit.remaining
    with pytest.raises(ConfigurationError, match="is closed"):
        await client.me()


async def test_the_user_agent() -> None:
    """The app's name follows the SDK's, on views and siblings too."""
    wire = Wire()
    lemcal = wire.client(user_agent=" myapp/2.1 (ops@example.com)")
    await lemcal.with_options(deadline=5).me()
    await lemcal.for_account(OTHER_USER, OTHER_KEY).me()
    await wire.client().me()
    sdk = f"lemcal-async/{__version__}"
    assert [f"{sdk} myapp/2.1 (ops@example.com)"] * 2 + [sdk] == [
        request.headers["user-agent"] for request in wire.requests
    ]


@pytest.mark.parametrize("name", ["", " ", "my\napp", "müapp", 7])
def test_invalid_user_agent(name: object) -> None:
    """Text that cannot be sent, or would add a header, is refused."""
    with pytest.raises(ConfigurationError, match=r"^user_agent="):
        Wire().client(user_agent=name)


LOGGING = """
import sys, logging
if sys.argv[1:]:
    logging.basicConfig(format="mine: %(message)s")
import anyio, httpx
from lemcal_async import AsyncLemcal
wire = httpx.MockTransport(lambda _: httpx.Response(200, json={"_id": "usr_1"}))
anyio.run(AsyncLemcal("usr_1", "hush-hush", transport=wire).me)
"""


@pytest.mark.parametrize(
    ("level", "arguments", "expected"),
    [
        ("debug", [], r"\d{4}-.* DEBUG lemcal_async: GET /me: 200 on attempt 1\n"),
        (" INFO ", [], ""),
        ("", [], ""),
        ("debug", ["handlers"], "mine: GET /me: 200 on attempt 1\n"),
        ("loud", [], r"(?s).*LEMCAL_LOG must be one of debug, info, warning, error\n"),
    ],
)
def test_log_variable(level: str, arguments: list[str], expected: str) -> None:
    """LEMCAL_LOG logs to standard error, or to the program's own handlers if there are any."""
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, *arguments],
        env={**os.environ, "LEMCAL_LOG": level},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert re.fullmatch(expected, done.stderr)
    assert ("loud" == level) == (done.returncode != 0)


async def test_combined_credentials(lemcal_sandbox: Sandbox) -> None:
    """The API key can contain the user id."""
    combined = f"{lemcal_sandbox.user_id}:{lemcal_sandbox.api_key}"
    async with AsyncLemcal(api_key=combined, base_url=lemcal_sandbox.base_url) as lemcal:
        assert lemcal_sandbox.user_id == (await lemcal.me()).id


async def test_rotation(lemcal_sandbox: Sandbox) -> None:
    """The function is called before each call, so a new key needs no restart."""
    current = ["outdated"]
    async with lemcal_sandbox.client(api_key=lambda: current[0]) as lemcal:
        with pytest.raises(AuthenticationError):
            await lemcal.me()
        current[0] = lemcal_sandbox.api_key
        assert lemcal_sandbox.user_id == (await lemcal.me()).id


async def test_rotation_during_a_call(lemcal_sandbox: Sandbox) -> None:
    """After a 401, the call is repeated once if the function returns another key."""
    keys = iter(["outdated", lemcal_sandbox.api_key])
    async with lemcal_sandbox.client(api_key=lambda: next(keys)) as lemcal:
        await lemcal.hooks.create(TARGET, any_meeting_type=True)
    assert [401, 200] == [seen.status_code for seen in lemcal_sandbox.requests]
    assert 1 == len(lemcal_sandbox.hooks())


async def test_rotation_is_attempted_once(lemcal_sandbox: Sandbox) -> None:
    """A function that returns a new invalid key each time is not called forever."""
    keys = iter(f"wrong{number}" for number in range(9))
    async with lemcal_sandbox.client(api_key=lambda: next(keys)) as lemcal:
        with pytest.raises(AuthenticationError) as caught:
            await lemcal.me()
    assert 1 == caught.value.attempts  # with the last key
    assert 2 == len(lemcal_sandbox.requests)
    assert "wrong2" == next(keys)


async def test_no_rotation(lemcal_sandbox: Sandbox) -> None:
    """The same key is not tried twice."""
    for key in ("wrong", lambda: "wrong"):
        async with lemcal_sandbox.client(api_key=key) as lemcal:
            with pytest.raises(AuthenticationError):
                await lemcal.me()
    assert 2 == len(lemcal_sandbox.requests)


async def test_delete_after_rotation(lemcal_sandbox: Sandbox) -> None:
    """The attempt with the 401 deleted nothing, so a 404 is an error."""
    keys = iter(["outdated", lemcal_sandbox.api_key])
    async with lemcal_sandbox.client(api_key=lambda: next(keys), retry=AT_ONCE) as lemcal:
        with pytest.raises(HookNotFoundError):
            await lemcal.hooks.delete("hoo_1")


async def test_failing_key_function() -> None:
    """The function's exception propagates, and nothing is sent."""

    def broken() -> str:
        raise LookupError("the vault is sealed")

    wire = Wire()
    lemcal = wire.client(api_key=broken)  # not called yet
    with pytest.raises(LookupError, match="the vault is sealed"):
        await lemcal.me()
    with pytest.raises(LookupError, match="the vault is sealed"):
        _ = lemcal.rate_limit
    with pytest.raises(ConfigurationError, match="must return a string, not int"):
        await wire.client(api_key=lambda: 5).me()
    assert [] == wire.requests


# --------------------------------------------------------------------------- for_account


async def test_for_account() -> None:
    """A sibling uses the same wire, with its own credentials."""
    wire = Wire()
    first = wire.client()
    second = first.for_account(OTHER_USER, OTHER_KEY)
    await first.me()
    await second.me()
    await first.me()
    assert [basic(USER_ID, KEY), basic(OTHER_USER, OTHER_KEY), basic(USER_ID, KEY)] == [
        request.headers["authorization"] for request in wire.requests
    ]


async def test_for_account_returns_its_own_data() -> None:
    """Against a real server, a sibling gets only its own account's data."""
    with Sandbox(accounts=2).serve() as sandbox:
        mine, theirs = sandbox.accounts
        async with sandbox.client() as lemcal:
            sibling = lemcal.for_account(None, f"{theirs.user_id}:{theirs.api_key}")
            assert theirs.email == (await sibling.me()).email
            assert mine.email == (await lemcal.me()).email
            assert {theirs.user_id} == {meeting.user_id for meeting in await sibling.meetings.list()}


async def test_for_account_keeps_the_options() -> None:
    """A sibling inherits the base URL, deadline, retries and ``on_bad_row``."""
    with Sandbox(accounts=2).serve() as sandbox:
        theirs = sandbox.accounts[1]
        async with sandbox.client(on_bad_row="skip", retry=ONCE) as lemcal:
            sibling = lemcal.with_options(deadline=0.1).for_account(theirs.user_id, theirs.api_key)
            sandbox.inject(faults.json([{}]))
            assert [] == await sibling.meetings.list()
            sandbox.inject(faults.status(500))
            with pytest.raises(ServerError):
                await sibling.me()
            sandbox.inject(faults.slow(30))
            with pytest.raises(DeadlineExceededError):
                await sibling.me()


async def test_for_account_has_its_own_rate_limit() -> None:
    """In the same limiter, a paused account does not delay another."""
    with Sandbox(accounts=2).serve() as sandbox:
        theirs = sandbox.accounts[1]
        async with sandbox.client() as lemcal:
            sibling = lemcal.for_account(theirs.user_id, theirs.api_key)
            sandbox.inject(faults.too_many_requests("86400"))
            with contextlib.suppress(Exception):
                await lemcal.me()
            assert 0 == lemcal.rate_limit.remaining
            assert 20 == sibling.rate_limit.remaining
            assert theirs.user_id == (await sibling.me()).id
            # Two clients of one account share their rate limit.
            assert 0 == sandbox.client().rate_limit.remaining


async def test_for_account_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One account's key is never sent with another account's user id."""
    monkeypatch.setenv("LEMCAL_USER_ID", USER_ID)
    monkeypatch.setenv("LEMCAL_API_KEY", KEY)
    wire = Wire()
    lemcal = AsyncLemcal(transport=wire)
    with pytest.raises(ConfigurationError, match="no user id"):
        lemcal.for_account(None, OTHER_KEY)
    with pytest.raises(ConfigurationError, match="api_key"):
        lemcal.for_account(OTHER_USER, "")
    await lemcal.for_account(OTHER_USER, OTHER_KEY).me()
    assert [basic(OTHER_USER, OTHER_KEY)] == [request.headers["authorization"] for request in wire.requests]


async def test_for_account_after_its_parent_is_closed(lemcal_sandbox: Sandbox) -> None:
    """A sibling works while its parent is open, closes nothing itself, and then raises ConfigurationError."""
    async with lemcal_sandbox.client() as lemcal:
        async with lemcal.for_account(lemcal_sandbox.user_id, lemcal_sandbox.api_key) as sibling:
            await sibling.me()
        await sibling.aclose()
        await sibling.me()
        await lemcal.me()
    for closed in (sibling, lemcal, lemcal.with_options(deadline=1)):
        with pytest.raises(ConfigurationError, match="this client or its parent is closed"):
            await closed.me()
        with pytest.raises(ConfigurationError, match="is closed"):
            async with closed:
                raise AssertionError
    with pytest.raises(ConfigurationError, match="is closed"):
        await lemcal.for_account(lemcal_sandbox.user_id, lemcal_sandbox.api_key).hooks.delete("hoo_1")
    assert 3 == len(lemcal_sandbox.requests)


def test_siblings_share_the_transport_stack() -> None:
    """A sibling needs no new SSL context or pool: it uses its parent's layers."""
    lemcal = AsyncLemcal(USER_ID, KEY)
    sibling = lemcal.for_account(OTHER_USER, OTHER_KEY)
    assert lemcal._session.stack is sibling._session.stack is sibling.with_options()._session.stack


# --------------------------------------------------------------------------- with_options


async def test_with_timeout(lemcal_sandbox: Sandbox) -> None:
    """The timeout applies to each network operation, in seconds or as ``httpx.Timeout``."""
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        lemcal_sandbox.inject(faults.slow(30), times=2)
        for timeout in (0.05, httpx.Timeout(5, read=0.05)):
            with pytest.raises(APITimeoutError):
                await lemcal.with_options(timeout=timeout).me()
        await lemcal.me()


async def test_timeouts_reach_the_wire() -> None:
    """Timeouts are passed in the form that httpx uses; None means no timeout."""
    wire = Wire()
    lemcal = wire.client()
    for view in (
        lemcal,
        lemcal.with_options(timeout=5),
        lemcal.with_options(timeout=None),
        lemcal.with_options(timeout=httpx.Timeout(1, pool=None)),
    ):
        await view.me()
    assert [
        dict.fromkeys(["connect", "read", "write", "pool"], 30.0),
        dict.fromkeys(["connect", "read", "write", "pool"], 5),
        dict.fromkeys(["connect", "read", "write", "pool"], None),
        {"connect": 1, "read": 1, "write": 1, "pool": None},
    ] == [request.extensions["timeout"] for request in wire.requests]


async def test_with_deadline(lemcal_sandbox: Sandbox) -> None:
    """A view's deadline is removed by None."""
    lemcal_sandbox.inject(faults.slow(0.25), times=2)
    async with lemcal_sandbox.client() as lemcal:
        impatient = lemcal.with_options(deadline=0.1)
        with pytest.raises(DeadlineExceededError):
            await impatient.me()
        assert lemcal_sandbox.user_id == (await impatient.with_options(deadline=None).me()).id


async def test_with_retry(lemcal_sandbox: Sandbox) -> None:
    """A view has its own retry policy; None means the default policy."""
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        lemcal_sandbox.inject(faults.status(500), times=3)
        with pytest.raises(ServerError):
            await lemcal.me()
        await lemcal.with_options(retry=RetryPolicy(attempts=3, backoff=0.0)).me()
        lemcal_sandbox.inject(faults.reset_before_processing())
        await lemcal.with_options(retry=None).me()
    assert [500, 500, 500, 200, None, 200] == [seen.status_code for seen in lemcal_sandbox.requests]


async def test_with_priority(lemcal_sandbox: Sandbox) -> None:
    """Interactive calls overtake bulk calls."""
    limiter = LocalRateLimiter(limit=1, period=0.5)
    async with lemcal_sandbox.client(limiter=limiter) as lemcal:
        bulk = lemcal.with_options(priority="bulk")
        await lemcal.me()
        async with anyio.create_task_group() as group:
            group.start_soon(bulk.meetings.list)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(bulk.with_options(priority="interactive").meeting_types.list)
    assert ["/me", "/meetingTypes", "/meetings"] == [seen.path for seen in lemcal_sandbox.requests]


async def test_with_options_keeps_other_options(lemcal_sandbox: Sandbox) -> None:
    """Views accumulate options; the client itself does not change."""
    lemcal_sandbox.inject(faults.slow(30), times=3)
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        view = lemcal.with_options(timeout=0.1).with_options(priority="bulk").with_options(deadline=20)
        with pytest.raises(APITimeoutError) as caught:
            await view.me()
        assert 1 == caught.value.attempts
        with pytest.raises(DeadlineExceededError):
            await view.with_options(timeout=None, deadline=0.1).me()
        with pytest.raises(APITimeoutError):
            await view.with_options().me()
        await lemcal.me()


def test_signature_of_with_options() -> None:
    """Options for which None is a valid value default to UNCHANGED."""
    assert "deadline: float | lemcal_async._client.Unchanged | None = UNCHANGED" in str(
        inspect.signature(AsyncLemcal.with_options)
    )


async def test_view_shares_the_key_function() -> None:
    """A view calls the same key function and uses the same account."""
    calls: list[int] = []

    def key() -> str:
        calls.append(1)
        return KEY

    wire = Wire()
    lemcal = wire.client(api_key=key)
    await lemcal.with_options(deadline=5).me()
    assert [basic(USER_ID, KEY)] == [request.headers["authorization"] for request in wire.requests]
    assert calls


class MyLemcal(AsyncLemcal):
    """A subclass, as a user may define."""


def test_views_have_the_same_class() -> None:
    """Views and siblings of a subclass are instances of it."""
    lemcal = MyLemcal(USER_ID, KEY)
    assert isinstance(lemcal.with_options(deadline=1), MyLemcal)
    assert isinstance(lemcal.for_account(OTHER_USER, OTHER_KEY), MyLemcal)


# --------------------------------------------------------------------------- rate_limit


async def test_rate_limit(lemcal_sandbox: Sandbox) -> None:
    """The snapshot starts at the full limit, decreases with each call, and shows the pause after a 429."""
    async with lemcal_sandbox.client(retry=ONCE) as lemcal:
        assert RateLimit(20, 20, resets_in=0.0, queued=0, paused_for=0.0) == lemcal.rate_limit
        await lemcal.me()
        await lemcal.me()
        after = lemcal.rate_limit
        assert (20, 18, 0, 0.0) == (after.limit, after.remaining, after.queued, after.paused_for)
        assert 0 < after.resets_in < 3
        lemcal_sandbox.inject(faults.too_many_requests("40"))
        with contextlib.suppress(Exception):
            await lemcal.me()
        paused = lemcal.rate_limit
        assert 0 == paused.remaining
        assert paused.paused_for == pytest.approx(40, abs=2)


async def test_rate_limit_shows_the_queue(lemcal_sandbox: Sandbox) -> None:
    """The snapshot has the number of queued calls."""
    async with lemcal_sandbox.client(limiter=LocalRateLimiter(limit=1, period=30)) as lemcal:
        await lemcal.me()
        async with anyio.create_task_group() as group:
            group.start_soon(lemcal.me)
            group.start_soon(lemcal.me)
            await anyio.wait_all_tasks_blocked()
            assert (1, 0, 2) == (
                lemcal.rate_limit.limit,
                lemcal.rate_limit.remaining,
                lemcal.rate_limit.queued,
            )
            group.cancel_scope.cancel()
        assert 0 == lemcal.rate_limit.queued


def test_rate_limit_without_a_limiter() -> None:
    """Without a limiter, the snapshot has no limits."""
    assert RateLimit(None, None, resets_in=0.0, queued=0, paused_for=0.0) == (
        Wire().client(limiter=Unlimited()).rate_limit
    )


# --------------------------------------------------------------------------- user_id and rate_limit_key


def test_user_id_and_rate_limit_key() -> None:
    """The rate-limit key is the same for all clients with the same credentials, and contains no secret."""
    lemcal = Wire().client()
    other = lemcal.for_account(OTHER_USER, OTHER_KEY)
    assert (USER_ID, OTHER_USER) == (lemcal.user_id, other.user_id)
    assert (
        lemcal.rate_limit_key
        == Wire().client().rate_limit_key
        == lemcal.with_options(deadline=1).rate_limit_key
    )
    assert lemcal.rate_limit_key not in (
        other.rate_limit_key,
        lemcal.for_account(USER_ID, OTHER_KEY).rate_limit_key,
    )
    assert KEY not in repr(lemcal.rate_limit_key)


def test_user_id_without_a_key() -> None:
    """If no user id was given and the key function returns no key, ``user_id`` raises an error."""
    lemcal = Wire().client(user_id=None, api_key=lambda: "")
    with pytest.raises(ConfigurationError):
        _ = lemcal.user_id
    assert "<AsyncLemcal an account at " in repr(lemcal)


async def test_given_user_id_with_a_key_function() -> None:
    """A given user id is known without calling the function; another one from it is refused at the call."""

    def no_key() -> str:
        raise LookupError("the vault is sealed")

    lemcal = Wire().client().for_account(f" {OTHER_USER}\n", no_key)
    assert OTHER_USER == lemcal.user_id
    assert f"<AsyncLemcal {OTHER_USER} at " in repr(lemcal)
    wire = Wire()
    lemcal = wire.client(api_key=lambda: f"{OTHER_USER}:{OTHER_KEY}")
    assert USER_ID == lemcal.user_id
    with pytest.raises(ConfigurationError, match=f"user_id is {USER_ID}, but .* belongs to {OTHER_USER}"):
        await lemcal.me()
    assert [] == wire.requests
