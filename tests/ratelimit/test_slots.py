"""The arithmetic of one key's budget, on a clock that is a plain number.

The machine at the end drives the log against a server that counts each request at some moment
between its departure and its answer, and looks for a period with more arrivals than the limit.
"""

import copy
import heapq
import itertools
import math

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.slots import COUNTED_WITHIN, MARGIN, PAUSE_CAP, Slot, SlotLog, hold_after_429

LIMIT = 20
PERIOD = 2.0
SILENT = Quota()
TURNOVER = PERIOD + MARGIN  # the least time from one use of a slot to the next
SURELY_COUNTED = COUNTED_WITHIN + TURNOVER  # after a departure: the slot's end without an answer


def new_log(limit: int = LIMIT) -> SlotLog:
    """Return a log of which nothing is known."""
    return SlotLog(limit, PERIOD)


def granted(log: SlotLog, now: float) -> list[Slot]:
    """Take all that is granted now."""
    slots = []
    while log.next_at(now) <= now:
        slots.append(log.take())
    return slots


def depart(log: SlotLog, now: float, count: int = 1) -> list[Slot]:
    """Take so many slots and send their requests at once."""
    slots = [log.take() for _ in range(count)]
    for slot in slots:
        log.sent(slot, now)
    return slots


def answer(
    log: SlotLog, slots: list[Slot], now: float, status_code: int = 200, quota: Quota = SILENT
) -> None:
    """Have all these requests answered at once."""
    for slot in slots:
        log.answered(slot, now, status_code, quota)


def refuse(log: SlotLog, now: float, retry_after: float | None) -> None:
    """Send one request at ``now``, and have it answered with a 429 at once."""
    answer(log, depart(log, now), now, 429, Quota(retry_after=retry_after))


class TestGrants:
    """How many requests may go, and when the next one may."""

    def test_an_unknown_key_gets_the_whole_limit_at_once(self) -> None:
        """The server's window starts with the first request, so a burst of the limit is fine."""
        log = new_log()
        assert (LIMIT, 0.0, 0.0) == (log.remaining(100.0), log.resets_in(100.0), log.paused_for(100.0))
        assert LIMIT == len(granted(log, 100.0))
        assert 0 == log.remaining(100.0)

    def test_what_has_not_left_holds_its_slot(self) -> None:
        """With all slots granted and none sent, the next grant waits for a report."""
        log = new_log()
        granted(log, 0.0)
        assert math.inf == log.next_at(1000.0)

    def test_a_slot_ends_a_period_after_its_answer(self) -> None:
        """Without a history, the server counted the request when its answer came at the latest."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        answer(log, slots[1:], 0.1)
        assert pytest.approx(0.1 + TURNOVER) == log.next_at(0.1)

    def test_no_round_trip_is_taken_off(self) -> None:
        """However long the way back usually takes: a network that becomes faster would make it too much."""
        log = new_log()
        answer(log, depart(log, 0.0, LIMIT), 0.1)
        answer(log, depart(log, 5.0, LIMIT), 5.3)
        assert pytest.approx(5.3 + TURNOVER) == log.next_at(5.3)

    def test_a_slow_answer_does_not_hold_its_slot(self) -> None:
        """A handler that takes 2.5 s has counted its request when it came, not when it answers."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        assert pytest.approx(SURELY_COUNTED) == log.next_at(0.0)
        answer(log, slots[:1], 2.5)
        assert pytest.approx(SURELY_COUNTED) == log.next_at(2.5)
        assert LIMIT == len(granted(log, SURELY_COUNTED + 1e-9))

    def test_a_slow_connect_does_not_double_the_burst(self) -> None:
        """Granted at once but sent 0.8 s later, the slots count from the departure."""
        log = new_log()
        slots = granted(log, 0.0)
        for slot in slots:
            log.sent(slot, 0.8)
        assert pytest.approx(0.8 + SURELY_COUNTED) == log.next_at(0.8)
        answer(log, slots, 0.801)
        assert pytest.approx(0.801 + TURNOVER) == log.next_at(0.801)

    def test_a_wire_that_cannot_tell_when_it_sent_gets_no_bound(self) -> None:
        """Without the moment of departure only the answer says that the request was counted."""
        log = new_log()
        slots = granted(log, 0.0)
        assert math.inf == log.next_at(5.0)
        answer(log, slots, 5.0)
        assert pytest.approx(5.0 + TURNOVER) == log.next_at(5.0)

    def test_what_never_reached_the_server_is_given_back_at_once(self) -> None:
        """A failed connect costs nothing, whether it was taken for sent or not."""
        log = new_log()
        slots = granted(log, 0.0)
        log.sent(slots[0], 0.0)
        for slot in slots[:3]:
            log.unsent(slot)
        assert 3 == log.remaining(0.0) == len(granted(log, 0.0))

    def test_what_may_have_been_counted_is_not_given_back(self) -> None:
        """A request that was broken off holds its slot from its departure, or else from the break."""
        log = new_log(2)
        sent, silent = granted(log, 0.0)
        log.sent(sent, 0.1)
        log.unknown(sent, 3.0)
        assert pytest.approx(3.0) == log.next_at(3.0)
        log.unknown(silent, 3.0)
        assert 1 == log.remaining(3.0)
        log.take()
        assert pytest.approx(3.0 + SURELY_COUNTED) == log.next_at(3.0)

    def test_hanging_requests_are_capped_at_twice_the_limit(self) -> None:
        """However long they hang, one account does not fill the connections that others need."""
        log = new_log()
        first = depart(log, 0.0, LIMIT)
        depart(log, 10.0, LIMIT)
        assert math.inf == log.next_at(20.0)
        assert 0 == log.remaining(20.0)
        answer(log, first[:1], 20.0)
        assert 1 == log.remaining(20.0) == len(granted(log, 20.0))

    def test_after_a_fork_all_that_is_in_flight_may_have_been_counted(self) -> None:
        """The child hears of no answers: it waits as if each request were counted late."""
        log = new_log()
        log.sent(granted(log, 0.0)[0], 0.0)
        log.abandon(1.0)
        assert pytest.approx(SURELY_COUNTED) == log.next_at(1.0)
        assert 1 == log.remaining(SURELY_COUNTED + 0.1)
        assert LIMIT == log.remaining(1.0 + SURELY_COUNTED + 1e-9)

    @pytest.mark.parametrize("end", ["answered", "unsent", "unknown"])
    def test_the_first_end_counts(self, end: str) -> None:
        """A permit ends once: what is reported after that changes nothing."""
        log = new_log(1)
        (slot,) = depart(log, 0.0)
        if end == "answered":
            answer(log, [slot], 0.1)
        elif end == "unsent":
            log.unsent(slot)
        else:
            log.unknown(slot, 0.1)
        before = log.next_at(0.2), log.resets_in(0.2)
        log.sent(slot, 0.2)
        log.unsent(slot)
        log.unknown(slot, 0.2)
        answer(log, [slot], 0.2, 429, Quota(limit=1, remaining=0, retry_after=30.0))
        assert before == (log.next_at(0.2), log.resets_in(0.2))


class TestPauses:
    """What a 429 does to the whole key."""

    def test_nobody_sends_for_the_time_that_the_server_names(self) -> None:
        """The key is held for Retry-After, however many slots are free."""
        log = new_log()
        refuse(log, 10.0, 1.283)
        assert pytest.approx(11.283 + MARGIN) == log.next_at(10.0)
        assert pytest.approx(1.283 + MARGIN) == log.paused_for(10.0)
        assert (0, 0.0) == (log.remaining(10.0), log.refused_for(10.0))
        assert 0.0 == log.paused_for(11.31)
        assert LIMIT - 1 == log.remaining(11.31)

    def test_other_answers_hold_nothing(self) -> None:
        """Every answer carries Retry-After: on a success it is the rest of the window."""
        log = new_log()
        for status_code in (200, 404, 500, 503):
            answer(log, depart(log, 0.0), 0.1, status_code, Quota(retry_after=1.9))
        assert 0.0 == log.paused_for(0.1)
        assert LIMIT - 4 == log.remaining(0.1)

    def test_a_second_refusal_never_shortens_the_pause(self) -> None:
        """Of several orders to wait the one that ends last stands."""
        log = new_log()
        slots = depart(log, 0.0, 3)
        for slot, retry_after in zip(slots, (1.283, 0.2, 1.5), strict=True):
            log.answered(slot, 0.1, 429, Quota(retry_after=retry_after))
            assert pytest.approx(max(1.283, retry_after) + MARGIN) == log.paused_for(0.1)

    def test_a_refusal_that_does_not_say_how_long_holds_a_whole_window(self) -> None:
        """Without a usable header a window is what the wait can be at most."""
        log = new_log()
        refuse(log, 0.0, None)
        assert pytest.approx(TURNOVER) == log.paused_for(0.0)
        assert PERIOD == hold_after_429(SILENT, PERIOD)
        assert 0.4 == hold_after_429(Quota(retry_after=0.4), PERIOD)

    @pytest.mark.parametrize(
        ("retry_after", "paused_for", "refused_for"),
        [(59.0, 59.0 + MARGIN, 0.0), (60.0, 60.0 + MARGIN, 0.0), (86_400.0, PAUSE_CAP + MARGIN, 86_400.0)],
    )
    def test_a_wait_too_long_to_be_slept_through(
        self, retry_after: float, paused_for: float, refused_for: float
    ) -> None:
        """Above a minute it is an error for the caller; the key is tried again after a minute."""
        log = new_log()
        refuse(log, 0.0, retry_after)
        assert pytest.approx(paused_for) == log.paused_for(0.0)
        assert refused_for == log.refused_for(0.0)
        assert 0.0 == log.refused_for(PAUSE_CAP + MARGIN + 1e-9)

    def test_a_long_order_counts_down(self) -> None:
        """While the key is held, callers are told what is left of the order."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        assert 86_370.0 == log.refused_for(30.0)

    def test_a_shorter_refusal_does_not_lift_a_long_order(self) -> None:
        """Refusals of requests that were in flight together: the longest stands."""
        log = new_log()
        slots = depart(log, 0.0, 2)
        answer(log, slots[:1], 0.1, 429, Quota(retry_after=600.0))
        answer(log, slots[1:], 0.2, 429, Quota(retry_after=0.5))
        assert pytest.approx(599.9) == log.refused_for(0.2)

    @pytest.mark.parametrize(("retry_after", "refused_for"), [(0.5, 0.0), (3600.0, 3600.0)])
    def test_after_the_minute_a_new_order_replaces_the_old_one(
        self, retry_after: float, refused_for: float
    ) -> None:
        """What the server says when it is tried again is what counts from then on."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        refuse(log, 100.0, retry_after)
        assert refused_for == log.refused_for(100.0)
        assert log.paused_for(100.0) > 0


class TestHeaders:
    """What the quota headers of an answer change."""

    def test_room_that_others_use_is_left_to_them(self) -> None:
        """The first answer says 6 remain for 0.7 s: at most 6 more leave until then."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        answer(log, [slot], 0.1, quota=Quota(limit=20, remaining=6, retry_after=0.7))
        assert 6 == log.remaining(0.1)
        assert 6 == len(granted(log, 0.1))
        assert pytest.approx(0.8 + MARGIN) == log.next_at(0.1)
        assert [] == granted(log, 0.8)
        assert 13 == log.remaining(0.8 + MARGIN + 1e-9)

    def test_the_same_requests_of_others_are_counted_once(self) -> None:
        """Each answer of a window tells of the same strangers; only new ones take more room."""
        log = new_log()
        slots = depart(log, 0.0, 3)
        for remaining, slot in zip((9, 8, 7), slots, strict=True):
            answer(log, [slot], 0.1, quota=Quota(limit=20, remaining=remaining, retry_after=1.9))
        assert 7 == log.remaining(0.1)

    @given(st.integers(1, 40), st.integers(0, 40), st.floats(0, 5), st.integers(1, 40))
    def test_never_more_than_the_server_says_remain(
        self, limit: int, remaining: int, retry_after: float, configured: int
    ) -> None:
        """After a first answer no more leave than remain, and no fewer than the limit allows."""
        log = new_log(configured)
        quota = Quota(limit=limit, remaining=remaining, retry_after=retry_after)
        answer(log, depart(log, 0.0), 0.0, quota=quota)
        assert min(remaining, min(limit, configured) - 1) == log.remaining(0.0)

    def test_the_room_for_others_is_held_for_a_period_at_most(self) -> None:
        """A Retry-After longer than the window does not stop the key for long."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=Quota(limit=20, remaining=0, retry_after=900.0))
        assert 0 == log.remaining(TURNOVER - 0.01)
        assert LIMIT == log.remaining(TURNOVER + 0.01)

    @pytest.mark.parametrize("quota", [SILENT, Quota(remaining=0), Quota(limit=20, retry_after=1.5)])
    def test_headers_that_are_not_all_there_tell_nothing_of_others(self, quota: Quota) -> None:
        """Without both the rest and its end, the log stands alone."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=quota)
        assert LIMIT - 1 == log.remaining(0.0)

    def test_a_header_lowers_the_limit(self) -> None:
        """A smaller quota than configured is kept to, and what is out already counts against it."""
        log = new_log()
        slots = depart(log, 0.0, 12)
        answer(log, slots, 0.1, quota=Quota(limit=5))
        assert (5, 0) == (log.limit, log.remaining(0.1))
        end = 0.1 + TURNOVER + 1e-9
        assert 5 == len(granted(log, end))

    def test_with_a_lowered_limit_as_many_must_end_as_are_too_many(self) -> None:
        """Eight are out and five are allowed: the next one goes when four of the eight have ended."""
        log = new_log()
        for number in range(8):
            answer(
                log, depart(log, number / 10), number / 10, quota=Quota(limit=5) if number == 7 else SILENT
            )
        assert pytest.approx(0.3 + TURNOVER) == log.next_at(0.7)
        assert pytest.approx(0.3 + TURNOVER - 0.7) == log.estimate(0.7, 0)

    @pytest.mark.parametrize("quota", [Quota(limit=100), Quota(limit=100, remaining=99, retry_after=1.0)])
    def test_a_header_never_raises_the_limit(self, quota: Quota) -> None:
        """More than configured is not taken, even if the server offers it."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=quota)
        assert (LIMIT, LIMIT - 1) == (log.limit, log.remaining(0.0))

    def test_a_lowered_limit_comes_back_no_higher_than_it_was(self) -> None:
        """When the server allows the configured limit again, so does the log."""
        log = new_log()
        limits = []
        for allowed in (5, 50, 3, None, 0):
            answer(log, depart(log, 0.0), 0.0, quota=Quota(limit=allowed))
            limits.append(log.limit)
        assert [5, 20, 3, 3, 3] == limits


class TestForecasts:
    """What can be told of the time to come."""

    def test_an_idle_log_has_nothing_to_remember(self) -> None:
        """Idle is: nothing in flight, nothing counted, no pause."""
        log = new_log()
        assert log.idle(0.0)
        (slot,) = granted(log, 0.0)[:1]
        log.abandon(0.0)
        assert slot.ended
        assert not log.idle(SURELY_COUNTED - 0.01)
        assert log.idle(SURELY_COUNTED + 0.01)

    def test_a_request_in_flight_and_a_pause_are_remembered(self) -> None:
        """Neither a request that hangs for an hour nor a pause of a minute is forgotten."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        assert not log.idle(3600.0)
        log.answered(slot, 3600.0, 429, Quota(retry_after=60.0))
        assert not log.idle(3659.0)
        assert log.idle(3660.1)

    def test_when_the_whole_limit_is_free_again(self) -> None:
        """The budget is whole when the last slot has ended and the pause is over."""
        log = new_log()
        slots = depart(log, 0.0, 2)
        assert pytest.approx(SURELY_COUNTED) == log.resets_in(0.0)
        answer(log, slots[:1], 1.0)
        assert pytest.approx(SURELY_COUNTED - 1.0) == log.resets_in(1.0)
        log.take()
        assert pytest.approx(SURELY_COUNTED) == log.resets_in(1.0)
        answer(log, slots[1:], 1.0, 429, Quota(retry_after=30.0))
        assert pytest.approx(30.0 + MARGIN) == log.resets_in(1.0)
        assert SURELY_COUNTED == pytest.approx(log.resets_in(100.0))

    @pytest.mark.parametrize(
        ("ahead", "wait"),
        [
            (0, 0.0),
            (14, 0.0),
            (15, 1.0 + MARGIN),
            (19, 1.0 + MARGIN),
            (20, TURNOVER),
            (34, TURNOVER),
            (35, 1.0 + MARGIN + TURNOVER),
            (40, 2 * TURNOVER),
        ],
    )
    def test_estimate_of_a_queue(self, ahead: int, wait: float) -> None:
        """With 5 of 20 used a second ago: 15 go now, 5 in a second, the next round a period later."""
        log = new_log()
        answer(log, depart(log, 9.0, 5), 9.0)
        assert pytest.approx(wait) == log.estimate(10.0, ahead)

    @pytest.mark.parametrize(
        ("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.02), (59, 4.04), (10_000, 1010.0)]
    )
    def test_estimate_for_a_key_that_is_not_known(self, ahead: int, wait: float) -> None:
        """Twenty go at once, and twenty more each period."""
        assert pytest.approx(wait) == new_log().estimate(0.0, ahead)

    @pytest.mark.parametrize(("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.02), (45, 4.04)])
    def test_estimate_during_a_pause(self, ahead: int, wait: float) -> None:
        """First the pause, then a limit's worth each period."""
        log = new_log()
        refuse(log, 0.0, 30.0)
        assert pytest.approx(30.0 + MARGIN + wait) == log.estimate(0.0, ahead)

    def test_estimate_with_answers_overdue(self) -> None:
        """A slot whose request hangs may come free at any moment from now on, and then go round."""
        log = new_log(1)
        depart(log, 0.0)
        assert 0.0 == log.estimate(2.4, 0)
        assert pytest.approx(TURNOVER) == log.estimate(2.4, 1)

    def test_estimate_after_broken_requests(self) -> None:
        """A slot that is free now may come round before one whose request may be counted late."""
        log = new_log(2)
        log.unknown(depart(log, 0.0)[0], 0.0)
        assert TURNOVER >= log.estimate(0.0, 1)


lateness = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@attrs.define(eq=False)
class Request:
    """One request in the simulated world, and what only the server knows of it."""

    slot: Slot
    tells: bool  # whether the wire reports the departure
    departed_at: float | None = None
    counted_at: float = math.inf
    answerable_at: float = math.inf


class LogMachine(RuleBasedStateMachine):
    """The log between clients that may do anything and a server that counts strictly.

    The way there takes ``there`` seconds or more, the way back ``back`` or more, and no answer
    tells how long each of them took.
    """

    @initialize(
        limit=st.integers(1, 4),
        there=st.sampled_from([0.0, 0.001, 0.05, 0.3]),
        back=st.sampled_from([0.0, 0.001, 0.05, 0.3]),
    )
    def start(self, limit: int, there: float, back: float) -> None:
        """Send a first request over an empty network."""
        self.limit, self.there, self.back = limit, there, back
        self.now = 0.0
        self.log = SlotLog(limit, PERIOD)
        self.requests: list[Request] = []
        self.arrivals: list[float] = []
        self.held_until = -math.inf
        first = self.grant(tells=True)
        self.depart(first, late=0.0)
        self.now = first.answerable_at
        self.finish(first, 200, SILENT)

    def grant(self, *, tells: bool) -> Request:
        """Take a slot."""
        assert self.held_until <= self.now
        request = Request(self.log.take(), tells)
        self.requests.append(request)
        return request

    def depart(self, request: Request, late: float) -> None:
        """Send a request that takes ``late`` of the time in which the server must count it."""
        request.departed_at = self.now
        request.counted_at = self.now + self.there + late * (COUNTED_WITHIN - self.there)
        request.answerable_at = request.counted_at + self.back
        self.arrivals.append(request.counted_at)
        if request.tells:
            self.log.sent(request.slot, self.now)

    def finish(self, request: Request, status_code: int, quota: Quota) -> None:
        """Report the answer."""
        self.requests.remove(request)
        self.log.answered(request.slot, self.now, status_code, quota)
        if status_code == 429:
            hold = PERIOD if quota.retry_after is None else min(quota.retry_after, PAUSE_CAP)
            self.held_until = max(self.held_until, self.now + hold)

    def granted(self) -> list[Request]:
        """Return the requests that have not left."""
        return [request for request in self.requests if request.departed_at is None]

    def under_way(self) -> list[Request]:
        """Return the requests that have left."""
        return [request for request in self.requests if request.departed_at is not None]

    @rule(tells=st.booleans(), count=st.integers(1, 5))
    def ask(self, tells: bool, count: int) -> None:  # noqa: FBT001 - drawn by hypothesis
        """Take what is granted."""
        for _ in range(count):
            if self.log.next_at(self.now) > self.now:
                return
            self.grant(tells=tells)

    @rule(late=st.lists(lateness, min_size=5, max_size=5))
    def burst(self, late: list[float]) -> None:
        """Take what is granted, and send it at once."""
        for share in late:
            if self.log.next_at(self.now) > self.now:
                return
            self.depart(self.grant(tells=True), share)

    @precondition(lambda self: self.granted())
    @rule(data=st.data(), late=lateness)
    def leave(self, data: st.DataObject, late: float) -> None:
        """Let a granted request leave, maybe long after the grant."""
        self.depart(data.draw(st.sampled_from(self.granted())), late)

    @precondition(lambda self: self.under_way())
    @rule(
        data=st.data(),
        status_code=st.sampled_from([200, 200, 200, 404, 429, 503]),
        quota=st.builds(
            Quota,
            limit=st.none() | st.integers(0, 6),
            remaining=st.none() | st.integers(0, 6),
            retry_after=st.none() | st.floats(0, 3) | st.just(86_400.0),
        )
        | st.just(SILENT),
    )
    def hear(self, data: st.DataObject, status_code: int, quota: Quota) -> None:
        """Let an answer arrive, as soon as it can or later."""
        request = data.draw(st.sampled_from(self.under_way()))
        self.now = max(self.now, request.answerable_at)
        self.finish(request, status_code, quota)

    @precondition(lambda self: self.granted())
    @rule(data=st.data())
    def fail_to_connect(self, data: st.DataObject) -> None:
        """Give up a request that has not left."""
        request = data.draw(st.sampled_from(self.granted()))
        self.requests.remove(request)
        self.log.unsent(request.slot)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data())
    def break_off(self, data: st.DataObject) -> None:
        """Lose a request that has left: cancelled, timed out, disconnected."""
        request = data.draw(st.sampled_from(self.under_way()))
        self.requests.remove(request)
        self.log.unknown(request.slot, self.now)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule()
    def wait_for_the_next(self) -> None:
        """Let time pass until just the moment at which the log wants to grant again."""
        when = self.log.next_at(self.now)
        if when < math.inf:
            self.now = max(self.now, when)
            assert self.log.next_at(self.now) <= self.now

    @invariant()
    def the_limit_holds(self) -> None:
        """Look for more arrivals than the limit in less than a period."""
        arrivals = sorted(self.arrivals)
        for first, last in zip(arrivals, arrivals[self.limit :], strict=False):
            assert last - first >= PERIOD - 1e-9

    @invariant()
    def a_grant_comes(self) -> None:
        """Nobody waits for ever, unless for requests in flight; and a limit is never raised."""
        assert self.log.limit <= self.limit
        assert self.log.next_at(self.now) < math.inf or self.requests

    @rule()
    def remaining_is_what_can_be_had(self) -> None:
        """As many can be taken at once as the log says remain."""
        assert len(granted(copy.deepcopy(self.log), self.now)) == self.log.remaining(self.now)

    @rule()
    def resets_in_is_long_enough(self) -> None:
        """If nothing else is sent, the whole limit is free when the log says."""
        log = copy.deepcopy(self.log)
        whole_at = self.now + log.resets_in(self.now) + 1e-9
        log.abandon(self.now)
        assert log.idle(whole_at)
        assert log.limit == log.remaining(whole_at)

    @precondition(lambda self: len(self.arrivals) > 1)
    @rule()
    def nobody_waits_less_than_estimated(self) -> None:
        """In the fastest of all worlds, a queue is served no sooner than the log estimates."""
        estimates = [self.log.estimate(self.now, ahead) for ahead in range(3 * self.limit + 2)]
        assert all(later >= sooner - 1e-9 for sooner, later in itertools.pairwise(estimates))
        waits = self.fastest(len(estimates))
        for estimate, wait in zip(estimates, waits, strict=True):
            assert estimate <= wait + 1e-9

    def fastest(self, count: int) -> list[float]:
        """Return how long each of ``count`` requests waits if all goes as fast as it can."""
        log, requests = copy.deepcopy((self.log, self.requests))
        numbers = itertools.count()
        answers: list[tuple[float, int, Slot]] = []
        now = self.now
        for request in requests:
            due = max(now, request.answerable_at)
            if request.departed_at is None:
                if request.tells:
                    log.sent(request.slot, now)
                due = now + self.there + self.back
            heapq.heappush(answers, (due, next(numbers), request.slot))
        waits: list[float] = []
        while True:
            while answers and answers[0][0] <= now:
                log.answered(heapq.heappop(answers)[2], now, 200, SILENT)
            while log.next_at(now) <= now:
                waits.append(now - self.now)
                if len(waits) == count:
                    return waits
                slot = log.take()
                log.sent(slot, now)
                heapq.heappush(answers, (now + self.there + self.back, next(numbers), slot))
            now = min(log.next_at(now), answers[0][0] if answers else math.inf)


LogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestLogAgainstAServer = LogMachine.TestCase
