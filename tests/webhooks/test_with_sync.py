"""The receiver and the synchronization together: webhooks for speed, synchronization for correctness."""

from functools import partial
from pathlib import Path

import anyio
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, MemoryStore, SQLStore, Wake, watch

from .conftest import running_receiver

pytestmark = pytest.mark.anyio


async def test_delivery_wakes_synchronization(sandbox: Sandbox) -> None:
    """The synchronization also finds a lost delivery and a cancellation."""
    wake = Wake()
    found: dict[str, str] = {}
    all_found = anyio.Event()

    async def on_change(change: Change) -> None:
        found[change.meeting_id] = change.kind
        if len(found) == 3:
            all_found.set()

    first_run = anyio.Event()

    async def on_report(_: object) -> None:
        first_run.set()

    keep_in_sync = partial(watch, interval=3600, on_change=on_change, wake=wake, baseline=True)
    async with (
        running_receiver(sandbox, wake=wake, on_meeting=None) as harness,
        sandbox.client() as lemcal,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(partial(keep_in_sync, on_report=on_report), [lemcal], MemoryStore())
        await first_run.wait()
        canceled = sandbox.cancel(next(m["_id"] for m in sandbox.meetings() if not m.get("canceledAt")))
        lost, delivered = harness.book(), harness.book()
        assert (200, "handled") == (await harness.post(delivered)).summary
        with anyio.fail_after(10):
            await all_found.wait()
        tasks.cancel_scope.cancel()
    expected = {canceled["_id"]: "canceled", lost["_id"]: "created", delivered["_id"]: "created"}
    assert expected == found


async def test_store_deduplicates_across_restarts(sandbox: Sandbox, tmp_path: Path) -> None:
    """A meeting handled before a restart is not handled again; a failed one is."""
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    failing = True

    async def fail_while_failing(_: object) -> None:
        if failing:
            raise ValueError

    async with SQLStore(url) as dedup, running_receiver(sandbox, dedup=dedup) as before:
        handled = before.book()
        assert (200, "handled") == (await before.post(handled)).summary
    async with (
        SQLStore(url) as dedup,
        running_receiver(sandbox, dedup=dedup, handler=fail_while_failing) as after,
    ):
        failed = after.book()
        assert (503, "failed") == (await after.post(failed)).summary
        failing = False
        assert (200, "handled") == (await after.post(failed)).summary
        assert (200, "repeated") == (await after.post(handled)).summary
        assert [failed["_id"]] * 2 == after.handled_ids


async def test_unavailable_store(sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No meeting is handled that could not be recorded; the sender is asked to retry."""
    store = SQLStore(f"sqlite:///{tmp_path / 'nowhere' / 'memory.db'}")
    async with running_receiver(sandbox, dedup=store) as harness:
        assert (503, "failed") == (await harness.post(harness.book())).summary
        assert [] == harness.handled
    assert "dedup= failed" in caplog.text


async def test_burst(sandbox: Sandbox, tmp_path: Path) -> None:
    """A hundred concurrent deliveries are all recorded in the database."""
    dedup = SQLStore(f"sqlite:///{tmp_path / 'memory.db'}")
    async with dedup, running_receiver(sandbox, dedup=dedup) as harness:
        booked = [harness.book() for _ in range(100)]
        responses = await harness.post_concurrently(booked)
        assert {(200, "handled")} == {response.summary for response in responses}
        assert 100 == len(harness.handled)
        repeated = await harness.post_concurrently(booked)
        assert {(200, "repeated")} == {response.summary for response in repeated}
