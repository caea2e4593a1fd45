"""Fleets: scheduling, wake-ups, failures, and workers that stop or fail."""

import logging
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from redis_server import RedisServer

from lemcal_async import events
from lemcal_async.errors import ConfigurationError
from lemcal_async.fleet import Fleet
from lemcal_async.fleet._engine import EngineError, MemoryEngine
from lemcal_async.sandbox import faults
from lemcal_async.sync import Change
from lemcal_async.webhooks import WebhookReceiver

from .conftest import FleetHarness

pytestmark = pytest.mark.anyio


async def test_accounts_are_synchronized(harness: FleetHarness) -> None:
    """All accounts are synchronized, each change once and in order; then none is due."""
    fleet = harness.fleet()
    assert 4 == await fleet.add(harness.user_ids)
    assert 0 == await fleet.add(harness.user_ids)
    async with harness.working(fleet, concurrency=4):
        await harness.until_handled(20)
        status = await harness.until(
            fleet, lambda status: not (status.running or status.undelivered or status.queued)
        )
    assert (4, 0, None, 0, 0, 0, None, 0) == (
        status.accounts,
        status.due,
        status.oldest_due,
        status.queued,
        status.failing,
        status.undelivered,
        status.oldest_undelivered,
        status.parked,
    )
    assert status.workers
    assert 20 == len({change.seq for change in harness.handled})
    for user_id in harness.user_ids:
        seqs = [change.seq for change in harness.handled if change.user_id == user_id]
        assert (5, sorted(seqs)) == (len(seqs), seqs)


async def test_delivery_wakes_account(harness: FleetHarness) -> None:
    """The webhook gets a 200 once the wake-up is stored; the change is handled before the interval ends."""
    fleet = harness.fleet()
    await fleet.add(harness.user_ids)
    async with harness.working(fleet), fleet.waker() as wake:
        await harness.until_handled(20)
        receiver = WebhookReceiver(harness.sandbox.client(), token="t", wake=wake)
        booked = harness.sandbox.book()
        status, _, _ = await receiver.handle("POST", "token=t", {}, b'{"_id": "%b"}' % booked["_id"].encode())
        assert 200 == status
        await harness.until_handled(21)
    assert booked["_id"] == harness.handled[-1].meeting_id


async def test_wake_during_turn_is_not_lost(create_harness: Any) -> None:
    """The account gets another turn immediately, because this one may have fetched the list too early."""
    harness = create_harness("memory")
    busy, proceed = anyio.Event(), anyio.Event()

    async def keep(change: Change) -> None:
        busy.set()
        await proceed.wait()
        harness.handled.append(change)

    fleet = harness.fleet(on_change=keep)
    await fleet.add(harness.user_ids[:1])
    async with harness.working(fleet):
        await busy.wait()
        booked = harness.sandbox.book()
        assert 1 == await fleet.wake(harness.user_ids[:1])
        proceed.set()
        await harness.until_handled(6)
    assert booked["_id"] == harness.handled[-1].meeting_id


async def test_two_workers_share_the_accounts(harness: FleetHarness) -> None:
    """Without a fault, no change is handled twice."""
    fleets = [harness.fleet()] * 2 if harness.queue == "memory://" else [harness.fleet(), harness.fleet()]
    await fleets[0].add(harness.user_ids)
    async with harness.working(fleets[0]), harness.working(fleets[1]):
        await harness.until_handled(20)
        for _ in range(10):
            harness.sandbox.book()
            for fleet in fleets:
                await fleet.wake(harness.user_ids)
        await harness.until_handled(30)
        await harness.until(fleets[0], lambda status: not status.running and not status.due)
    assert 30 == len(harness.handled) == len({change.seq for change in harness.handled})


async def test_plain_handlers_run_concurrently(create_harness: Any) -> None:
    """Each account's handler runs in its own thread, so a blocking one only delays its own account."""
    harness = create_harness("memory")
    both = threading.Barrier(2, timeout=20)
    seen: set[str] = set()

    def keep(change: Change) -> None:
        if change.user_id not in seen:
            seen.add(change.user_id)
            both.wait()
        harness.handled.append(change)

    fleet = harness.fleet(on_change=keep)
    await fleet.add(harness.user_ids[:2])
    async with harness.working(fleet, concurrency=2):
        await harness.until_handled(10)
    assert not both.broken


async def test_failures_back_off(harness: FleetHarness, caplog: pytest.LogCaptureFixture) -> None:
    """A missing key, a wrong key and a failing handler are logged, and do not affect other accounts."""
    first, second, third, fourth = harness.user_ids
    harness.keys[second] = "wrong"
    del harness.keys[third]

    def keep(change: Change) -> None:
        if change.user_id == fourth:
            raise ValueError
        harness.handled.append(change)

    fleet = harness.fleet(on_change=keep)
    await fleet.add(harness.user_ids)
    async with harness.working(fleet):
        await harness.until_handled(5)
        status = await harness.until(fleet, lambda status: status.failing == 3 and not status.running)
    assert {first} == {change.user_id for change in harness.handled}
    assert (5, 0) == (status.undelivered, status.due)
    assert f"credentials= has no API key for {third}" in caplog.text
    assert second in caplog.text
    assert "in keep" in caplog.text


async def test_pause_resume_remove(harness: FleetHarness) -> None:
    """Paused accounts have no turns; removed accounts unsubscribe the fleet."""
    fleet = harness.fleet()
    one, two, *_ = harness.user_ids
    await fleet.add(harness.user_ids)
    assert 2 == await fleet.pause([one, two])
    async with harness.working(fleet):
        await harness.until_handled(10)
        assert 2 == (await fleet.status()).paused
        assert not {one, two} & {change.user_id for change in harness.handled}
        assert 2 == await fleet.resume([one, two])
        await harness.until_handled(20)
    assert 1 == await fleet.remove([one])
    assert 3 == (await fleet.status()).accounts


async def test_canceled_worker_releases_accounts(harness: FleetHarness) -> None:
    """Its accounts are due at once, and another worker continues."""
    busy = anyio.Event()

    async def hang(change: Change) -> None:
        busy.set()
        await anyio.sleep_forever()

    fleet = harness.fleet(on_change=hang)
    await fleet.add(harness.user_ids[:1])
    async with harness.working(fleet):
        with anyio.fail_after(30):
            await busy.wait()
    status = await fleet.status()
    assert (0, 1, 5) == (status.running, status.due, status.undelivered)
    async with harness.working(harness.fleet() if harness.queue != "memory://" else fleet):
        if harness.queue != "memory://":
            await harness.until_handled(5)


async def test_signal_lets_turns_finish(harness: FleetHarness, caplog: pytest.LogCaptureFixture) -> None:
    """The worker finishes the running turn, starts no other, and returns."""
    caplog.set_level(logging.INFO, "lemcal_async.fleet")
    busy, proceed = anyio.Event(), anyio.Event()

    async def keep(change: Change) -> None:
        busy.set()
        await proceed.wait()
        harness.handled.append(change)

    fleet = harness.fleet(on_change=keep)
    await fleet.add(harness.user_ids)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: fleet.run(concurrency=1))
            await busy.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            stopping = "SIGTERM: stopping; running turns: 1, which have 25 s to finish"
            while stopping not in caplog.messages:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            proceed.set()
    assert 5 == len(harness.handled)
    status = await fleet.status()
    assert (0, 3) == (status.running, status.due + (status.queued or 0))


async def test_signal_while_idle(create_harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An idle worker says that it stops."""
    fleet = create_harness("memory").fleet()
    caplog.set_level(logging.INFO, "lemcal_async.fleet")
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fleet.run)
            while not (await fleet.status()).workers:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
    assert ["SIGTERM: stopping; no turns are running"] == caplog.messages


async def test_grace_period_expires(create_harness: Any) -> None:
    """A turn that has not finished by then is canceled, and its account released."""
    harness = create_harness("memory")
    busy = anyio.Event()

    async def hang(change: Change) -> None:
        busy.set()
        await anyio.sleep_forever()

    fleet = harness.fleet(on_change=hang, grace=0.05)
    await fleet.add(harness.user_ids[:1])
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fleet.run)
            await busy.wait()
            os.kill(os.getpid(), signal.SIGTERM)
    assert (0, 1) == ((await fleet.status()).running, (await fleet.status()).due)


@pytest.mark.parametrize("handler", ["async", "plain"])
async def test_no_handler_call_after_lease_expires(
    create_harness: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, handler: str
) -> None:
    """A worker that was suspended for longer calls no handler, and records no failed attempt."""
    harness = create_harness("memory")
    frozen_for = 0.0
    monotonic = time.monotonic
    monkeypatch.setattr("lemcal_async.fleet._turns.monotonic", lambda: monotonic() + frozen_for)

    def steal_lease() -> None:
        with sqlite3.connect(harness.store.removeprefix("sqlite:///")) as database:
            database.execute(
                "UPDATE accounts SET lease_token = 'of another', lease_until = lease_until + 1000"
            )
        database.close()

    def keep_in_thread(change: Change) -> None:
        nonlocal frozen_for
        frozen_for = 1000.0
        steal_lease()
        harness.handled.append(change)

    async def keep(change: Change) -> None:
        await anyio.to_thread.run_sync(keep_in_thread, change)

    fleet = harness.fleet(on_change=keep_in_thread if handler == "plain" else keep)
    await fleet.add(harness.user_ids[:1])
    async with harness.working(fleet):
        await harness.until_handled(1)
        with anyio.fail_after(30):
            while "lease" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await anyio.sleep(0.1)
    assert 1 == len(harness.handled)
    assert "on_change" not in caplog.text
    with sqlite3.connect(harness.store.removeprefix("sqlite:///")) as database:
        assert [(0,)] == database.execute("SELECT DISTINCT attempts FROM changes").fetchall()
    database.close()
    status = await fleet.status()
    assert (1, 5) == (status.running, status.undelivered)  # the other worker delivers the rest


async def test_redis_outage(
    create_harness: Any, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is down, the worker logs it and a wake-up is stored; afterward, work continues."""
    harness = create_harness("streaq")
    fleet = harness.fleet()
    await fleet.add(harness.user_ids)
    async with harness.working(fleet):
        await harness.until_handled(20)
        redis.kill()
        booked = harness.sandbox.book()
        assert 1 == await fleet.wake(harness.user_ids[:1])
        status = await fleet.status()
        assert (None, None, 1) == (status.queued, status.workers, status.due)
        redis.start()
        await harness.until_handled(21)
    assert booked["_id"] == harness.handled[-1].meeting_id
    assert "the worker retries in 0.5 s" in caplog.text


async def test_queue_failures_are_logged_once(
    create_harness: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that affects both the taking and the queueing of turns is logged once per retry."""

    @asynccontextmanager
    async def connect(_: MemoryEngine) -> AsyncIterator[Any]:
        raise EngineError("the queue failed: it is down")
        yield

    async def run(_: MemoryEngine, *__: Any, **___: Any) -> None:
        raise EngineError("the queue failed: it is down")

    monkeypatch.setattr(MemoryEngine, "connect", connect)
    monkeypatch.setattr(MemoryEngine, "run", run)
    harness = create_harness("memory")
    async with harness.working(harness.fleet()):
        with anyio.fail_after(30):
            while not re.search("in [^0]", caplog.text):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        await anyio.sleep(0.1)
    assert [
        f"the queue failed: it is down; the worker retries in {delay} s" for delay in ("0.5", "1")
    ] == caplog.messages[:2]
    assert len(caplog.messages) == len(set(caplog.messages))


async def test_no_key_is_exposed(
    harness: FleetHarness, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """API keys appear in no log, no repr and not in Redis."""
    caplog.set_level(logging.DEBUG)
    fleet = harness.fleet()
    await fleet.add(harness.user_ids)
    async with harness.working(fleet):
        await harness.until_handled(20)
    shown = repr(fleet) + caplog.text + repr(vars(fleet))
    if harness.queue != "memory://":
        shown += redis.dump()
    assert not [key for key in harness.keys.values() if key in shown]


async def test_events(create_harness: Any) -> None:
    """A worker emits samples of the fleet's status, and an event per synchronized account."""
    harness = create_harness("memory")
    received: list[events.Event] = []
    unsubscribe = events.subscribe(received.append)
    fleet = harness.fleet()
    await fleet.add(harness.user_ids)
    try:
        async with harness.working(fleet):
            await harness.until_handled(20)
            await harness.until(fleet, lambda status: not status.running)
    finally:
        unsubscribe()
    sampled = [event for event in received if isinstance(event, events.FleetSampled)]
    assert 4 == sampled[0].status.accounts
    assert 4 == sum(isinstance(event, events.AccountSynced) for event in received)


async def test_retry_after_delays_account(create_harness: Any) -> None:
    """The account is only due again after lemcal's ``Retry-After``."""
    harness = create_harness("memory")
    harness.sandbox.inject(faults.too_many_requests("1000"), path="/meetings")
    fleet = harness.fleet(interval=1)
    await fleet.add(harness.user_ids[:1])
    async with harness.working(fleet):
        status = await harness.until(fleet, lambda status: status.failing == 1)
        assert 0 == status.due
    assert [] == harness.handled


def invalid_arguments() -> dict[str, Any]:
    """Return calls with invalid arguments, by the message that they raise."""

    async def key_of(user_id: str) -> str | None:
        return None

    def create(**options: Any) -> Fleet:
        given = {"store": "sqlite:///x.db", "queue": "memory://", "credentials": key_of, **options}
        return Fleet(**given)

    return {
        "queue= must be a URL": lambda: create(queue="127.0.0.1:6379"),
        "interval='5'": lambda: create(interval="5"),
        "grace=0": lambda: create(grace=0),
        "credentials= must be": lambda: create(credentials={"usr_1": "k"}),
        r"credentials= is called as <lambda>\(user_id\)": lambda: create(credentials=lambda: None),
        r"on_change= is called as <lambda>\(change\)": lambda: create(on_change=lambda: None),
        "database URL": lambda: create(store="nowhere"),
    }


@pytest.mark.parametrize("message", invalid_arguments())
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_invalid_arguments(anyio_backend: str, message: str) -> None:
    """The error says what to pass, before anything connects."""
    with pytest.raises(ConfigurationError, match=message):
        invalid_arguments()[message]()


async def test_invalid_method_arguments(create_harness: Any) -> None:
    """Methods validate their arguments, too."""
    fleet = create_harness("memory").fleet()
    with pytest.raises(ConfigurationError, match=r"pass a list of user ids, such as \['usr_1'\]"):
        await fleet.add("usr_1")
    with pytest.raises(ConfigurationError, match="pass a list of user ids"):
        await fleet.wake("usr_1")
    with pytest.raises(ConfigurationError, match="interval=-1: it must be a number of seconds above 0"):
        await fleet.add(["usr_1"], interval=-1)
    for method in (fleet.add, fleet.pause, fleet.resume, fleet.remove, fleet.wake):
        for invalid in (5, "", "nobody", "usr_", "usr_a b", "usr_a\n"):
            with pytest.raises(
                ConfigurationError, match=f"^{re.escape(repr(invalid))} is not a user id: it must"
            ):
                await method(["usr_1", invalid])
        with pytest.raises(ConfigurationError, match=r"^'usr_a:\*\*\* is not a user id"):
            await method(["usr_a:secret"])
    assert 0 == (await fleet.status()).accounts
    assert 0 == await fleet.pause(["usr_1"])
    with pytest.raises(ConfigurationError, match="concurrency=0"):
        await fleet.run(concurrency=0)
    async with fleet.waker() as wake:
        with pytest.raises(ConfigurationError, match=r"usr_1 is not in the fleet"):
            await wake.wake("usr_1")
        with pytest.raises(ConfigurationError, match="'nobody' is not a user id"):
            await wake.wake("nobody")
        with pytest.raises(ConfigurationError, match="cannot wake all accounts at once"):
            await wake.wake()
