"""What this process holds of a key in Redis, and what Redis must hear of it: values only."""

import math
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key
from lemcal_async.ratelimit._cooldown import MARGIN, PAUSE_CAP
from lemcal_async.ratelimit._slots import COUNTED_WITHIN
from lemcal_async.ratelimit.redis._budget import ENOUGH_TRIPS, SOON, UNKNOWN, Budget, Leases
from lemcal_async.ratelimit.redis._script import Reports, ScriptReply, keys_of

PERIOD = 2.0
TURNOVER = PERIOD + MARGIN
LIFETIME = COUNTED_WITHIN + TURNOVER
LEAD = PERIOD / 2


@pytest.fixture
def leases() -> Leases:
    """Return the leases of a process that has none yet."""
    return Leases("me", PERIOD)


def answer(**changes: Any) -> ScriptReply:
    """Return what the script might say."""
    return attrs.evolve(UNKNOWN, **changes)


def approx(seconds: float) -> Any:
    """Return what equals about so much."""
    return pytest.approx(seconds)


def test_a_lease_is_renewed_until_the_request_leaves(leases: Leases) -> None:
    """Connecting may take long: half a lease before its end Redis hears that it is still needed."""
    lease = leases.take(7, 100.0)
    assert 100.0 + LIFETIME - LEAD == leases.due(100.0)
    assert Reports(open={}) == leases.reports(100.0)
    reports = leases.reports(101.0)
    assert Reports(open={"me:7": approx(LIFETIME)}) == reports
    leases.told(reports, 101.0)
    assert 101.0 + LIFETIME - LEAD == approx(leases.due(101.0))
    leases.sent(lease, 101.1)  # no news: what Redis knows covers it
    assert math.inf == leases.due(101.2)
    leases.sent(lease, 109.0)  # the first report counts
    assert 101.1 == lease.sent_at


def test_a_late_departure_is_reported(leases: Leases) -> None:
    """The server may count the request until half a second after it left."""
    lease = leases.take(1, 100.0)
    leases.sent(lease, 101.0)
    assert 100.0 + LIFETIME - LEAD == leases.due(101.0)
    assert {"me:1": approx(LIFETIME - 0.2)} == leases.reports(101.2).open


def test_an_answer_frees_the_slot_sooner(leases: Leases) -> None:
    """Reported half a period before it matters; then it is remembered until the server has forgotten."""
    lease = leases.take(1, 100.0)
    leases.sent(lease, 100.01)
    leases.answered(lease, 100.1)
    assert 100.1 + TURNOVER - LEAD == approx(leases.due(100.1))
    reports = leases.reports(101.0)
    assert Reports(ended={"me:1": approx(100.1 + TURNOVER - 101.0)}) == reports
    leases.told(reports, 101.0)
    assert math.inf == leases.due(101.0)
    assert 1 == len(leases)
    leases.forget(100.1 + TURNOVER)
    assert 0 == len(leases)


def test_a_slow_answer_changes_nothing(leases: Leases) -> None:
    """The server counted the request long before."""
    lease = leases.take(1, 100.0)
    leases.sent(lease, 100.0)
    leases.answered(lease, 109.0)
    assert math.inf == leases.due(109.0)


def test_what_never_left_is_given_back(leases: Leases) -> None:
    """Redis hears of it at once, unless it never knew; what may have been granted is treated the same."""
    lease, local = leases.take(1, 100.0), leases.take(2, None)
    leases.unsent(lease, 100.5)
    leases.unsent(local, 100.5)
    leases.perhaps(3, 2, 100.6)
    assert 100.5 + SOON == leases.due(100.6)
    reports = leases.reports(100.6)
    assert Reports(dropped=["me:1", "me:3", "me:4"]) == reports
    leases.told(reports, 100.6)
    assert 0 == len(leases)
    leases.forget(100.7)
    assert math.inf == leases.due(100.7)


def test_what_could_not_be_told_is_over_some_day(leases: Leases) -> None:
    """Redis has forgotten it by then."""
    leases.perhaps(1, 1, 100.0)
    leases.forget(100.0 + LIFETIME)
    assert 0 == len(leases)


def test_slots_that_redis_does_not_know(leases: Leases) -> None:
    """Taken without it, or lost by it: it hears of those that still count, and as soon as it is there."""
    lease, slow = leases.take(1, None), leases.take(2, None)
    leases.sent(lease, 100.0)
    leases.sent(slow, 90.0)  # forgotten by the server, though its answer is still out
    assert 100.2 == leases.due(100.2)
    leases.unknown(lease, 100.3)
    assert Reports(ended={"me:1": approx(LIFETIME - 0.4)}) == leases.reports(100.4)
    leases.told(leases.reports(100.4), 100.4)
    assert math.inf == leases.due(100.4)
    leases.perhaps(9, 1, 100.4)
    leases.lost()
    assert ["me:1"] == list(leases.reports(100.5).ended)
    assert [] == leases.reports(100.5).dropped


def test_the_shortest_trip(leases: Leases) -> None:
    """Once all processes have seen enough, an answer proves that the server counted that much earlier."""
    lease = leases.take(1, 100.0)
    leases.sent(lease, 100.0)
    leases.answered(lease, 100.1)
    assert (1, approx(0.1)) == (leases.trips, leases.trip)
    leases.learn(ENOUGH_TRIPS - 1, 0.04)
    assert {"me:1": approx(TURNOVER)} == leases.reports(100.1).ended
    leases.learn(ENOUGH_TRIPS, 0.04)
    assert 0 == leases.trips
    assert {"me:1": approx(TURNOVER - 0.04)} == leases.reports(100.1).ended
    leases.told(leases.reports(100.1), 100.1)
    leases.learn(ENOUGH_TRIPS, 0.01)  # what was told stays
    assert math.inf == leases.due(100.1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "answered", "unsent", "unknown"]), st.floats(0, 5)), max_size=8
    )
)
def test_redis_never_frees_a_slot_early(events: list[tuple[str, float]]) -> None:
    """Whatever happens when: told when it is due, Redis keeps a slot until the server has forgotten it."""
    leases, now = Leases("me", PERIOD), 0.0
    lease = leases.take(1, now)
    known = now + LIFETIME
    for kind, pause in events:
        until = now + pause
        while (due := max(now, leases.due(now))) < until:
            now = due
            reports = leases.reports(now)
            for left in (reports.open | reports.ended).values():
                known = now + left
            leases.told(reports, now)
            leases.forget(now)
        now = until
        if lease.end is None:
            if kind == "sent":
                assert lease.sent_at is not None or known >= now  # it is still ours as it leaves
                leases.sent(lease, now)
            else:
                getattr(leases, kind)(lease, now)
        if kind == "unsent":
            return
    leases.told(reports := leases.reports(now), now)
    for left in (reports.open | reports.ended).values():
        known = now + left
    if lease.sent_at is not None and lease.end is not None and lease.end > now:
        assert known >= lease.sent_at + PERIOD


def test_keys() -> None:
    """Budgets differ by credential and by address, and show neither."""
    one = keys_of("p:", Key("https://a.example", "d1"))
    assert ["state", "leases", "slots", "waiting"] == [name.rpartition(":")[2] for name in one]
    assert len({keys_of("p:", Key(url, digest))[0] for url in ("a", "b") for digest in ("d1", "d2")}) == 4
    assert one[0].startswith("p:{d1-")
    assert "example" not in one[0]


def test_estimates() -> None:
    """By when slots come free, who else waits, and the pause."""
    budget = Budget("me", 3, PERIOD)
    assert [0.0, 0.0, 0.0, TURNOVER] == [budget.estimate(100.0, ahead) for ahead in range(4)]
    ask = budget.ask(100.0, 5, 0)
    budget.hear(ask, answer(epoch="e", limit=3, frees=[1.5, 0.5]), 100.0, 100.0)
    assert [0.0, 0.4, 1.4, TURNOVER] == pytest.approx([budget.estimate(100.1, ahead) for ahead in range(4)])
    budget.hear(ask, answer(epoch="e", limit=3, others=[1, 50]), 100.0, 100.0)
    assert TURNOVER == budget.estimate(100.0, 1)  # 1 here, 1 of the one, 1 of the other go before
    budget.pause(100.0, 7.0)
    assert 7.0 + MARGIN == approx(budget.estimate(100.0, 0))
    assert 7.0 + MARGIN + TURNOVER == approx(budget.estimate(100.0, 1))


def test_pauses() -> None:
    """As in the local limiter: a shorter one changes nothing, too long a one holds for a minute."""
    budget = Budget("me", 3, PERIOD)
    budget.pause(100.0, 5.0)
    budget.pause(100.0, 1.0)
    assert 105.0 + MARGIN == budget.paused_until
    assert 0.0 == budget.refused_for(100.0)
    budget.pause(101.0, 86_400.0)
    assert (101.0 + PAUSE_CAP + MARGIN, 86_399.0) == (budget.paused_until, budget.refused_for(102.0))
    assert 0.0 == budget.refused_for(101.0 + PAUSE_CAP + MARGIN)
    budget.pause(200.0, 1.0)
    assert 0.0 == budget.refused_for(200.5)
    assert budget.urgent()
    ask = budget.ask(200.5, 2, 1)
    assert 0.5 + MARGIN == approx(ask.pause)
    assert not budget.urgent()
    budget.unheard(ask, 200.6)  # to be told again
    assert budget.urgent()
    assert ask.pause > budget.ask(200.7, 0, 0).pause > 0


def test_headers() -> None:
    """A lower limit and use by others are urgent, what is known is not; what is over is not told."""
    budget = Budget("me", 20, PERIOD)
    budget.read(Quota(limit=20), 100.0)
    budget.read(Quota(limit=50, remaining=50, retry_after=1.0), 100.0)
    assert not budget.urgent()
    budget.read(Quota(limit=20, remaining=6, retry_after=0.7), 100.0)
    budget.read(Quota(limit=20, remaining=9, retry_after=0.7), 100.0)  # out of order
    ask = budget.ask(100.1, 0, 0)
    assert (14, approx(0.6 + MARGIN)) == (ask.used.requests, ask.used.window)
    budget.unheard(ask, 100.2)
    assert 0 == budget.ask(109.0, 0, 0).used.requests
    budget.hear(ask, answer(epoch="e", limit=20, expected=14), 100.1, 100.2)
    budget.read(Quota(limit=20, remaining=6, retry_after=0.7), 100.3)
    assert not budget.urgent()
    budget.read(Quota(limit=10), 100.3)
    assert 10 == budget.limit
    assert 10 == budget.ask(100.4, 0, 0).header_limit
