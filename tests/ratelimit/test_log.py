"""The arithmetic of one key's budget, on a clock that is a plain number.

Tables and single steps; whatever else may happen is for ``test_invariants.py``.
"""

import math

import attrs
import pytest
from hypothesis import given, strategies as st

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._log import MAX_LIMIT_FACTOR, SLACK, SlidingWindowLog
from lemcal_async.ratelimit._server import ROUNDING, SKEW, ServerModel
from lemcal_async.ratelimit._slots import LOST_AFTER, LOST_KEPT_FOR, MARGIN, PAUSE_CAP, Slot, pause_after_429

LIMIT = 20
PERIOD = 2.0
SILENT = Quota()
TURNOVER = PERIOD + MARGIN  # the least time from one use of a slot to the next
GIVEN_UP = LOST_AFTER + TURNOVER  # after a departure: the end of the slot of a request that was cut off


def new_log(limit: int = LIMIT) -> SlidingWindowLog:
    """Return a log of which nothing is known."""
    return SlidingWindowLog(limit, PERIOD)


def granted(log: SlidingWindowLog, now: float) -> list[Slot]:
    """Take all that is granted now."""
    slots = []
    while log.next_at(now) <= now:
        slots.append(log.take(now))
    return slots


def depart(log: SlidingWindowLog, now: float, count: int = 1) -> list[Slot]:
    """Take so many slots and send their requests at once."""
    slots = [log.take(now) for _ in range(count)]
    for slot in slots:
        log.sent(slot, now)
    return slots


def answer(
    log: SlidingWindowLog, slots: list[Slot], now: float, status_code: int = 200, quota: Quota = SILENT
) -> None:
    """Have all these requests answered at once."""
    for slot in slots:
        log.answered(slot, now, status_code, quota)


def told(used: int, rest: float = 1.9) -> Quota:
    """Return what the headers say when so many requests count."""
    return Quota(limit=LIMIT, remaining=LIMIT - used, retry_after=rest)


def hang(log: SlidingWindowLog, now: float) -> list[Slot]:
    """Send a whole burst, of which one answer comes and tells that all were counted; return the others."""
    slots = depart(log, now, LIMIT)
    answer(log, [slots.pop()], now, quota=told(LIMIT, 2.0))
    return slots


def refuse(log: SlidingWindowLog, now: float, retry_after: float | None) -> None:
    """Send one request at ``now``, and have it answered with a 429 at once."""
    answer(log, depart(log, now), now, 429, Quota(retry_after=retry_after))


class TestGrants:
    """How many requests may go, and when the next one may."""

    def test_an_unknown_key_gets_the_whole_limit_at_once(self) -> None:
        """The server's window starts with the first request, so a burst of the limit is fine."""
        log = new_log()
        assert (LIMIT, 0.0, 0.0) == (log.remaining(100.0), log.resets_in(100.0), log.cooldown.left(100.0))
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

    def test_the_round_trips_of_one_moment_are_not_relied_on(self) -> None:
        """All of one burst may be slow, and the next request quick: nothing is taken off."""
        log = new_log()
        answer(log, depart(log, 0.0, LIMIT), 0.1)
        assert pytest.approx(0.1 + TURNOVER) == log.next_at(0.1)

    def test_half_of_the_quickest_round_trip_is_taken_off(self) -> None:
        """The way back of the answer and the way there of the next request, less what more may show."""
        log = new_log()
        answer(log, depart(log, 0.0, LIMIT), 0.1)
        answer(log, depart(log, 5.0, LIMIT), 5.3)
        quickest = 0.1 - 4 * 0.1 / (2 * LIMIT)
        assert pytest.approx(5.3 + TURNOVER - quickest / 2) == log.next_at(5.3)

    def test_a_slot_waits_for_its_answer_where_no_headers_tell(self) -> None:
        """However long that takes: nobody else can know that the server has counted the request."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        assert math.inf == log.next_at(30.0)
        answer(log, slots[:1], 30.0)
        assert pytest.approx(30.0 + TURNOVER) == log.next_at(30.0)

    def test_a_slow_connect_does_not_double_the_burst(self) -> None:
        """Granted at once but sent 0.8 s later, the slots count from the departure."""
        log = new_log()
        slots = granted(log, 0.0)
        for slot in slots:
            log.sent(slot, 0.8)
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
        """A request that was cut off occupies its slot from its departure on, or else from that moment."""
        log = new_log(2)
        sent, silent = granted(log, 0.0)
        log.sent(sent, 0.1)
        log.unknown(sent, 3.0)
        log.unknown(silent, 3.0)
        assert pytest.approx(0.1 + GIVEN_UP) == log.next_at(3.0)
        log.take(0.1 + GIVEN_UP + 1e-9)
        assert pytest.approx(3.0 + GIVEN_UP) == log.next_at(0.2 + GIVEN_UP)

    def test_hanging_requests_are_capped_at_twice_the_limit(self) -> None:
        """However long they hang, one account does not fill the connections that others need."""
        log = new_log()
        hanging = [*hang(log, 0.0), *hang(log, 10.0)]
        hanging += granted(log, 20.0)
        assert 2 * LIMIT == len(hanging)
        assert (math.inf, 0) == (log.next_at(20.0), log.remaining(20.0))
        answer(log, hanging[:1], 20.0)
        assert 1 == log.remaining(20.0) == len(granted(log, 20.0))

    def test_after_a_fork_all_that_is_in_flight_may_have_been_counted(self) -> None:
        """The child hears of no answers: it gives them up like any request that was cut off."""
        log = new_log()
        log.sent(granted(log, 0.0)[0], 0.0)
        log.abandon(1.0)
        assert pytest.approx(GIVEN_UP) == log.next_at(1.0)
        assert 1 == log.remaining(GIVEN_UP + 0.1)
        assert LIMIT == log.remaining(1.0 + GIVEN_UP + 1e-9)

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


class TestLateAnswers:
    """Which requests were counted whose own answers have not come yet, as the answers to others tell."""

    def test_all_were_counted(self) -> None:
        """If an answer speaks of as many as there are, nobody is waited for."""
        log = new_log()
        assert LIMIT - 1 == len(hang(log, 0.0))
        assert pytest.approx(TURNOVER) == log.next_at(0.0)
        assert LIMIT == len(granted(log, TURNOVER + 1e-9))

    def test_some_were_counted(self) -> None:
        """Which ones does not matter: two slots are occupied until their answers have come."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        answer(log, slots[:10], 0.1, quota=told(LIMIT - 2))
        assert LIMIT - 2 == len(granted(log, 0.1 + TURNOVER + 1e-9))
        assert math.inf == log.next_at(3.0)

    def test_of_several_answers_the_one_that_says_most_counts(self) -> None:
        """They come in any order."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        for used, slot in zip((5, 19, 12), slots, strict=False):
            answer(log, [slot], 0.1, quota=told(used))
        assert LIMIT - 1 == len(granted(log, 0.1 + TURNOVER + 1e-9))

    def test_a_second_burst_says_nothing_of_the_first(self) -> None:
        """One of the first was not counted when the last answer came: it may be counted at any moment."""
        log = new_log()
        first = depart(log, 0.0, LIMIT)
        answer(log, first[1:], 0.0, quota=told(LIMIT - 1, 2.0))
        assert LIMIT - 1 == log.remaining(2.5)
        answer(log, depart(log, 2.5, LIMIT - 1), 2.5, quota=told(LIMIT - 1, 2.0))
        assert LIMIT - 1 == len(granted(log, 2.5 + TURNOVER + 1e-9))

    def test_what_is_given_back_was_not_counted(self) -> None:
        """With the only one gone that was not counted, nobody is waited for."""
        log = new_log()
        slots = depart(log, 0.0, LIMIT)
        answer(log, slots[5:], 0.1, quota=told(LIMIT - 1))
        log.unsent(slots[0])
        assert LIMIT == log.remaining(0.1 + TURNOVER + 1e-9)

    @pytest.mark.parametrize("sent_at", [None, 0.15], ids=["one has not left", "one left too late"])
    def test_the_answer_may_speak_of_a_foreign_request(self, sent_at: float | None) -> None:
        """What had not left when the answer came cannot have been counted."""
        log = new_log()
        late, other = log.take(0.0), log.take(0.0)
        log.sent(other, 0.0)
        if sent_at is not None:
            log.sent(late, sent_at)
        answer(log, [other], 0.1, quota=told(2))
        assert LIMIT - 1 == log.remaining(5.0)

    def test_a_late_answer_tells_when_its_request_was_counted(self) -> None:
        """To a second and the skew of clocks, by the end of its window on the server's clock."""
        log = new_log()
        late, *others = depart(log, 0.0, LIMIT)
        ahead = 1_600_000_000.0
        for slot in others:
            answer(log, [slot], 0.0, quota=attrs.evolve(told(LIMIT - 1, 1.999), reset_at=ahead + 2.0))
        log.answered(late, 2.5, 200, attrs.evolve(told(LIMIT, 1.999), reset_at=ahead + 2.0))
        counted_by = 0.0 + 1.0 + SKEW + ROUNDING
        assert LIMIT - 1 == log.remaining(counted_by + TURNOVER - 1e-6)
        assert LIMIT == log.remaining(counted_by + TURNOVER + 1e-6)


class TestLostRequests:
    """Calls that were cut off after sending: what we sent and lost is ours."""

    def test_what_turns_up_late_is_not_foreign(self) -> None:
        """Counted when the server goes on after ten seconds, they explain what it has counted."""
        log = new_log()
        for slot in depart(log, 0.0, 5):
            log.unknown(slot, 1.0)
        (slot,) = depart(log, 10.0)
        assert None is log.answered(slot, 10.0, 200, told(6))
        assert (0, LIMIT - 6) == (log.foreign, log.remaining(10.0))

    def test_what_is_more_than_was_lost_is(self) -> None:
        """Two of seven cannot have been ours."""
        log = new_log()
        for slot in depart(log, 0.0, 4):
            log.unknown(slot, 1.0)
        (slot,) = depart(log, 10.0)
        assert "foreign use" == log.answered(slot, 10.0, 200, told(7))
        assert 2 == log.foreign

    def test_each_turns_up_once(self) -> None:
        """They explain one window, and no second one."""
        log = new_log()
        for slot in depart(log, 0.0, 5):
            log.unknown(slot, 1.0)
        answer(log, depart(log, 10.0), 10.0, quota=told(6))
        (slot,) = depart(log, 20.0)
        assert "foreign use" == log.answered(slot, 20.0, 200, told(6))

    def test_they_are_looked_for_a_minute(self) -> None:
        """After that, somebody else is more likely."""
        log = new_log()
        for slot in depart(log, 0.0, 5):
            log.unknown(slot, 1.0)
        (slot,) = depart(log, LOST_KEPT_FOR + 1.0)
        assert "foreign use" == log.answered(slot, LOST_KEPT_FOR + 1.0, 200, told(6))

    def test_an_answer_that_speaks_of_all_frees_their_slots(self) -> None:
        """They are known to have been counted, so they need not be given up."""
        log = new_log()
        lost, other = depart(log, 0.0, 2)
        log.unknown(lost, 0.05)
        answer(log, [other], 0.1, quota=told(2))
        assert LIMIT == log.remaining(0.1 + TURNOVER + 1e-9)


class TestPauses:
    """What a 429 does to the whole key."""

    def test_nobody_sends_for_the_time_that_the_server_names(self) -> None:
        """The key is held for Retry-After, however many slots are free."""
        log = new_log()
        refuse(log, 10.0, 1.283)
        assert pytest.approx(11.283 + MARGIN) == log.next_at(10.0)
        assert pytest.approx(1.283 + MARGIN) == log.cooldown.left(10.0)
        assert (0, 0.0) == (log.remaining(10.0), log.cooldown.refused_for(10.0))
        assert 0.0 == log.cooldown.left(11.31)
        assert LIMIT - 1 == log.remaining(11.31)

    def test_other_answers_hold_nothing(self) -> None:
        """Every answer carries Retry-After: on a success it is the rest of the window."""
        log = new_log()
        for status_code in (200, 404, 500, 503):
            answer(log, depart(log, 0.0), 0.1, status_code, Quota(retry_after=1.9))
        assert 0.0 == log.cooldown.left(0.1)
        assert LIMIT - 4 == log.remaining(0.1)

    def test_a_second_refusal_never_shortens_the_pause(self) -> None:
        """Of several orders to wait the one that ends last stands."""
        log = new_log()
        slots = depart(log, 0.0, 3)
        for slot, retry_after in zip(slots, (1.283, 0.2, 1.5), strict=True):
            log.answered(slot, 0.1, 429, Quota(retry_after=retry_after))
            assert pytest.approx(max(1.283, retry_after) + MARGIN) == log.cooldown.left(0.1)

    def test_a_refusal_that_does_not_say_how_long_holds_a_whole_window(self) -> None:
        """Without a usable header a window is what the wait can be at most."""
        log = new_log()
        refuse(log, 0.0, None)
        assert pytest.approx(TURNOVER) == log.cooldown.left(0.0)
        assert PERIOD == pause_after_429(SILENT, PERIOD)
        assert 0.4 == pause_after_429(Quota(retry_after=0.4), PERIOD)

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
        assert pytest.approx(paused_for) == log.cooldown.left(0.0)
        assert refused_for == log.cooldown.refused_for(0.0)
        assert 0.0 == log.cooldown.refused_for(PAUSE_CAP + MARGIN + 1e-9)

    def test_a_long_order_counts_down(self) -> None:
        """While the key is held, callers are told what is left of the order."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        assert 86_370.0 == log.cooldown.refused_for(30.0)

    def test_a_shorter_refusal_does_not_lift_a_long_order(self) -> None:
        """Refusals of requests that were in flight together: the longest stands."""
        log = new_log()
        slots = depart(log, 0.0, 2)
        answer(log, slots[:1], 0.1, 429, Quota(retry_after=600.0))
        answer(log, slots[1:], 0.2, 429, Quota(retry_after=0.5))
        assert pytest.approx(599.9) == log.cooldown.refused_for(0.2)

    @pytest.mark.parametrize(("retry_after", "refused_for"), [(0.5, 0.0), (3600.0, 3600.0)])
    def test_after_the_minute_a_new_order_replaces_the_old_one(
        self, retry_after: float, refused_for: float
    ) -> None:
        """What the server says when it is tried again is what counts from then on."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        refuse(log, 100.0, retry_after)
        assert refused_for == log.cooldown.refused_for(100.0)
        assert log.cooldown.left(100.0) > 0


class TestLooking:
    """After a 429 one request goes first, and the others follow if it is let through."""

    def test_one_request_looks(self) -> None:
        """The next one is granted when its answer has come, or a period later."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        after = 1.0 + MARGIN
        (trial,) = granted(log, after)
        assert pytest.approx(after + PERIOD) == log.next_at(after)
        answer(log, [trial], after + 0.1)
        assert LIMIT - 2 == len(granted(log, after + 0.1))

    def test_while_it_is_refused_one_looks_each_time(self) -> None:
        """A server that refuses for long meets one request at a time."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        now = 0.0
        for _ in range(10):
            now = log.next_at(now)
            (trial,) = granted(log, now)
            answer(log, [trial], now, 429, Quota(retry_after=1.0))
        assert pytest.approx(10 * (1.0 + MARGIN)) == now

    @pytest.mark.parametrize("end", ["unsent", "unknown"])
    def test_if_it_does_not_come_back_the_next_one_looks(self, end: str) -> None:
        """A request that failed or was cut off has not seen anything."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        for _ in range(2):
            (trial,) = granted(log, 1.1)
            if end == "unsent":
                log.unsent(trial)
            else:
                log.unknown(trial, 1.1)
        assert 1 == len(granted(log, 1.1))

    def test_what_left_before_the_pause_does_not_look(self) -> None:
        """Its answer is of before."""
        log = new_log()
        first, second = depart(log, 0.0, 2)
        log.answered(first, 0.1, 429, Quota(retry_after=1.0))
        log.answered(second, 0.2, 200, SILENT)
        assert 1 == len(granted(log, 1.2))


class TestHeaders:
    """What the quota headers of an answer change."""

    def test_room_that_others_use_is_left_to_them(self) -> None:
        """The first answer says 6 remain for 0.7 s: two are left to them, four go one after the other."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        assert "foreign use" == log.answered(slot, 0.1, 200, Quota(limit=20, remaining=6, retry_after=0.7))
        assert (6, 13) == (log.remaining(0.1), log.foreign)
        moments: list[float] = []
        now = 0.1
        while now < 0.8:
            moments.append(now)
            answer(log, depart(log, now), now)
            now = log.next_at(now)
        assert pytest.approx([0.1, 0.28, 0.46, 0.64]) == moments
        assert pytest.approx(0.82) == now

    def test_no_more_leave_than_remain_less_the_slack(self) -> None:
        """However slowly they go: while the window lasts, two requests are left to others."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=Quota(limit=20, remaining=6, retry_after=1.9))
        count, now = 0, 0.0
        while (now := log.next_at(now)) < 1.9:
            log.sent(log.take(now), now)
            count += 1
        assert 6 - SLACK == count
        assert pytest.approx(1.9 + MARGIN, abs=0.002) == now

    @pytest.mark.parametrize("proven", [True, False])
    def test_a_refusal_may_tell_of_others(self, proven: bool) -> None:  # noqa: FBT001 - a column
        """In a window that ours do not fill, it does, whichever way the server counts."""
        log = new_log()
        log._server.is_fixed = proven
        quota = Quota(limit=20, remaining=1, retry_after=1.9)
        answer(log, depart(log, 0.0, LIMIT - 1), 0.1, quota=quota)
        (held_back,) = depart(log, 1.2)
        refusal = Quota(limit=20, remaining=0, retry_after=0.8)
        news = log.answered(held_back, 1.21, 429, refusal)
        assert ("foreign use", 1) == (news, log.foreign)

    def test_a_refusal_before_anything_else_tells_of_nobody(self) -> None:
        """What fills the window may be of a process that has just ended: the key is not taken for shared."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        assert None is log.answered(slot, 0.1, 429, Quota(limit=20, remaining=0, retry_after=0.8))
        assert 0 == log.foreign

    def test_foreign_requests_make_a_key_shared(self) -> None:
        """At least half of the limit stays ours, spread over the period; the news comes once."""
        log = new_log()
        slots = depart(log, 0.0, 2)
        quota = Quota(limit=20, remaining=15, retry_after=2.0)
        assert ["foreign use", None] == [log.answered(slot, 0.1, 200, quota) for slot in slots]
        log.take(3.0)
        assert pytest.approx(3.0 + 0.9 * PERIOD / 10) == log.next_at(3.0)
        assert 9 == log.remaining(3.0)

    def test_the_budget_is_whole_when_theirs_are_forgotten_too(self) -> None:
        """As far as is known: their window's end."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.1, quota=Quota(limit=20, remaining=6, retry_after=5.0))
        answer(log, depart(log, 0.2), 0.3, quota=Quota(limit=20, remaining=5, retry_after=1.9))
        assert 0 < log.foreign
        assert log.resets_in(0.3) >= 1.9

    def test_the_same_requests_of_others_are_counted_once(self) -> None:
        """Each answer of a window tells of the same foreign requests; only new ones take more room."""
        log = new_log()
        slots = depart(log, 0.0, 3)
        for remaining, slot in zip((9, 8, 7), slots, strict=True):
            answer(log, [slot], 0.1, quota=Quota(limit=20, remaining=remaining, retry_after=1.9))
        assert 7 == log.remaining(0.1)

    @given(st.integers(1, 40), st.integers(0, 40), st.floats(0.01, 2), st.integers(1, 40))
    def test_never_more_than_the_server_says_remain(
        self, limit: int, remaining: int, retry_after: float, configured: int
    ) -> None:
        """After a first answer no more leave than remain, and of a shared key at least half are ours."""
        log = new_log(configured)
        quota = Quota(limit=limit, remaining=remaining, retry_after=retry_after)
        answer(log, depart(log, 0.0), 0.0, quota=quota)
        shared = remaining < limit - 1
        ours = min(configured, max(limit // 2 - 1, math.ceil(limit / 2)) if shared else limit)
        assert max(0, min(remaining, ours - 1)) == log.remaining(0.0)

    def test_a_retry_after_longer_than_a_window_tells_nothing_of_others(self) -> None:
        """It is not the rest of a window, whatever else it is."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=Quota(limit=20, remaining=0, retry_after=900.0))
        assert LIMIT - 1 == log.remaining(0.0)

    def test_a_window_that_is_over_tells_nothing_of_others(self) -> None:
        """An answer that came when another had already told that its window is over by then."""
        log = new_log()
        early, late = depart(log, 0.0, 2)
        answer(log, [early], 0.01, quota=Quota(limit=20, remaining=19, retry_after=0.2))
        answer(log, [late], 0.5, quota=Quota(limit=20, remaining=0, retry_after=0.2))
        assert LIMIT - 2 == log.remaining(0.5)

    @pytest.mark.parametrize("quota", [SILENT, Quota(remaining=0), Quota(limit=20, retry_after=1.5)])
    def test_headers_that_are_not_all_there_tell_nothing_of_others(self, quota: Quota) -> None:
        """Without both the rest and its end, the log stands alone."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=quota)
        assert LIMIT - 1 == log.remaining(0.0)

    def test_a_number_out_of_all_proportion_is_cut(self) -> None:
        """A server that speaks of fifty million requests costs no more than one that speaks of twenty."""
        log = new_log()
        answer(log, depart(log, 0.0), 0.0, quota=Quota(limit=50_000_000, remaining=0, retry_after=1.9))
        assert MAX_LIMIT_FACTOR * LIMIT - 1 == log.foreign
        assert (LIMIT, 0) == (log.limit, log.remaining(0.0))

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
        assert pytest.approx(PERIOD - 0.7) == log.estimate(0.7, 0)

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
        """Idle is: nothing in flight, nothing counted, nothing lost that may turn up, no pause."""
        log = new_log()
        assert log.idle(0.0)
        (slot,) = granted(log, 0.0)[:1]
        log.abandon(0.0)
        assert slot.ended
        assert not log.idle(LOST_KEPT_FOR - 0.01)
        assert log.idle(LOST_KEPT_FOR + 0.01)

    def test_a_request_in_flight_and_a_pause_are_remembered(self) -> None:
        """Neither a request that hangs for an hour nor a pause of a minute, nor that one is to look then."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        assert not log.idle(3600.0)
        log.answered(slot, 3600.0, 429, Quota(retry_after=60.0))
        assert not log.idle(3659.0)
        assert log.idle(3660.1 + PERIOD)

    def test_when_the_whole_limit_is_free_again(self) -> None:
        """The budget is whole when the last slot has ended and the pause is over."""
        log = new_log()
        slots = depart(log, 0.0, 2)
        assert pytest.approx(TURNOVER) == log.resets_in(0.0)
        answer(log, slots[:1], 1.0)
        log.unsent(slots[1])
        assert pytest.approx(TURNOVER - 1.0) == log.resets_in(2.0)
        (slot,) = depart(log, 2.0)
        assert pytest.approx(TURNOVER) == log.resets_in(2.0)
        answer(log, [slot], 2.0, 429, Quota(retry_after=30.0))
        assert pytest.approx(30.0 + MARGIN) == log.resets_in(2.0)
        assert 0.0 == log.resets_in(100.0)

    @pytest.mark.parametrize(
        ("ahead", "in_log", "in_windows"),
        [
            (0, 0.0, 0.0),
            (14, 0.0, 0.0),
            (15, 1.0, 1.0),
            (19, 1.0, 1.0),
            (20, 2.0, 1.0),
            (34, 2.0, 1.0),
            (35, 3.0, 3.0),
            (40, 4.0, 3.0),
            (54, 4.0, 3.0),
            (55, 5.0, 5.0),
        ],
    )
    def test_estimate_of_a_queue(self, ahead: int, in_log: float, in_windows: float) -> None:
        """With 5 of 20 used a second ago, 15 go now; in windows, all 20 again in a second."""
        for is_sliding, wait in ((True, in_log), (False, in_windows)):
            server = ServerModel(PERIOD)
            server.is_sliding = is_sliding
            log = SlidingWindowLog(LIMIT, PERIOD, server)
            answer(log, depart(log, 9.0, 5), 9.0)
            assert pytest.approx(wait) == log.estimate(10.0, ahead)

    def test_estimate_where_the_end_of_a_window_is_known(self) -> None:
        """A window that somebody else began ends sooner than a period after our first request."""
        log = new_log()
        (slot,) = depart(log, 0.0)
        answer(log, [slot], 0.1, quota=Quota(limit=20, remaining=6, retry_after=0.7))
        assert pytest.approx(0.6 - ROUNDING) == log.estimate(0.1, 18)

    @pytest.mark.parametrize(("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.0), (59, 4.0), (10_000, 1000.0)])
    def test_estimate_for_a_key_that_is_not_known(self, ahead: int, wait: float) -> None:
        """Twenty go at once, and twenty more each period."""
        assert pytest.approx(wait) == new_log().estimate(0.0, ahead)

    @pytest.mark.parametrize(("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.0), (45, 4.0)])
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
        assert pytest.approx(PERIOD) == log.estimate(2.4, 1)

    def test_estimate_with_a_departure_that_nobody_told_of(self) -> None:
        """It may have left when it was granted, and be forgotten a period after that."""
        log = new_log(1)
        log.take(0.0)
        assert pytest.approx(0.5) == log.estimate(1.5, 0)

    def test_estimate_after_broken_requests(self) -> None:
        """A slot that is free now may come round before one whose request may be counted late."""
        log = new_log(2)
        log.unknown(depart(log, 0.0)[0], 0.0)
        assert PERIOD >= log.estimate(0.0, 1)
