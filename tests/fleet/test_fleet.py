"""A fleet at work: who is synchronized when, by whom, and what becomes of failures and of workers."""

import logging
import os
import signal
import sqlite3
import threading
import time
from typing import Any

import anyio
import pytest
from redis_server import RedisServer

from lemcal_async import events
from lemcal_async.errors import ConfigurationError
from lemcal_async.fleet import Fleet
from lemcal_async.sandbox import faults
from lemcal_async.sync import Change
from lemcal_async.webhooks import WebhookReceiver

from .conftest import Yard

pytestmark = pytest.mark.anyio


async def test_accounts_are_synchronized(yard: Yard) -> None:
    """All of them, each change once and in order; then they rest until their interval is over."""
    fleet = yard.fleet()
    assert 4 == await fleet.add(yard.user_ids)
    assert 0 == await fleet.add(yard.user_ids)
    async with yard.working(fleet, concurrency=4):
        await yard.until_handled(20)
        status = await yard.until(
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
    assert 20 == len({change.seq for change in yard.handled})
    for user_id in yard.user_ids:
        seqs = [change.seq for change in yard.handled if change.user_id == user_id]
        assert (5, sorted(seqs)) == (len(seqs), seqs)


async def test_a_delivery_wakes_an_account(yard: Yard) -> None:
    """The webhook is answered when the wake-up is stored; the change is handled long before its time."""
    fleet = yard.fleet()
    await fleet.add(yard.user_ids)
    async with yard.working(fleet), fleet.waker() as wake:
        await yard.until_handled(20)
        receiver = WebhookReceiver(yard.sandbox.client(), token="t", wake=wake)
        booked = yard.sandbox.book()
        status, _, _ = await receiver.handle("POST", "token=t", {}, b'{"_id": "%b"}' % booked["_id"].encode())
        assert 200 == status
        await yard.until_handled(21)
    assert booked["_id"] == yard.handled[-1].meeting_id


async def test_a_wake_during_a_turn_is_not_lost(yards: Any) -> None:
    """The account has another turn right after, since this one may have looked before."""
    yard = yards("memory")
    busy, proceed = anyio.Event(), anyio.Event()

    async def keep(change: Change) -> None:
        busy.set()
        await proceed.wait()
        yard.handled.append(change)

    fleet = yard.fleet(on_change=keep)
    await fleet.add(yard.user_ids[:1])
    async with yard.working(fleet):
        await busy.wait()
        booked = yard.sandbox.book()
        assert 1 == await fleet.wake(yard.user_ids[:1])
        proceed.set()
        await yard.until_handled(6)
    assert booked["_id"] == yard.handled[-1].meeting_id


async def test_two_workers_share_the_accounts(yard: Yard) -> None:
    """Without a fault, nothing is handled twice."""
    fleets = [yard.fleet()] * 2 if yard.queue == "memory://" else [yard.fleet(), yard.fleet()]
    await fleets[0].add(yard.user_ids)
    async with yard.working(fleets[0]), yard.working(fleets[1]):
        await yard.until_handled(20)
        for _ in range(10):
            yard.sandbox.book()
            for fleet in fleets:
                await fleet.wake(yard.user_ids)
        await yard.until_handled(30)
        await yard.until(fleets[0], lambda status: not status.running and not status.due)
    assert 30 == len(yard.handled) == len({change.seq for change in yard.handled})


async def test_plain_handlers_of_several_accounts(yards: Any) -> None:
    """They run beside each other, each in a thread: one that blocks holds up its own account only."""
    yard = yards("memory")
    both = threading.Barrier(2, timeout=20)
    seen: set[str] = set()

    def keep(change: Change) -> None:
        if change.user_id not in seen:
            seen.add(change.user_id)
            both.wait()
        yard.handled.append(change)

    fleet = yard.fleet(on_change=keep)
    await fleet.add(yard.user_ids[:2])
    async with yard.working(fleet, concurrency=2):
        await yard.until_handled(10)
    assert not both.broken


async def test_failures_back_off(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    """No key, a wrong one, a handler that raises: each is logged, and costs nobody else anything."""
    first, second, third, fourth = yard.user_ids
    yard.keys[second] = "wrong"
    del yard.keys[third]

    def keep(change: Change) -> None:
        if change.user_id == fourth:
            raise ValueError
        yard.handled.append(change)

    fleet = yard.fleet(on_change=keep)
    await fleet.add(yard.user_ids)
    async with yard.working(fleet):
        await yard.until_handled(5)
        status = await yard.until(fleet, lambda status: status.failing == 3 and not status.running)
    assert {first} == {change.user_id for change in yard.handled}
    assert (5, 0) == (status.undelivered, status.due)
    assert f"credentials= has no API key for {third}" in caplog.text
    assert second in caplog.text
    assert "in keep" in caplog.text


async def test_pause_resume_remove(yard: Yard) -> None:
    """Paused accounts rest, removed ones keep their data."""
    fleet = yard.fleet()
    one, two, *_ = yard.user_ids
    await fleet.add(yard.user_ids)
    assert 2 == await fleet.pause([one, two])
    async with yard.working(fleet):
        await yard.until_handled(10)
        assert 2 == (await fleet.status()).paused
        assert not {one, two} & {change.user_id for change in yard.handled}
        assert 2 == await fleet.resume([one, two])
        await yard.until_handled(20)
    assert 1 == await fleet.remove([one])
    assert 3 == (await fleet.status()).accounts


async def test_a_worker_is_canceled(yard: Yard) -> None:
    """Its accounts are given back, due at once, and another worker goes on."""
    busy = anyio.Event()

    async def hang(change: Change) -> None:
        busy.set()
        await anyio.sleep_forever()

    fleet = yard.fleet(on_change=hang)
    await fleet.add(yard.user_ids[:1])
    async with yard.working(fleet):
        with anyio.fail_after(30):
            await busy.wait()
    status = await fleet.status()
    assert (0, 1, 5) == (status.running, status.due, status.undelivered)
    async with yard.working(yard.fleet() if yard.queue != "memory://" else fleet):
        if yard.queue != "memory://":
            await yard.until_handled(5)


async def test_a_signal_lets_turns_end(yard: Yard) -> None:
    """The worker returns when the turn under way has ended, and takes no other."""
    busy, proceed = anyio.Event(), anyio.Event()

    async def keep(change: Change) -> None:
        busy.set()
        await proceed.wait()
        yard.handled.append(change)

    fleet = yard.fleet(on_change=keep)
    await fleet.add(yard.user_ids)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: fleet.run(concurrency=1))
            await busy.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep(0.05)
            proceed.set()
    assert 5 == len(yard.handled)
    status = await fleet.status()
    assert (0, 3) == (status.running, status.due + (status.queued or 0))


async def test_the_grace_is_over(yards: Any) -> None:
    """What has not ended by then is given back."""
    yard = yards("memory")
    busy = anyio.Event()

    async def hang(change: Change) -> None:
        busy.set()
        await anyio.sleep_forever()

    fleet = yard.fleet(on_change=hang, grace=0.05)
    await fleet.add(yard.user_ids[:1])
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fleet.run)
            await busy.wait()
            os.kill(os.getpid(), signal.SIGTERM)
    assert (0, 1) == ((await fleet.status()).running, (await fleet.status()).due)


@pytest.mark.parametrize("handler", ["async", "plain"])
async def test_nothing_is_handed_over_once_the_lease_is_over(
    yards: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, handler: str
) -> None:
    """A worker that stood still for longer wakes up and does nothing more; the handler is not blamed."""
    yard = yards("memory")
    frozen_for = 0.0
    monotonic = time.monotonic
    monkeypatch.setattr("lemcal_async.fleet._turns.monotonic", lambda: monotonic() + frozen_for)

    def take_away() -> None:
        with sqlite3.connect(yard.store.removeprefix("sqlite:///")) as database:
            database.execute(
                "UPDATE accounts SET lease_token = 'of another', lease_until = lease_until + 1000"
            )
        database.close()

    def keep_plainly(change: Change) -> None:
        nonlocal frozen_for
        frozen_for = 1000.0
        take_away()
        yard.handled.append(change)

    async def keep(change: Change) -> None:
        await anyio.to_thread.run_sync(keep_plainly, change)

    fleet = yard.fleet(on_change=keep_plainly if handler == "plain" else keep)
    await fleet.add(yard.user_ids[:1])
    async with yard.working(fleet):
        await yard.until_handled(1)
        with anyio.fail_after(30):
            while "lease" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await anyio.sleep(0.1)
    assert 1 == len(yard.handled)
    assert "on_change" not in caplog.text
    with sqlite3.connect(yard.store.removeprefix("sqlite:///")) as database:
        assert [(0,)] == database.execute("SELECT DISTINCT attempts FROM changes").fetchall()
    database.close()
    status = await fleet.status()
    assert (1, 5) == (status.running, status.undelivered)  # the other's to mark


async def test_redis_comes_and_goes(yards: Any, redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Without it the worker waits and says so, a wake-up is stored all the same; back, all goes on."""
    yard = yards("streaq")
    fleet = yard.fleet()
    await fleet.add(yard.user_ids)
    async with yard.working(fleet):
        await yard.until_handled(20)
        redis.kill()
        booked = yard.sandbox.book()
        assert 1 == await fleet.wake(yard.user_ids[:1])
        status = await fleet.status()
        assert (None, None, 1) == (status.queued, status.workers, status.due)
        redis.start()
        await yard.until_handled(21)
    assert booked["_id"] == yard.handled[-1].meeting_id
    assert "the worker retries in 0.5 s" in caplog.text


async def test_no_secret_anywhere(yard: Yard, redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """No key is stored or queued or logged; what a fleet shows of itself has no password."""
    caplog.set_level(logging.DEBUG)
    fleet = yard.fleet()
    await fleet.add(yard.user_ids)
    async with yard.working(fleet):
        await yard.until_handled(20)
    shown = repr(fleet) + caplog.text + repr(vars(fleet))
    if yard.queue != "memory://":
        shown += redis.dump()
    assert not [key for key in yard.keys.values() if key in shown]


async def test_events(yards: Any) -> None:
    """A worker tells listeners how the fleet is."""
    yard = yards("memory")
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    fleet = yard.fleet()
    await fleet.add(yard.user_ids)
    try:
        async with yard.working(fleet):
            await yard.until_handled(20)
            await yard.until(fleet, lambda status: not status.running)
    finally:
        leave()
    sampled = [event for event in heard if isinstance(event, events.FleetSampled)]
    assert 4 == sampled[0].status.accounts
    assert 4 == sum(isinstance(event, events.AccountSynced) for event in heard)


async def test_a_fault_of_lemcal(yards: Any) -> None:
    """Its Retry-After is honored, and the account is due later."""
    yard = yards("memory")
    yard.sandbox.inject(faults.too_many_requests("1000"), path="/meetings")
    fleet = yard.fleet(interval=1)
    await fleet.add(yard.user_ids[:1])
    async with yard.working(fleet):
        status = await yard.until(fleet, lambda status: status.failing == 1)
        assert 0 == status.due
    assert [] == yard.handled


def wrong_uses() -> dict[str, Any]:
    """Return what each mistake is told."""

    async def key_of(user_id: str) -> str | None:
        return None

    def make(**options: Any) -> Fleet:
        given = {"store": "sqlite:///x.db", "queue": "memory://", "credentials": key_of, **options}
        return Fleet(**given)

    return {
        "queue= must be a URL": lambda: make(queue="127.0.0.1:6379"),
        "interval='5'": lambda: make(interval="5"),
        "grace=0": lambda: make(grace=0),
        "credentials= must be": lambda: make(credentials={"usr_1": "k"}),
        r"credentials= is called as <lambda>\(user_id\)": lambda: make(credentials=lambda: None),
        r"on_change= is called as <lambda>\(change\)": lambda: make(on_change=lambda: None),
        "database URL": lambda: make(store="nowhere"),
    }


@pytest.mark.parametrize("words", wrong_uses())
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_wrong_use(anyio_backend: str, words: str) -> None:
    """One line says what to pass, before anything is connected."""
    with pytest.raises(ConfigurationError, match=words):
        wrong_uses()[words]()


async def test_wrong_calls(yards: Any) -> None:
    """The same for the methods."""
    fleet = yards("memory").fleet()
    with pytest.raises(ConfigurationError, match=r"pass a list of user ids, such as \['usr_1'\]"):
        await fleet.add("usr_1")
    with pytest.raises(ConfigurationError, match="interval=-1: it must be a number of seconds above 0"):
        await fleet.add(["usr_1"], interval=-1)
    with pytest.raises(ConfigurationError, match="5 is not a user id"):
        await fleet.pause([5])
    with pytest.raises(ConfigurationError, match="concurrency=0"):
        await fleet.run(concurrency=0)
    async with fleet.waker() as wake:
        with pytest.raises(ConfigurationError, match=r"usr_1 is not in the fleet"):
            await wake.wake("usr_1")
        with pytest.raises(ConfigurationError, match="cannot wake all accounts at once"):
            await wake.wake()
