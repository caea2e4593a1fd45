"""The arithmetic of one key's budget, on a clock that is a plain number.

Tables and single steps; ``test_invariants.py`` covers arbitrary sequences of events.
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
NO_HEADERS = Quota()
TURNOVER = PERIOD + MARGIN  # minimum time from one use of a slot to the next
GIVEN_UP = LOST_AFTER + TURNOVER  # after sending: when the slot of a lost request frees up


def new_log(limit: int = LIMIT) -> SlidingWindowLog:
    """Return a log without history."""
    return SlidingWindowLog(limit, PERIOD)


def granted(log: SlidingWindowLog, now: float) -> list[Slot]:
    """Take every slot granted now."""
    slots = []
    while log.next_at(now) <= now:
        slots.append(log.take(now))
    return slots


def send(log: SlidingWindowLog, now: float, count: int = 1) -> list[Slot]:
    """Take ``count`` slots and send their requests immediately."""
    slots = [log.take(now) for _ in range(count)]
    for slot in slots:
        log.sent(slot, now)
    return slots


def respond(
    log: SlidingWindowLog, slots: list[Slot], now: float, status_code: int = 200, quota: Quota = NO_HEADERS
) -> None:
    """Deliver a response to each of these requests."""
    for slot in slots:
        log.answered(slot, now, status_code, quota)


def counted(used: int, rest: float = 1.9) -> Quota:
    """Return the headers of a response when ``used`` requests are counted."""
    return Quota(limit=LIMIT, remaining=LIMIT - used, retry_after=rest)


def hang(log: SlidingWindowLog, now: float) -> list[Slot]:
    """Send a whole burst; one response arrives and reports that all were counted. Return the other slots."""
    slots = send(log, now, LIMIT)
    respond(log, [slots.pop()], now, quota=counted(LIMIT, 2.0))
    return slots


def refuse(log: SlidingWindowLog, now: float, retry_after: float | None) -> None:
    """Send one request at ``now``, and answer it with a 429 immediately."""
    respond(log, send(log, now), now, 429, Quota(retry_after=retry_after))


class TestGrants:
    """How many requests are granted, and when the next one is."""

    def test_new_key_grants_the_whole_limit_at_once(self) -> None:
        """The server's window starts with the first request, so a burst of the whole limit is safe."""
        log = new_log()
        assert (LIMIT, 0.0, 0.0) == (log.remaining(100.0), log.resets_in(100.0), log.cooldown.left(100.0))
        assert LIMIT == len(granted(log, 100.0))
        assert 0 == log.remaining(100.0)

    def test_unsent_request_occupies_its_slot(self) -> None:
        """If all slots are granted and none is sent, the next grant waits for a report."""
        log = new_log()
        granted(log, 0.0)
        assert math.inf == log.next_at(1000.0)

    def test_slot_frees_up_one_period_after_its_response(self) -> None:
        """Without history, the latest moment of counting is when the response arrived."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        respond(log, slots[1:], 0.1)
        assert pytest.approx(0.1 + TURNOVER) == log.next_at(0.1)

    def test_round_trips_of_a_single_burst_are_not_relied_on(self) -> None:
        """One whole burst may be slow and the next request fast, so no credit is given."""
        log = new_log()
        respond(log, send(log, 0.0, LIMIT), 0.1)
        assert pytest.approx(0.1 + TURNOVER) == log.next_at(0.1)

    def test_half_of_the_minimum_round_trip_is_credited(self) -> None:
        """The credit is a return plus a forward latency, less a margin for faster requests."""
        log = new_log()
        respond(log, send(log, 0.0, LIMIT), 0.1)
        respond(log, send(log, 5.0, LIMIT), 5.3)
        quickest = 0.1 - 4 * 0.1 / (2 * LIMIT)
        assert pytest.approx(5.3 + TURNOVER - quickest / 2) == log.next_at(5.3)

    def test_slot_waits_for_its_response_without_headers(self) -> None:
        """However long it takes: no other response can show that the server has counted the request."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        assert math.inf == log.next_at(30.0)
        respond(log, slots[:1], 30.0)
        assert pytest.approx(30.0 + TURNOVER) == log.next_at(30.0)

    def test_slow_connect_does_not_double_the_burst(self) -> None:
        """Slots granted at once but sent 0.8 s later count from sending."""
        log = new_log()
        slots = granted(log, 0.0)
        for slot in slots:
            log.sent(slot, 0.8)
        respond(log, slots, 0.801)
        assert pytest.approx(0.801 + TURNOVER) == log.next_at(0.801)

    def test_transport_that_does_not_report_sending(self) -> None:
        """Without a report of sending, only the response shows that the request was counted."""
        log = new_log()
        slots = granted(log, 0.0)
        assert math.inf == log.next_at(5.0)
        respond(log, slots, 5.0)
        assert pytest.approx(5.0 + TURNOVER) == log.next_at(5.0)

    def test_unsent_request_releases_its_slot_at_once(self) -> None:
        """A failed connect uses no budget, even if it was reported as sent."""
        log = new_log()
        slots = granted(log, 0.0)
        log.sent(slots[0], 0.0)
        for slot in slots[:3]:
            log.unsent(slot)
        assert 3 == log.remaining(0.0) == len(granted(log, 0.0))

    def test_lost_request_does_not_release_its_slot(self) -> None:
        """A lost request occupies its slot from sending on, or from the loss if sending was not reported."""
        log = new_log(2)
        sent, silent = granted(log, 0.0)
        log.sent(sent, 0.1)
        log.unknown(sent, 3.0)
        log.unknown(silent, 3.0)
        assert pytest.approx(0.1 + GIVEN_UP) == log.next_at(3.0)
        log.take(0.1 + GIVEN_UP + 1e-9)
        assert pytest.approx(3.0 + GIVEN_UP) == log.next_at(0.2 + GIVEN_UP)

    def test_requests_in_flight_are_capped_at_twice_the_limit(self) -> None:
        """Hanging requests of one account do not use up the connections that other accounts need."""
        log = new_log()
        hanging = [*hang(log, 0.0), *hang(log, 10.0)]
        hanging += granted(log, 20.0)
        assert 2 * LIMIT == len(hanging)
        assert (math.inf, 0) == (log.next_at(20.0), log.remaining(20.0))
        respond(log, hanging[:1], 20.0)
        assert 1 == log.remaining(20.0) == len(granted(log, 20.0))

    def test_abandon_treats_requests_in_flight_as_lost(self) -> None:
        """The child of a fork receives no responses: it gives the requests up like any lost request."""
        log = new_log()
        log.sent(granted(log, 0.0)[0], 0.0)
        log.abandon(1.0)
        assert pytest.approx(GIVEN_UP) == log.next_at(1.0)
        assert 1 == log.remaining(GIVEN_UP + 0.1)
        assert LIMIT == log.remaining(1.0 + GIVEN_UP + 1e-9)

    @pytest.mark.parametrize("end", ["answered", "unsent", "unknown"])
    def test_only_the_first_end_of_a_permit_counts(self, end: str) -> None:
        """A permit ends once: later reports change nothing."""
        log = new_log(1)
        (slot,) = send(log, 0.0)
        if end == "answered":
            respond(log, [slot], 0.1)
        elif end == "unsent":
            log.unsent(slot)
        else:
            log.unknown(slot, 0.1)
        before = log.next_at(0.2), log.resets_in(0.2)
        log.sent(slot, 0.2)
        log.unsent(slot)
        log.unknown(slot, 0.2)
        respond(log, [slot], 0.2, 429, Quota(limit=1, remaining=0, retry_after=30.0))
        assert before == (log.next_at(0.2), log.resets_in(0.2))


class TestLateAnswers:
    """Which requests without a response were counted, according to the responses to others."""

    def test_all_were_counted(self) -> None:
        """If a response reports as many requests as were sent, no slot waits for its own response."""
        log = new_log()
        assert LIMIT - 1 == len(hang(log, 0.0))
        assert pytest.approx(TURNOVER) == log.next_at(0.0)
        assert LIMIT == len(granted(log, TURNOVER + 1e-9))

    def test_some_were_counted(self) -> None:
        """Which ones were counted does not matter: two slots stay occupied until their responses arrive."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        respond(log, slots[:10], 0.1, quota=counted(LIMIT - 2))
        assert LIMIT - 2 == len(granted(log, 0.1 + TURNOVER + 1e-9))
        assert math.inf == log.next_at(3.0)

    def test_tightest_of_several_responses_counts(self) -> None:
        """The responses arrive in any order."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        for used, slot in zip((5, 19, 12), slots, strict=False):
            respond(log, [slot], 0.1, quota=counted(used))
        assert LIMIT - 1 == len(granted(log, 0.1 + TURNOVER + 1e-9))

    def test_second_burst_reveals_nothing_about_the_first(self) -> None:
        """One request of the first burst was not counted by the last response: it may be at any moment."""
        log = new_log()
        first = send(log, 0.0, LIMIT)
        respond(log, first[1:], 0.0, quota=counted(LIMIT - 1, 2.0))
        assert LIMIT - 1 == log.remaining(2.5)
        respond(log, send(log, 2.5, LIMIT - 1), 2.5, quota=counted(LIMIT - 1, 2.0))
        assert LIMIT - 1 == len(granted(log, 2.5 + TURNOVER + 1e-9))

    def test_released_request_was_not_counted(self) -> None:
        """After the only uncounted request is released, no slot waits for its response."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        respond(log, slots[5:], 0.1, quota=counted(LIMIT - 1))
        log.unsent(slots[0])
        assert LIMIT == log.remaining(0.1 + TURNOVER + 1e-9)

    def test_released_later_request_proves_nothing(self) -> None:
        """It was not among the requests that the response may have counted, so two slots stay occupied."""
        log = new_log()
        slots = send(log, 0.0, LIMIT)
        respond(log, slots[:10], 0.1, quota=counted(LIMIT - 2))
        (later,) = send(log, 0.1 + TURNOVER + 1e-9)
        log.unsent(later)
        assert LIMIT - 2 == log.remaining(0.1 + TURNOVER + 1e-9)

    @pytest.mark.parametrize("sent_at", [None, 0.15], ids=["not sent", "sent too late"])
    def test_response_may_include_a_foreign_request(self, sent_at: float | None) -> None:
        """A request not sent when the response arrived cannot have been counted."""
        log = new_log()
        late, other = log.take(0.0), log.take(0.0)
        log.sent(other, 0.0)
        if sent_at is not None:
            log.sent(late, sent_at)
        respond(log, [other], 0.1, quota=counted(2))
        assert LIMIT - 1 == log.remaining(5.0)

    def test_late_response_reveals_when_its_request_was_counted(self) -> None:
        """The end of its window on the server's clock gives the time to within a second plus clock skew."""
        log = new_log()
        late, *others = send(log, 0.0, LIMIT)
        ahead = 1_600_000_000.0
        for slot in others:
            respond(log, [slot], 0.0, quota=attrs.evolve(counted(LIMIT - 1, 1.999), reset_at=ahead + 2.0))
        log.answered(late, 2.5, 200, attrs.evolve(counted(LIMIT, 1.999), reset_at=ahead + 2.0))
        counted_by = 0.0 + 1.0 + SKEW + ROUNDING
        assert LIMIT - 1 == log.remaining(counted_by + TURNOVER - 1e-6)
        assert LIMIT == log.remaining(counted_by + TURNOVER + 1e-6)


class TestLostRequests:
    """Calls that were cut off after sending: they are not foreign requests."""

    def test_lost_requests_counted_late_are_not_foreign(self) -> None:
        """If the server counts them ten seconds later, they explain its count."""
        log = new_log()
        for slot in send(log, 0.0, 5):
            log.unknown(slot, 1.0)
        (slot,) = send(log, 10.0)
        assert None is log.answered(slot, 10.0, 200, counted(6))
        assert (0, LIMIT - 6) == (log.foreign, log.remaining(10.0))

    def test_excess_over_the_lost_requests_is_foreign(self) -> None:
        """Two of seven counted requests cannot be ours."""
        log = new_log()
        for slot in send(log, 0.0, 4):
            log.unknown(slot, 1.0)
        (slot,) = send(log, 10.0)
        assert "foreign use" == log.answered(slot, 10.0, 200, counted(7))
        assert 2 == log.foreign

    def test_lost_requests_are_attributed_once(self) -> None:
        """They explain the count of one window, but not that of a second one."""
        log = new_log()
        for slot in send(log, 0.0, 5):
            log.unknown(slot, 1.0)
        respond(log, send(log, 10.0), 10.0, quota=counted(6))
        (slot,) = send(log, 20.0)
        assert "foreign use" == log.answered(slot, 20.0, 200, counted(6))

    def test_attributed_requests_fill_the_window(self) -> None:
        """A further response of the same window finds no foreign request beside them."""
        log = new_log()
        for slot in send(log, 0.0, 5):
            log.unknown(slot, 1.0)
        slots = send(log, 10.0, 2)
        assert [None, "foreign use"] == [
            log.answered(slot, 10.0, 200, counted(used, 2.0))
            for slot, used in zip(slots, (7, 8), strict=True)
        ]
        assert 1 == log.foreign

    def test_lost_requests_are_attributed_within_a_minute(self) -> None:
        """After that, another client is the more likely explanation."""
        log = new_log()
        for slot in send(log, 0.0, 5):
            log.unknown(slot, 1.0)
        (slot,) = send(log, LOST_KEPT_FOR + 1.0)
        assert "foreign use" == log.answered(slot, LOST_KEPT_FOR + 1.0, 200, counted(6))

    def test_response_that_includes_lost_requests_frees_their_slots(self) -> None:
        """They are known to have been counted, so their slots need not wait until they are given up."""
        log = new_log()
        lost, other = send(log, 0.0, 2)
        log.unknown(lost, 0.05)
        respond(log, [other], 0.1, quota=counted(2))
        assert LIMIT == log.remaining(0.1 + TURNOVER + 1e-9)


class TestPauses:
    """The effect of a 429 on the whole key."""

    def test_429_pauses_the_key(self) -> None:
        """The key is paused for ``Retry-After``, however many slots are free."""
        log = new_log()
        refuse(log, 10.0, 1.283)
        assert pytest.approx(11.283 + MARGIN) == log.next_at(10.0)
        assert pytest.approx(1.283 + MARGIN) == log.cooldown.left(10.0)
        assert (0, 0.0) == (log.remaining(10.0), log.cooldown.refused_for(10.0))
        assert 0.0 == log.cooldown.left(11.31)
        assert LIMIT - 1 == log.remaining(11.31)

    def test_other_responses_do_not_pause(self) -> None:
        """Every response has a ``Retry-After``: on a success, it is the remaining time of the window."""
        log = new_log()
        for status_code in (200, 404, 500, 503):
            respond(log, send(log, 0.0), 0.1, status_code, Quota(retry_after=1.9))
        assert 0.0 == log.cooldown.left(0.1)
        assert LIMIT - 4 == log.remaining(0.1)

    def test_second_429_never_shortens_the_pause(self) -> None:
        """Of several pauses, the one that ends last prevails."""
        log = new_log()
        slots = send(log, 0.0, 3)
        for slot, retry_after in zip(slots, (1.283, 0.2, 1.5), strict=True):
            log.answered(slot, 0.1, 429, Quota(retry_after=retry_after))
            assert pytest.approx(max(1.283, retry_after) + MARGIN) == log.cooldown.left(0.1)

    def test_429_without_retry_after_pauses_for_a_whole_window(self) -> None:
        """Without a usable header, the longest possible wait is one window."""
        log = new_log()
        refuse(log, 0.0, None)
        assert pytest.approx(TURNOVER) == log.cooldown.left(0.0)
        assert PERIOD == pause_after_429(NO_HEADERS, PERIOD)
        assert 0.4 == pause_after_429(Quota(retry_after=0.4), PERIOD)

    @pytest.mark.parametrize(
        ("retry_after", "paused_for", "refused_for"),
        [(59.0, 59.0 + MARGIN, 0.0), (60.0, 60.0 + MARGIN, 0.0), (86_400.0, PAUSE_CAP + MARGIN, 86_400.0)],
    )
    def test_pause_is_capped(self, retry_after: float, paused_for: float, refused_for: float) -> None:
        """Above a minute, callers get an error; the key is tried again after a minute."""
        log = new_log()
        refuse(log, 0.0, retry_after)
        assert pytest.approx(paused_for) == log.cooldown.left(0.0)
        assert refused_for == log.cooldown.refused_for(0.0)
        assert 0.0 == log.cooldown.refused_for(PAUSE_CAP + MARGIN + 1e-9)

    def test_long_refusal_counts_down(self) -> None:
        """While the key is paused, callers are refused with the remaining time."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        assert 86_370.0 == log.cooldown.refused_for(30.0)

    def test_shorter_refusal_does_not_shorten_a_long_one(self) -> None:
        """Of the refusals of requests that were in flight together, the longest prevails."""
        log = new_log()
        slots = send(log, 0.0, 2)
        respond(log, slots[:1], 0.1, 429, Quota(retry_after=600.0))
        respond(log, slots[1:], 0.2, 429, Quota(retry_after=0.5))
        assert pytest.approx(599.9) == log.cooldown.refused_for(0.2)

    @pytest.mark.parametrize(("retry_after", "refused_for"), [(0.5, 0.0), (3600.0, 3600.0)])
    def test_new_refusal_replaces_the_old_one_after_the_cap(
        self, retry_after: float, refused_for: float
    ) -> None:
        """After the pause, the server's response to the next request replaces the old refusal."""
        log = new_log()
        refuse(log, 0.0, 86_400.0)
        refuse(log, 100.0, retry_after)
        assert refused_for == log.cooldown.refused_for(100.0)
        assert log.cooldown.left(100.0) > 0


class TestTrialRequest:
    """After a 429, one trial request goes first; the others follow once it is let through."""

    def test_one_trial_request_goes_first(self) -> None:
        """The next request is granted when the trial's response has arrived, or one period later."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        after = 1.0 + MARGIN
        (trial,) = granted(log, after)
        assert pytest.approx(after + PERIOD) == log.next_at(after)
        respond(log, [trial], after + 0.1)
        assert LIMIT - 2 == len(granted(log, after + 0.1))

    def test_each_refusal_is_followed_by_one_trial(self) -> None:
        """A server that keeps refusing receives one request at a time."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        now = 0.0
        for _ in range(10):
            now = log.next_at(now)
            (trial,) = granted(log, now)
            respond(log, [trial], now, 429, Quota(retry_after=1.0))
        assert pytest.approx(10 * (1.0 + MARGIN)) == now

    @pytest.mark.parametrize("end", ["unsent", "unknown"])
    def test_trial_without_a_result_is_replaced(self, end: str) -> None:
        """If the trial request fails to connect or is cut off, the next request becomes the trial."""
        log = new_log()
        refuse(log, 0.0, 1.0)
        for _ in range(2):
            (trial,) = granted(log, 1.1)
            if end == "unsent":
                log.unsent(trial)
            else:
                log.unknown(trial, 1.1)
        assert 1 == len(granted(log, 1.1))

    def test_response_from_before_the_pause_is_not_a_trial(self) -> None:
        """A success for a request sent before the pause does not release the others."""
        log = new_log()
        first, second = send(log, 0.0, 2)
        log.answered(first, 0.1, 429, Quota(retry_after=1.0))
        log.answered(second, 0.2, 200, NO_HEADERS)
        assert 1 == len(granted(log, 1.2))

    @pytest.mark.parametrize("end", ["answered", "unsent", "unknown"])
    def test_end_of_an_earlier_request_does_not_replace_the_trial(self, end: str) -> None:
        """While the trial is pending, no other request is granted, whatever earlier requests report."""
        log = new_log()
        first, second = send(log, 0.0, 2)
        log.answered(first, 0.1, 429, Quota(retry_after=1.0))
        assert 1 == len(granted(log, 1.2))
        if end == "answered":
            log.answered(second, 1.2, 200, NO_HEADERS)
        elif end == "unsent":
            log.unsent(second)
        else:
            log.unknown(second, 1.2)
        assert [] == granted(log, 1.2)


class TestHeaders:
    """The effects of a response's quota headers."""

    def test_foreign_requests_are_left_room(self) -> None:
        """With 6 remaining for 0.7 s, two are left for foreign use, and four go out one after another."""
        log = new_log()
        (slot,) = send(log, 0.0)
        assert "foreign use" == log.answered(slot, 0.1, 200, Quota(limit=20, remaining=6, retry_after=0.7))
        assert (6, 13) == (log.remaining(0.1), log.foreign)
        moments: list[float] = []
        now = 0.1
        while now < 0.8:
            moments.append(now)
            respond(log, send(log, now), now)
            now = log.next_at(now)
        assert pytest.approx([0.1, 0.28, 0.46, 0.64]) == moments
        assert pytest.approx(0.82) == now

    def test_remaining_minus_slack_is_the_maximum(self) -> None:
        """However slowly requests are sent, two are left for foreign use while the window lasts."""
        log = new_log()
        respond(log, send(log, 0.0), 0.0, quota=Quota(limit=20, remaining=6, retry_after=1.9))
        count, now = 0, 0.0
        while (now := log.next_at(now)) < 1.9:
            log.sent(log.take(now), now)
            count += 1
        assert 6 - SLACK == count
        assert pytest.approx(1.9 + MARGIN, abs=0.002) == now

    @pytest.mark.parametrize("proven", [True, False])
    def test_429_may_reveal_foreign_use(self, proven: bool) -> None:  # noqa: FBT001 - a column
        """A 429 in a window that our own requests do not fill reveals foreign use, for either algorithm."""
        log = new_log()
        log._server.is_fixed = proven
        quota = Quota(limit=20, remaining=1, retry_after=1.9)
        respond(log, send(log, 0.0, LIMIT - 1), 0.1, quota=quota)
        (held_back,) = send(log, 1.2)
        refusal = Quota(limit=20, remaining=0, retry_after=0.8)
        observation = log.answered(held_back, 1.21, 429, refusal)
        assert ("foreign use", 1) == (observation, log.foreign)

    @pytest.mark.parametrize(("proven", "foreign"), [(True, 4), (False, 0)])
    def test_earlier_windows_explain_nothing_in_fixed_windows(self, proven: bool, foreign: int) -> None:  # noqa: FBT001 - a column
        """A sliding log may still count the requests of half a second ago; a new window does not."""
        log = new_log()
        log._server.is_fixed = proven
        respond(log, send(log, 0.0, 10), 0.0, quota=counted(10, 0.5))
        respond(log, send(log, 0.6), 0.6, quota=counted(5, 2.0))
        assert foreign == log.foreign

    def test_initial_429_does_not_reveal_foreign_use(self) -> None:
        """The window may be full of a finished process's requests, so the key is not marked shared."""
        log = new_log()
        (slot,) = send(log, 0.0)
        assert None is log.answered(slot, 0.1, 429, Quota(limit=20, remaining=0, retry_after=0.8))
        assert 0 == log.foreign

    def test_foreign_requests_make_a_key_shared(self) -> None:
        """At least half of the limit stays ours, spread over the period; foreign use is reported once."""
        log = new_log()
        slots = send(log, 0.0, 2)
        quota = Quota(limit=20, remaining=15, retry_after=2.0)
        assert ["foreign use", None] == [log.answered(slot, 0.1, 200, quota) for slot in slots]
        log.take(3.0)
        assert pytest.approx(3.0 + 0.9 * PERIOD / 10) == log.next_at(3.0)
        assert 9 == log.remaining(3.0)

    def test_foreign_requests_are_counted_once(self) -> None:
        """All responses of a window report the same foreign requests; only new ones take more room."""
        log = new_log()
        slots = send(log, 0.0, 3)
        for remaining, slot in zip((9, 8, 7), slots, strict=True):
            respond(log, [slot], 0.1, quota=Quota(limit=20, remaining=remaining, retry_after=1.9))
        assert 7 == log.remaining(0.1)

    @given(st.integers(1, 40), st.integers(0, 40), st.floats(0.01, 2), st.integers(1, 40))
    def test_never_more_than_the_server_reports_remaining(
        self, limit: int, remaining: int, retry_after: float, configured: int
    ) -> None:
        """After a first response, at most ``remaining`` are sent; at least half of a shared key is ours."""
        log = new_log(configured)
        quota = Quota(limit=limit, remaining=remaining, retry_after=retry_after)
        respond(log, send(log, 0.0), 0.0, quota=quota)
        shared = remaining < limit - 1
        ours = min(configured, max(limit // 2 - 1, math.ceil(limit / 2)) if shared else limit)
        assert max(0, min(remaining, ours - 1)) == log.remaining(0.0)

    def test_retry_after_longer_than_a_window_is_ignored(self) -> None:
        """Such a value cannot be the remaining time of a window, so it reveals no foreign use."""
        log = new_log()
        respond(log, send(log, 0.0), 0.0, quota=Quota(limit=20, remaining=0, retry_after=900.0))
        assert LIMIT - 1 == log.remaining(0.0)

    def test_finished_window_reveals_no_foreign_use(self) -> None:
        """A response is ignored if an earlier one had already shown that its window is over by now."""
        log = new_log()
        early, late = send(log, 0.0, 2)
        respond(log, [early], 0.01, quota=Quota(limit=20, remaining=19, retry_after=0.2))
        respond(log, [late], 0.5, quota=Quota(limit=20, remaining=0, retry_after=0.2))
        assert LIMIT - 2 == log.remaining(0.5)

    @pytest.mark.parametrize("quota", [NO_HEADERS, Quota(remaining=0), Quota(limit=20, retry_after=1.5)])
    def test_incomplete_headers_reveal_no_foreign_use(self, quota: Quota) -> None:
        """Unless both remaining and ``Retry-After`` are present, the log works on its own."""
        log = new_log()
        respond(log, send(log, 0.0), 0.0, quota=quota)
        assert LIMIT - 1 == log.remaining(0.0)

    def test_excessive_limit_is_capped(self) -> None:
        """A reported limit of fifty million requests costs no more than one of twenty."""
        log = new_log()
        respond(log, send(log, 0.0), 0.0, quota=Quota(limit=50_000_000, remaining=0, retry_after=1.9))
        assert MAX_LIMIT_FACTOR * LIMIT - 1 == log.foreign
        assert (LIMIT, 0) == (log.limit, log.remaining(0.0))

    def test_header_lowers_the_limit(self) -> None:
        """A quota below the configured limit is respected, and requests already sent count against it."""
        log = new_log()
        slots = send(log, 0.0, 12)
        respond(log, slots, 0.1, quota=Quota(limit=5))
        assert (5, 0) == (log.limit, log.remaining(0.1))
        end = 0.1 + TURNOVER + 1e-9
        assert 5 == len(granted(log, end))

    def test_lowered_limit_waits_for_the_excess_to_end(self) -> None:
        """With eight slots occupied and five allowed, the next grant waits until four have freed up."""
        log = new_log()
        for number in range(8):
            respond(
                log,
                send(log, number / 10),
                number / 10,
                quota=Quota(limit=5) if number == 7 else NO_HEADERS,
            )
        assert pytest.approx(0.3 + TURNOVER) == log.next_at(0.7)
        assert pytest.approx(PERIOD - 0.7) == log.estimate(0.7, 0)

    @pytest.mark.parametrize("quota", [Quota(limit=100), Quota(limit=100, remaining=99, retry_after=1.0)])
    def test_header_never_raises_the_limit(self, quota: Quota) -> None:
        """No more than the configured limit is used, even if the server offers more."""
        log = new_log()
        respond(log, send(log, 0.0), 0.0, quota=quota)
        assert (LIMIT, LIMIT - 1) == (log.limit, log.remaining(0.0))

    def test_lowered_limit_recovers_to_the_configured_limit(self) -> None:
        """When the server allows the configured limit again, so does the log."""
        log = new_log()
        limits = []
        for allowed in (5, 50, 3, None, 0):
            respond(log, send(log, 0.0), 0.0, quota=Quota(limit=allowed))
            limits.append(log.limit)
        assert [5, 20, 3, 3, 3] == limits


class TestForecasts:
    """Estimates of waits, resets and remaining requests."""

    def test_idle_log(self) -> None:
        """An idle log has nothing in flight, nothing counted, nothing recently lost, and no pause."""
        log = new_log()
        assert log.idle(0.0)
        (slot,) = granted(log, 0.0)[:1]
        log.abandon(0.0)
        assert slot.ended
        assert not log.idle(LOST_KEPT_FOR - 0.01)
        assert log.idle(LOST_KEPT_FOR + 0.01)

    def test_request_in_flight_and_pause_are_not_idle(self) -> None:
        """A log is not idle during a hanging request, a pause, or the wait for a trial request after it."""
        log = new_log()
        (slot,) = send(log, 0.0)
        assert not log.idle(3600.0)
        log.answered(slot, 3600.0, 429, Quota(retry_after=60.0))
        assert not log.idle(3659.0)
        assert log.idle(3660.1 + PERIOD)

    def test_resets_in(self) -> None:
        """The whole budget is available when the last slot has freed up and the pause is over."""
        log = new_log()
        slots = send(log, 0.0, 2)
        assert pytest.approx(TURNOVER) == log.resets_in(0.0)
        respond(log, slots[:1], 1.0)
        log.unsent(slots[1])
        assert pytest.approx(TURNOVER - 1.0) == log.resets_in(2.0)
        (slot,) = send(log, 2.0)
        assert pytest.approx(TURNOVER) == log.resets_in(2.0)
        respond(log, [slot], 2.0, 429, Quota(retry_after=30.0))
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
        """With 5 of 20 slots used a second ago, 15 calls go now; with windows, all 20 again in a second."""
        for is_sliding, wait in ((True, in_log), (False, in_windows)):
            server = ServerModel(PERIOD)
            server.is_sliding = is_sliding
            log = SlidingWindowLog(LIMIT, PERIOD, server)
            respond(log, send(log, 9.0, 5), 9.0)
            assert pytest.approx(wait) == log.estimate(10.0, ahead)

    def test_estimate_with_a_known_end_of_window(self) -> None:
        """A window begun by a foreign request ends sooner than one period after our first request."""
        log = new_log()
        (slot,) = send(log, 0.0)
        respond(log, [slot], 0.1, quota=Quota(limit=20, remaining=6, retry_after=0.7))
        assert pytest.approx(0.6 - ROUNDING) == log.estimate(0.1, 18)

    @pytest.mark.parametrize(("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.0), (59, 4.0), (10_000, 1000.0)])
    def test_estimate_for_a_new_key(self, ahead: int, wait: float) -> None:
        """Twenty calls go at once, and twenty more per period."""
        assert pytest.approx(wait) == new_log().estimate(0.0, ahead)

    @pytest.mark.parametrize(("ahead", "wait"), [(0, 0.0), (19, 0.0), (20, 2.0), (45, 4.0)])
    def test_estimate_during_a_pause(self, ahead: int, wait: float) -> None:
        """After the pause, one limit's worth of calls goes per period."""
        log = new_log()
        refuse(log, 0.0, 30.0)
        assert pytest.approx(30.0 + MARGIN + wait) == log.estimate(0.0, ahead)

    def test_estimate_with_an_overdue_response(self) -> None:
        """The slot of a hanging request may free up at any moment from now on, and then be reused."""
        log = new_log(1)
        send(log, 0.0)
        assert 0.0 == log.estimate(2.4, 0)
        assert pytest.approx(PERIOD) == log.estimate(2.4, 1)

    def test_estimate_with_an_unreported_send(self) -> None:
        """The request may have been sent when it was granted, and be forgotten one period later."""
        log = new_log(1)
        log.take(0.0)
        assert pytest.approx(0.5) == log.estimate(1.5, 0)

    def test_estimate_after_lost_requests(self) -> None:
        """A slot that is free now may be reused before the slot of a request that may be counted late."""
        log = new_log(2)
        log.unknown(send(log, 0.0)[0], 0.0)
        assert PERIOD >= log.estimate(0.0, 1)
