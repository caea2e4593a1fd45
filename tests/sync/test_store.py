"""The rules that every kind of store follows."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lemcal_async import Meeting
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import Counts, EmptyListError, Store
from lemcal_async.sync._store import Applied, Forgotten, part_of

from .conftest import kinds, outbox

pytestmark = pytest.mark.anyio

USER = "usr_1"
END = "2026-01-05T08:30:00.000Z"
LATER = datetime(2026, 1, 6, tzinfo=UTC)


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Return this many wire rows."""
    return [{"_id": f"mee_{number}", "end": END, **fields} for number in range(count)]


async def apply_list(
    store: Store,
    rows: list[Any],
    *,
    user_id: str = USER,
    baseline: bool = False,
    confirm_empty_after: int = 2,
    body_hash: str | None = None,
) -> Applied | None:
    """Apply a list."""
    revision = await store.revision(user_id)
    return await store.apply(
        user_id,
        revision,
        rows,
        baseline=baseline,
        confirm_empty_after=confirm_empty_after,
        body_hash=body_hash,
    )


async def test_changed_fields_of_any_name(store: Store) -> None:
    """Field names and a guest's questions are arbitrary: they are stored unchanged, and in order."""
    names = ("\0", '"', "'", "?", "%s", "\\u0000", "{}", "\ud800", "é")
    await apply_list(store, rows(3))
    await apply_list(store, [{**row, **dict.fromkeys(names, 1)} for row in reversed(rows(3))])
    changes = (await outbox(store))[3:]
    assert ["mee_2", "mee_1", "mee_0"] == [change.meeting_id for change in changes]
    assert {tuple(sorted(names))} == {change.fields for change in changes}


async def test_repeated_list(store: Store) -> None:
    """All rows are new the first time, and unchanged the second time."""
    assert 0 == await store.revision(USER)
    assert Applied(Counts(created=5)) == await apply_list(store, rows(5))
    assert Applied(Counts(unchanged=5)) == await apply_list(store, rows(5))
    assert 2 == await store.revision(USER)
    assert ["created"] * 5 == await kinds(store)


async def test_every_kind(store: Store) -> None:
    """Every kind of change is in the outbox, with the current or last row."""
    await apply_list(store, rows(4))
    changed = [
        {**rows(1)[0], "start": END},
        {**rows(2)[1], "canceledAt": END},
        rows(3)[2],
        {"_id": "mee_new"},
    ]
    applied = await apply_list(store, changed)
    assert Applied(Counts(created=1, changed=1, canceled=1, disappeared=1, unchanged=1)) == applied
    found = [
        (change.kind, change.meeting_id, change.fields, change.wire) for change in (await outbox(store))[4:]
    ]
    assert [
        ("changed", "mee_0", ("start",), changed[0]),
        ("canceled", "mee_1", ("canceledAt",), changed[1]),
        ("created", "mee_new", (), changed[3]),
        ("disappeared", "mee_3", (), rows(4)[3]),
    ] == found
    assert Applied(Counts(restored=1, unchanged=4)) == await apply_list(store, [*changed, *rows(4)[3:]])
    assert "restored" == (await kinds(store))[-1]
    assert Applied(Counts(unchanged=5)) == await apply_list(store, [*changed, *rows(4)[3:]])


async def test_change_as_model(store: Store) -> None:
    """``change.meeting`` is a model that names the values it could not read."""
    await apply_list(store, [*rows(1), {"_id": "mee_odd", "start": "never"}])
    good, odd = await outbox(store)
    assert isinstance(good.meeting, Meeting)
    assert "mee_0" == good.meeting.id
    assert (
        "start: expected an ISO 8601 time with an offset, got text that is not one",
    ) == odd.meeting.problems


async def test_baseline(store: Store) -> None:
    """Existing meetings are not reported in the first run; later changes are."""
    assert Applied(Counts(created=2)) == await apply_list(store, rows(2), baseline=True)
    assert [] == await kinds(store)
    await apply_list(store, rows(3), baseline=True)
    assert ["created"] == await kinds(store)


async def test_failure_is_not_a_first_run(store: Store) -> None:
    """A failure does not count as an account's first run."""
    await store.record_failure(USER, "no answer")
    assert 0 == await store.revision(USER)
    await apply_list(store, rows(2), baseline=True)
    assert [] == await kinds(store)


async def test_outdated_revision(store: Store) -> None:
    """A list that was fetched before another one was stored changes nothing."""
    revision = await store.revision(USER)
    await apply_list(store, rows(3))
    assert await store.apply(USER, revision, [], baseline=False, confirm_empty_after=1) is None
    await apply_list(store, rows(3))
    assert await store.apply(USER, 1, rows(2), baseline=False, confirm_empty_after=1) is None
    assert ["created"] * 3 == await kinds(store)


async def test_suddenly_empty_list(store: Store) -> None:
    """The first empty list is an error, the second is accepted; a full one restarts the count."""
    await apply_list(store, rows(4))
    with pytest.raises(
        EmptyListError, match="an empty list, while 4 meetings are stored; nothing was changed"
    ):
        await apply_list(store, [])
    assert Applied(Counts(unchanged=4)) == await apply_list(store, rows(4))
    with pytest.raises(EmptyListError):
        await apply_list(store, [])
    assert Applied(Counts(disappeared=4)) == await apply_list(store, [])
    assert Applied(Counts()) == await apply_list(store, [])


async def test_suddenly_short_list(store: Store) -> None:
    """Less than half of the previous length is rejected like an empty list; half is accepted."""
    await apply_list(store, rows(200))
    with pytest.raises(EmptyListError, match="a list of only 5 meetings, while 200 meetings are stored"):
        await apply_list(store, rows(5))
    assert ["created"] * 200 == await kinds(store)
    assert Applied(Counts(unchanged=200)) == await apply_list(store, rows(200))
    with pytest.raises(EmptyListError):
        await apply_list(store, rows(99))
    assert Applied(Counts(disappeared=195, unchanged=5)) == await apply_list(store, rows(5))
    assert Applied(Counts(disappeared=2, unchanged=3)) == await apply_list(store, rows(3))
    assert Applied(Counts(disappeared=3)) == await apply_list(store, [])
    await apply_list(store, rows(200))
    assert Applied(Counts(disappeared=100, unchanged=100)) == await apply_list(store, rows(100))


async def test_short_incomplete_list(store: Store) -> None:
    """An incomplete list makes nothing disappear, so it is accepted."""
    await apply_list(store, rows(8))
    applied = await apply_list(store, [*rows(2), {"no": "id"}])
    assert applied is not None
    assert Counts(unchanged=2) == applied.counts


async def test_pruned_meetings_count(store: Store) -> None:
    """Pruned meetings count as listed: once an empty list was accepted, they would reappear as new."""
    await apply_list(store, rows(6))
    await store.prune(before=LATER)
    with pytest.raises(EmptyListError, match="while 6 meetings are stored"):
        await apply_list(store, [])
    assert Applied(Counts(unchanged=6)) == await apply_list(store, rows(6))


async def test_confirm_empty_after(store: Store) -> None:
    """The number is configurable, and a few meetings may disappear at once."""
    await apply_list(store, rows(4))
    assert Applied(Counts(disappeared=4)) == await apply_list(store, [], confirm_empty_after=1)
    await apply_list(store, rows(3))
    assert Applied(Counts(disappeared=3)) == await apply_list(store, [], confirm_empty_after=5)
    await apply_list(store, rows(4))
    for _ in range(2):
        with pytest.raises(EmptyListError):
            await apply_list(store, [], confirm_empty_after=3)
    assert Applied(Counts(disappeared=4)) == await apply_list(store, [], confirm_empty_after=3)


async def test_unreadable_rows(store: Store) -> None:
    """An odd value does no harm. Without an id nothing disappears, and each run reports the row."""
    await apply_list(store, rows(2))
    odd = [{"_id": "mee_0", "start": "never"}, {"no": "id"}]
    applied = await apply_list(store, odd)
    assert applied is not None
    assert Counts(changed=1) == applied.counts
    assert [1] == [bad.index for bad in applied.bad_rows]
    again = await apply_list(store, odd)
    assert again is not None
    assert (Counts(unchanged=1), [1]) == (again.counts, [bad.index for bad in again.bad_rows])
    assert Applied(Counts(changed=1, unchanged=1)) == await apply_list(store, rows(2))


async def test_manual_delivery(store: Store) -> None:
    """Changes stay pending, in order per account, until they are marked; each can be marked once."""
    await apply_list(store, rows(3))
    await apply_list(store, rows(1), user_id="usr_2")
    first, second = await store.pending(USER, 2)
    assert ("mee_0", "mee_1") == (first.meeting_id, second.meeting_id)
    assert 1 == await store.mark_delivered([first])
    assert 0 == await store.mark_delivered([first])
    assert 0 == await store.mark_delivered([])
    assert ["mee_1", "mee_2"] == [change.meeting_id for change in await store.pending(USER, 10)]
    assert ["mee_1", "mee_2", "mee_0"] == [change.meeting_id for change in await outbox(store, pending=True)]
    delivered = [change.delivered_at is not None for change in await outbox(store)]
    assert [True, False, False, False] == delivered


async def test_unchanged(store: Store) -> None:
    """The last list is recognized by its hash, and counts as applied: an older list comes too late."""
    assert await store.unchanged(USER, "a") is None
    await apply_list(store, rows(3), body_hash="a")
    revision = await store.revision(USER)
    assert (3, None, None) == (
        await store.unchanged(USER, "a"),
        await store.unchanged(USER, "b"),
        await store.unchanged("usr_2", "a"),
    )
    assert await store.apply(USER, revision, rows(2), baseline=False, confirm_empty_after=2) is None
    await apply_list(store, [*rows(1), {"no": "id"}], body_hash="b")  # its bad row must be reported again
    assert (None, None) == (await store.unchanged(USER, "a"), await store.unchanged(USER, "b"))
    await apply_list(store, rows(3), body_hash="c")
    await apply_list(store, rows(2))
    assert await store.unchanged(USER, "c") is None
    await apply_list(store, rows(2), body_hash="d")
    await store.forget(USER)
    assert await store.unchanged(USER, "d") is None


async def test_unchanged_after_rejected_list(store: Store) -> None:
    """The count restarts: the next empty list is rejected again."""
    await apply_list(store, rows(4), body_hash="a")
    for _ in range(2):
        with pytest.raises(EmptyListError):
            await apply_list(store, [], body_hash="b")
        assert await store.unchanged(USER, "b") is None
        assert Applied(Counts(unchanged=4)) == await apply_list(store, rows(4), body_hash="a")
        assert 4 == await store.unchanged(USER, "a")


async def test_attempts_and_parking(store: Store) -> None:
    """Attempts are counted. A parked change is set aside until it is retried, in its old place."""
    await apply_list(store, rows(3))
    await apply_list(store, rows(1), user_id="usr_2")
    first, second, third = await store.pending(USER, 9)
    await store.mark_delivered([first])
    await store.record_attempt([first, second, third], "ValueError: no", park=False)
    await store.record_attempt([second], "ValueError: never", park=True)
    assert [(1, "ValueError: no", None)] == [
        (change.attempts, change.error, change.parked_at) for change in await store.pending(USER, 9)
    ]
    (parked,) = [change async for change in store.changes(parked=True)]
    assert (second.seq, 2, "ValueError: never") == (parked.seq, parked.attempts, parked.error)
    assert parked.parked_at is not None
    assert datetime.now(UTC) - parked.parked_at < timedelta(minutes=10)
    assert [third.seq] == [c.seq for c in await outbox(store, pending=True) if c.user_id == USER]
    both = [c.seq async for c in store.changes(pending=True, parked=True) if c.user_id == USER]
    assert [second.seq, third.seq] == both
    assert (0, None) == (
        (await outbox(store))[0].attempts,
        (await outbox(store))[0].error,
    )  # it was delivered

    assert (0, 1, 0) == (
        await store.retry_parked("usr_2"), await store.retry_parked(), await store.retry_parked(USER)
    )  # fmt: skip
    assert [(second.seq, 0), (third.seq, 1)] == [(c.seq, c.attempts) for c in await store.pending(USER, 9)]
    await store.record_attempt([second], "ValueError: never", park=True)
    assert 1 == await store.mark_delivered([second])  # by hand, say
    assert (0, []) == (await store.retry_parked(), [c async for c in store.changes(parked=True)])


async def test_undelivered_changes_are_not_pruned(store: Store) -> None:
    """Pending and parked changes stay, since no handler accepted them."""
    await apply_list(store, rows(3))
    changes = await store.pending(USER, 9)
    await store.mark_delivered(changes[:1])
    await store.record_attempt(changes[1:2], "ValueError", park=True)
    assert 1 == (await store.prune(before=datetime.now(UTC) + timedelta(hours=1))).changes
    assert [c.seq for c in changes[1:]] == [c.seq for c in await outbox(store)]
    assert 3 == len(changes)


async def test_long_outbox(store: Store) -> None:
    """A long outbox is read completely, page by page."""
    await apply_list(store, rows(1100))
    found = await outbox(store)
    assert [f"mee_{number}" for number in range(1100)] == [change.meeting_id for change in found]
    assert sorted({change.seq for change in found}) == [change.seq for change in found]
    assert Applied(Counts(disappeared=1099, unchanged=1)) == await apply_list(
        store, rows(1), confirm_empty_after=1
    )


async def test_forget(store: Store) -> None:
    """Everything about one account is erased, and nothing about others. Synchronized again, it is new."""
    await apply_list(store, rows(3))
    await apply_list(store, rows(2), user_id="usr_2")
    assert Forgotten(meetings=3, changes=3) == await store.forget(USER)
    assert Forgotten(meetings=0, changes=0) == await store.forget(USER)
    assert (0, 1) == (await store.revision(USER), await store.revision("usr_2"))
    assert ["usr_2"] * 2 == [change.user_id for change in await outbox(store)]
    assert Applied(Counts(created=3)) == await apply_list(store, rows(3))


async def test_prune(store: Store) -> None:
    """Old data is erased; meetings that are still listed are not reported as new afterward."""
    old, new = rows(3), [{"_id": "mee_new", "end": "2026-02-05T08:30:00.000Z"}]
    await apply_list(store, [*old, *new])
    await apply_list(store, [*old[:2], *new])
    assert Forgotten(meetings=3, changes=0) == await store.prune(before=LATER)
    assert Forgotten(meetings=0, changes=0) == await store.prune(before=LATER)
    assert Applied(Counts(unchanged=3)) == await apply_list(store, [*old[:2], *new])
    before = len(await outbox(store))

    applied = await apply_list(store, [{**old[0], "start": END}, *new])
    assert Applied(Counts(changed=1, unchanged=1)) == applied
    (change,) = (await outbox(store))[before:]
    assert ("mee_0", "changed", ("end", "start")) == (change.meeting_id, change.kind, change.fields)
    assert {**old[0], "start": END} == change.wire
    assert Applied(Counts(created=1, unchanged=2)) == await apply_list(
        store, [{**old[0], "start": END}, old[1], *new]
    )


async def test_prune_erases_delivered_changes(store: Store) -> None:
    """Delivered changes are erased, others stay."""
    await apply_list(store, rows(2))
    await store.mark_delivered((await outbox(store))[:1])
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    assert 1 == (await store.prune(before=in_an_hour)).changes
    assert ["mee_1"] == [change.meeting_id for change in await outbox(store)]


async def test_prune_requires_aware_time(store: Store) -> None:
    """A naive time is rejected: it is a different moment in each time zone."""
    with pytest.raises(ConfigurationError, match="aware"):
        await store.prune(before=datetime(2026, 1, 6))  # noqa: DTZ001


async def test_following_the_outbox(store: Store) -> None:
    """A follower continues where it stopped, and each of several followers has its own partition."""
    users = [f"usr_{number}" for number in range(20)]
    for user_id in users:
        await apply_list(store, rows(3), user_id=user_id)
    everything = await outbox(store)
    assert everything[31:] == [change async for change in store.changes(after=everything[30].seq)]
    parts = [[change async for change in store.changes(of=(part, 3))] for part in range(3)]
    assert all(parts)
    assert everything == sorted(itertools.chain(*parts), key=lambda change: change.seq)
    by_part = [{change.user_id for change in part} for part in parts]
    assert len(users) == sum(map(len, by_part))
    assert all(part_of(user_id, 3) == part for part, users in enumerate(by_part) for user_id in users)
    with pytest.raises(ConfigurationError, match=r"changes\(of=\(3, 3\)\): pass \(i, n\)"):
        await anext(store.changes(of=(3, 3)))
