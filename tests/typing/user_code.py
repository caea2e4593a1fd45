"""Typical user code. It is never run; mypy and pyright check that it has the expected types."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import httpx
from fastapi import FastAPI

from lemcal_async import (
    Answer,
    APIResponse,
    AsyncLemcal,
    Attendee,
    Hook,
    Lead,
    Meeting,
    MeetingLocation,
    MeetingType,
    Question,
    RetryPolicy,
    RoundRobin,
    RoundRobinUser,
    User,
    __version__,
    errors,
    events,
    from_wire,
    ratelimit,
    to_wire,
    transport,
)
from lemcal_async.fastapi import Lemcal, add_exception_handlers, get_lemcal, lifespan, webhook_router
from lemcal_async.otel import instrument
from lemcal_async.ratelimit import LocalRateLimiter, RateLimit, RateLimiter, RedisRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sync import Change, MemoryStore, SQLStore, Store, SyncReport, Wake, sync_meetings, watch
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport
from lemcal_async.webhooks import Dedup, InMemoryDedup, Tenant, Wakes, WebhookReceiver


async def calls() -> None:
    """Make every call of the client."""
    async with AsyncLemcal(user_id="usr_1", api_key="k1") as lemcal:
        assert_type(lemcal, AsyncLemcal)
        assert_type(await lemcal.me(), User)
        assert_type(await lemcal.meetings.list(), list[Meeting])
        assert_type(await lemcal.meetings.list("met_1"), list[Meeting])
        assert_type(await lemcal.meetings.list(meeting_type_id=None), list[Meeting])
        assert_type(
            await lemcal.meetings.list("met_1", starts_after=datetime.now(UTC), canceled=False), list[Meeting]
        )
        assert_type(
            await lemcal.meetings.list(starts_before=None, guest_email="a@example.com"), list[Meeting]
        )
        assert_type(await lemcal.meetings.get("mee_1"), Meeting)
        assert_type(await lemcal.meetings.get("mee_1", meeting_type_id="met_1"), Meeting)
        assert_type(await lemcal.meetings.rows("met_1"), list[Any])
        assert_type(await lemcal.meeting_types.list(), list[MeetingType])
        assert_type(await lemcal.meeting_types.get("met_1"), MeetingType)
        assert_type(await lemcal.hooks.create("https://example.com", any_meeting_type=True), Hook)
        assert_type(await lemcal.hooks.create("https://example.com", meeting_type_id="met_1"), Hook)
        assert_type(
            await lemcal.hooks.create("https://example.com", any_meeting_type=True, exist_ok=False), Hook
        )
        assert_type(
            await lemcal.hooks.create("https://example.com", any_meeting_type=True, exist_ok=True),
            Hook | None,
        )
        await lemcal.hooks.delete("hoo_1")
        assert_type(lemcal.rate_limit, RateLimit)
    await lemcal.aclose()


async def any_path(lemcal: AsyncLemcal, params: Mapping[str, str | None]) -> None:
    """Call endpoints that have no method of their own."""
    response = await lemcal.request("GET", "/anything", params=params, json=None, into=None)
    assert_type(response, APIResponse[Any])
    assert_type(response.status_code, int)
    assert_type(response.headers, dict[str, str])
    assert_type(response.data, Any)
    hook = await lemcal.request("POST", "/anything", json={"a": [1, None]}, into=Hook)
    assert_type(hook, APIResponse[Hook])
    found = await lemcal.request("GET", "/meetings", params={"ids": ["a", "b"]}, into=list[Meeting])
    assert_type(found.data, list[Meeting])
    plain = await lemcal.request("GET", "/me", into=dict[str, Any])
    assert_type(plain.data, dict[str, Any])


def current_key() -> str:
    """Return the current API key."""
    return "usr_1:k1"


def clients() -> AsyncLemcal:
    """Create clients in every supported way."""
    AsyncLemcal()
    AsyncLemcal("usr_1", "k1")
    AsyncLemcal(api_key=current_key)
    AsyncLemcal.for_accounts(limiter=LocalRateLimiter(), user_agent="myapp/2.1").for_account("usr_1", "k1")
    lemcal = AsyncLemcal(
        None,
        "usr_1:k1",
        base_url="https://example.com/api",
        transport=httpx.AsyncHTTPTransport(),
        limiter=LocalRateLimiter(limit=20, period=2.0),
        retry=RetryPolicy(attempts=3, max_wait=10.0),
        timeout=httpx.Timeout(5.0, connect=1.0),
        deadline=30,
        on_bad_row="skip",
        max_response_bytes=2**20,
        allow_insecure_http=False,
    )
    assert_type(lemcal.for_account("usr_2", "k2"), AsyncLemcal)
    assert_type(lemcal.for_account(None, current_key), AsyncLemcal)
    assert_type(lemcal.with_options(timeout=None, deadline=None, retry=None, priority="bulk"), AsyncLemcal)
    return lemcal.with_options(deadline=2.5)


class Tracked(AsyncLemcal):
    """A subclass, whose views have its type."""


async def subclass() -> None:
    """Create views of a subclass."""
    async with Tracked("usr_1", "k1") as tracked:
        assert_type(tracked, Tracked)
        assert_type(tracked.with_options(deadline=1), Tracked)
        assert_type(tracked.for_account("usr_2", "k2"), Tracked)


def models(meeting: Meeting, meeting_type: MeetingType, hook: Hook, user: User) -> None:
    """Use the fields of the models."""
    assert_type(meeting.id, str)
    assert_type(meeting.start, datetime | None)
    assert_type(meeting.canceled_at, datetime | None)
    assert_type(meeting.lead, Lead | None)
    assert_type(meeting.attendees, tuple[Attendee, ...])
    assert_type(meeting.answers, tuple[Answer, ...])
    assert_type(meeting.provided_infos, Any)
    assert_type(meeting.extra, dict[str, Any])
    assert_type(meeting.guest, Attendee | Lead | None)
    assert_type(meeting.host, Attendee | None)
    assert_type(meeting.is_canceled, bool)
    assert_type(meeting.duration, timedelta | None)
    if meeting.guest is not None:
        assert_type(meeting.guest.email, str | None)
        assert_type(meeting.guest.name, str | None)
    assert_type(meeting.problems, tuple[str, ...])
    assert_type(meeting_type.booking_url(user, name="Ada", email=None), str)
    assert_type(meeting_type.duration, timedelta | None)
    assert_type(meeting_type.questions, tuple[Question, ...])
    assert_type(meeting_type.meeting_locations, tuple[MeetingLocation, ...])
    assert_type(meeting_type.round_robin, RoundRobin | None)
    if meeting_type.round_robin is not None:
        assert_type(meeting_type.round_robin.users, tuple[RoundRobinUser, ...])
    assert_type(hook.target_url, str | None)
    assert_type(hook.any_meeting_type, bool | None)
    assert_type(user.public_identifier, str | None)


def wire(data: Any, meeting: Meeting) -> None:
    """Convert models from and to JSON data."""
    assert_type(from_wire(data, Meeting), Meeting)
    assert_type(from_wire(data, list[Meeting]), list[Meeting])
    assert_type(to_wire(meeting), dict[str, Any])
    assert_type(to_wire([meeting]), list[dict[str, Any]])


async def failures(lemcal: AsyncLemcal) -> float | None:
    """Use the attributes of each error."""
    try:
        await lemcal.me()
    except errors.RateLimitError as error:
        assert_type(error.limit, int | None)
        assert_type(error.remaining, int | None)
        return error.retry_after
    except errors.DeadlineExceededError as error:
        return error.retry_after
    except errors.APIStatusError as error:
        assert_type(error.status_code, int)
        assert_type(error.server_message, str | None)
        return error.retry_after
    except errors.APIConnectionError as error:
        assert_type(error.maybe_processed, bool)
    except errors.ResponseDecodeError as error:
        assert_type(error.rows, list[Any])
        assert_type(error.bad_rows, list[errors.BadRow])
    except errors.LemcalError as error:
        assert_type(error.method, str | None)
        assert_type(error.route, str | None)
        assert_type(error.attempts, int)
        return error.waited
    return None


def limits(snapshot: RateLimit) -> RateLimiter:
    """Read a snapshot, and create limiters."""
    assert_type(snapshot.limit, int | None)
    assert_type(snapshot.remaining, int | None)
    assert_type(snapshot.resets_in, float)
    assert_type(snapshot.queued, int)
    assert_type(snapshot.paused_for, float)
    shared: ratelimit.RateLimiter = LocalRateLimiter()
    shared = RedisRateLimiter("redis://localhost", when_down="raise", share=0.5, timeout=1, prefix="mine:")
    return Unlimited() if snapshot.limit is None else shared


def layers() -> httpx.AsyncClient:
    """Use the transport layers with an httpx client."""
    limited: transport.RateLimitTransport = RateLimitTransport(
        PooledTransport(max_connections=10), Unlimited()
    )
    return httpx.AsyncClient(transport=RetryTransport(limited, RetryPolicy(attempts=2)))


async def with_the_fixture(lemcal_sandbox: Sandbox) -> None:
    """Use the pytest fixture."""
    lemcal_sandbox.inject(faults.status(503), times=2)
    async with lemcal_sandbox.client(deadline=5) as lemcal:
        assert_type(lemcal, AsyncLemcal)


async def save(meeting: Meeting) -> None:
    """Handle a booking."""


def save_in_thread(meeting: Meeting, lemcal: AsyncLemcal) -> int:
    """Handle a booking of one of several accounts, in a worker thread."""
    return len(lemcal.user_id) + len(meeting.id)


async def find(name: str) -> Tenant | None:
    """Find an account by its name."""
    return Tenant(AsyncLemcal(), ["token", "older token"]) if name else None


def receivers(lemcal: AsyncLemcal, wake: Wakes) -> list[WebhookReceiver]:
    """Create receivers in every supported way."""
    dedup: Dedup = InMemoryDedup(1000)
    return [
        WebhookReceiver(lemcal, token="token", on_meeting=save, dedup=dedup, deadline=5.0),
        WebhookReceiver(lemcal, token=["token", "older token"], wake=wake, list_lag=1),
        WebhookReceiver(accounts={"token": lemcal}, on_meeting=save_in_thread, handler_timeout=10),
        WebhookReceiver(accounts=find, wake=wake),
    ]


def service(lemcal: AsyncLemcal, receiver: WebhookReceiver) -> FastAPI:
    """Use the FastAPI integration."""
    app = FastAPI(lifespan=lifespan(lemcal, hook_url="https://example.com/?token=token"))
    app.include_router(webhook_router(receiver, "/hooks"))
    add_exception_handlers(app)
    app.dependency_overrides[get_lemcal] = lambda: lemcal

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str | None:  # pyright: ignore[reportUnusedFunction]
        assert_type(lemcal, AsyncLemcal)
        return (await lemcal.me()).email

    return app


def observe() -> None:
    """Subscribe to events."""

    def listener(event: events.Event) -> None:
        if isinstance(event, events.CallEnded):
            assert_type(event.status_code, int | None)

    assert_type(events.subscribe(listener), Callable[[], None])
    assert_type(instrument(), Callable[[], None])


async def handle_change(change: Change) -> None:
    """Handle a change."""
    assert_type(change.seq, int)
    assert_type(change.fields, tuple[str, ...])
    assert_type(change.meeting, Meeting)
    assert_type(change.wire, dict[str, Any])


async def handle_changes(changes: list[Change]) -> None:
    """Handle a list of changes."""
    assert_type(changes[0], Change)


async def synchronize(lemcal: AsyncLemcal, wake: Wake) -> None:
    """Synchronize a database."""
    shared: Store = MemoryStore()
    async with SQLStore("sqlite:///lemcal.db") as store:
        accounts = (lemcal.for_account(user_id, "k") for user_id in ("usr_1", "usr_2"))
        report = await sync_meetings(
            accounts, store, max_concurrency=4, on_change=handle_change, baseline=True
        )
        assert_type(report, SyncReport)
        assert_type(report.failures[0].error, Exception)
        assert_type(report.parked, int)
        report.raise_for_failures()
        async for change in store.changes(pending=True):
            assert_type(change, Change)
            assert_type(await store.mark_delivered([change]), int)
            assert_type(change.parked_at, datetime | None)
        assert_type(await store.retry_parked(lemcal.user_id), int)
        await store.forget(lemcal.user_id)
        await sync_meetings([lemcal], store, on_changes=handle_changes, max_attempts=5)
    wake.wake()
    wake.wake("usr_1")
    await watch(
        lambda: [lemcal], shared, interval=60, wake=wake, on_change=lambda change: None, on_report=print
    )


version: str = __version__
