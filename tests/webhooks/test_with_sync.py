"""The receiver and the synchronization together: the webhook for speed, the synchronization for truth."""

from functools import partial
from pathlib import Path

import anyio
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, MemoryStore, SQLStore, Wake, watch

from .conftest import scene

pytestmark = pytest.mark.anyio


async def test_a_delivery_wakes_the_synchronization(sandbox: Sandbox) -> None:
    """Which finds what no delivery told of: one that was lost, and a cancellation."""
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

    keep = partial(watch, interval=3600, on_change=on_change, wake=wake, baseline=True)
    async with (
        scene(sandbox, wake=wake, on_meeting=None) as stage,
        sandbox.client() as lemcal,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(partial(keep, on_report=on_report), [lemcal], MemoryStore())
        await first_run.wait()
        canceled = sandbox.cancel(next(m["_id"] for m in sandbox.meetings() if not m.get("canceledAt")))
        lost, delivered = stage.book(), stage.book()
        assert (200, "handled") == (await stage.post(delivered)).brief
        with anyio.fail_after(10):
            await all_found.wait()
        tasks.cancel_scope.cancel()
    expected = {canceled["_id"]: "canceled", lost["_id"]: "created", delivered["_id"]: "created"}
    assert expected == found


async def test_the_store_remembers(sandbox: Sandbox, tmp_path: Path) -> None:
    """What was handled before a restart is not handled after it; what failed is."""
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    failing = True

    async def fail_at_first(_: object) -> None:
        if failing:
            raise ValueError

    async with SQLStore(url) as dedup, scene(sandbox, dedup=dedup) as before:
        handled = before.book()
        assert (200, "handled") == (await before.post(handled)).brief
    async with SQLStore(url) as dedup, scene(sandbox, dedup=dedup, handler=fail_at_first) as after:
        failed = after.book()
        assert (503, "failed") == (await after.post(failed)).brief
        failing = False
        assert (200, "handled") == (await after.post(failed)).brief
        assert (200, "repeated") == (await after.post(handled)).brief
        assert [failed["_id"]] * 2 == after.handled_ids


async def test_the_store_is_gone(sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is to come again: nothing is handled that could not be remembered."""
    store = SQLStore(f"sqlite:///{tmp_path / 'nowhere' / 'memory.db'}")
    async with scene(sandbox, dedup=store) as stage:
        assert (503, "failed") == (await stage.post(stage.book())).brief
        assert [] == stage.handled
    assert "dedup= failed" in caplog.text


async def test_a_burst(sandbox: Sandbox, tmp_path: Path) -> None:
    """A hundred at once, each remembered in the database."""
    dedup = SQLStore(f"sqlite:///{tmp_path / 'memory.db'}")
    async with dedup, scene(sandbox, dedup=dedup) as stage:
        booked = [stage.book() for _ in range(100)]
        answers = await stage.post_at_once(booked)
        assert {(200, "handled")} == {answer.brief for answer in answers}
        assert 100 == len(stage.handled)
        again = await stage.post_at_once(booked)
        assert {(200, "repeated")} == {answer.brief for answer in again}
