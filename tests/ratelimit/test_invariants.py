"""The invariants of the limiter: one key's slots against a server that counts, under any order of events.

Hypothesis chooses what is requested, sent, answered, lost and canceled, and every latency, within the
limiter's assumptions: no request or response travels faster than the first ones did, and a request that is
cut off is counted within ``LOST_AFTER`` of being sent, or never.
"""

import copy
import heapq
import itertools
import math
import threading

import attrs
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lemcal_async._headers import Quota, parse_quota
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._slots import LOST_AFTER, PAUSE_CAP, Slot
from lemcal_async.sandbox._ratelimit import COUNTERS, Count, WindowKind, rate_limit_headers

PERIOD = 2.0
AHEAD = 1.6e9 + 0.3  # the server's wall clock
NO_HEADERS = Quota()

lateness = st.sampled_from([0.0, 0.0, 0.5, 2.0, 4.0]) | st.floats(0, 4)
ways = st.sampled_from([0.0, 0.001, 0.05, 0.3])


@attrs.define(eq=False)
class Request:
    """A request, including state known only to the network and the server."""

    slot: Slot
    reports_send: bool  # whether the transport reports sending
    departed_at: float | None = None
    counted_at: float = math.inf
    count: Count | None = None


@attrs.define
class Clock:
    """A clock that is copied together with its world."""

    now: float = 100.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class World:
    """A client's log, the network, and a server that counts."""

    def __init__(
        self, kind: WindowKind, limit: int, spare: int, there: float, back: float, *, sends_headers: bool
    ) -> None:
        self.there, self.back, self.sends_headers = there, back, sends_headers
        self.clock = Clock()
        self.server = ServerModel(PERIOD)
        self.log = SlidingWindowLog(limit, PERIOD, self.server)
        self.counter = COUNTERS[kind](limit + spare, PERIOD, self.clock)
        self.requests: list[Request] = []
        self.under_way: list[tuple[float, int, Request]] = []  # to the server, a heap
        self.sent = 0
        self.arrivals: list[float] = []
        self.paused_until = -math.inf

    @property
    def now(self) -> float:
        """Return the time."""
        return self.clock.now

    def fork(self) -> "World":
        """Return a copy of the world in its current state."""
        return copy.deepcopy(self, {id(self.counter._lock): threading.Lock()})

    def pass_until(self, moment: float) -> None:
        """Advance the clock; requests arrive and are counted meanwhile."""
        while self.under_way and self.under_way[0][0] <= moment:
            self.clock.now, _, request = heapq.heappop(self.under_way)
            request.count = self.counter.count("key")
            self.arrivals.append(self.now)
            assert request.count.allowed
        self.clock.now = max(self.now, moment)

    def grant(self, *, reports_send: bool) -> Request:
        """Grant one request."""
        assert self.paused_until <= self.now
        request = Request(self.log.take(self.now), reports_send)
        self.requests.append(request)
        return request

    def depart(self, request: Request, late: float) -> None:
        """Send a request that the server counts ``late`` seconds later than the earliest possible moment."""
        assert self.there + late < LOST_AFTER
        request.departed_at = self.now
        self.sent += 1
        request.counted_at = self.now + self.there + late
        heapq.heappush(self.under_way, (request.counted_at, self.sent, request))
        if request.reports_send:
            self.log.sent(request.slot, self.now)

    def finish(self, request: Request, *, with_headers: bool) -> None:
        """Report the response."""
        assert request.count is not None
        self.requests.remove(request)
        headers: dict[str, str] = {}
        if with_headers and self.sends_headers:
            headers = rate_limit_headers(request.count, request.count.at + AHEAD)
        quota = parse_quota({name.lower(): value for name, value in headers.items()})
        status_code = 200 if request.count.allowed else 429
        self.log.answered(request.slot, self.now, status_code, quota)
        if status_code == 429:
            pause = PERIOD if quota.retry_after is None else min(quota.retry_after, PAUSE_CAP)
            self.paused_until = max(self.paused_until, self.now + pause)

    def granted(self) -> list[Request]:
        """Return the requests not sent yet."""
        return [request for request in self.requests if request.departed_at is None]

    def departed(self) -> list[Request]:
        """Return the requests that have been sent."""
        return [request for request in self.requests if request.departed_at is not None]


class LogMachine(RuleBasedStateMachine):
    """Any sequence of events for the requests of one key."""

    @initialize(
        kind=st.sampled_from(["fixed", "fixed", "sliding"]),
        limit=st.sampled_from([1, 2, 3, 6]),
        spare=st.sampled_from([0, 0, 1]),
        there=ways,
        back=ways,
        sends_headers=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, *, kind: WindowKind, limit: int, spare: int, there: float, back: float, sends_headers: bool
    ) -> None:
        """Show the minimum latencies at two moments, with a whole window of requests if there is room."""
        self.kind, self.limit, self.sends_headers = kind, limit, sends_headers
        self.world = world = World(kind, limit, spare, there, back, sends_headers=sends_headers)
        for _ in range(2):
            world.pass_until(max(world.now + 0.6, world.log.next_at(world.now)))
            while world.log.next_at(world.now) <= world.now:
                world.depart(world.grant(reports_send=True), late=0.0)
            self.receive_all()

    # Rules.

    @rule(reports_send=st.booleans(), count=st.integers(1, 7), waiting=st.integers(1, 9))
    def grant(self, *, reports_send: bool, count: int, waiting: int) -> None:
        """Take every grant."""
        for _ in range(count):
            if self.world.log.next_at(self.world.now, waiting) > self.world.now:
                return
            self.world.grant(reports_send=reports_send)

    @rule(late=st.lists(lateness, min_size=7, max_size=7), waiting=st.integers(1, 9))
    def burst(self, late: list[float], waiting: int) -> None:
        """Take every grant, and send the requests immediately."""
        for seconds in late:
            if self.world.log.next_at(self.world.now, waiting) > self.world.now:
                return
            self.world.depart(self.world.grant(reports_send=True), seconds)

    @precondition(lambda self: self.world.granted())
    @rule(data=st.data(), late=lateness)
    def send_later(self, data: st.DataObject, late: float) -> None:
        """Send a granted request, possibly long after the grant."""
        self.world.depart(data.draw(st.sampled_from(self.world.granted())), late)

    @precondition(lambda self: self.world.departed())
    @rule(data=st.data(), with_headers=st.sampled_from([True, True, True, False]))
    def receive(self, *, data: st.DataObject, with_headers: bool) -> None:
        """Receive a response, as soon as possible or later."""
        request = data.draw(st.sampled_from(self.world.departed()))
        self.world.pass_until(request.counted_at + self.world.back)
        self.world.finish(request, with_headers=with_headers)

    @precondition(lambda self: self.world.departed())
    @rule()
    def receive_all(self) -> None:
        """Receive all responses, each as soon as possible."""
        for request in sorted(self.world.departed(), key=lambda request: request.counted_at):
            self.world.pass_until(request.counted_at + self.world.back)
            self.world.finish(request, with_headers=True)

    @precondition(lambda self: self.world.granted())
    @rule(data=st.data())
    def fail_to_connect(self, data: st.DataObject) -> None:
        """Give up a request that was not sent."""
        request = data.draw(st.sampled_from(self.world.granted()))
        self.world.requests.remove(request)
        self.world.log.unsent(request.slot)

    @precondition(lambda self: self.world.departed())
    @rule(data=st.data())
    def cut_off(self, data: st.DataObject) -> None:
        """Cut off a sent request: canceled, timed out or disconnected. It still arrives at the server."""
        request = data.draw(st.sampled_from(self.world.departed()))
        self.world.requests.remove(request)
        self.world.log.unknown(request.slot, self.world.now)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        """Advance the clock."""
        self.world.pass_until(self.world.now + seconds)

    @rule()
    def wait_for_next_grant(self) -> None:
        """Advance the clock to the exact moment of the next grant."""
        when = self.world.log.next_at(self.world.now)
        if when < math.inf:
            self.world.pass_until(when)
            assert self.world.log.next_at(self.world.now) <= self.world.now

    # Invariants.

    @invariant()
    def the_limit_is_kept(self) -> None:
        """Until responses have proven fixed windows, no period sees more arrivals than the limit."""
        if self.world.server.is_fixed:
            return
        arrivals = sorted(self.world.arrivals)
        for first, last in zip(arrivals, arrivals[self.limit :], strict=False):
            assert last - first >= PERIOD - 1e-9

    @invariant()
    def fixed_windows_are_not_assumed(self) -> None:
        """Neither a sliding log nor missing headers prove fixed windows."""
        if self.kind == "sliding" or not self.sends_headers:
            assert not self.world.server.is_fixed

    @invariant()
    def fixed_windows_are_not_contradicted(self) -> None:
        """Never take the responses of a server with fixed windows for a contradiction."""
        if self.kind == "fixed":
            assert not self.world.server.is_sliding

    @invariant()
    def a_grant_is_scheduled(self) -> None:
        """No call waits forever, except for requests in flight; and the limit is never raised."""
        assert self.world.log.limit <= self.limit
        assert self.world.log.next_at(self.world.now) < math.inf or self.world.requests

    @invariant()
    def an_idle_key_grants_the_limit_at_once(self) -> None:
        """Report the whole limit as remaining if there is no state to keep."""
        if self.world.log.idle(self.world.now):
            assert self.limit == self.world.log.remaining(self.world.now)

    @rule()
    def remaining_requests_are_granted(self) -> None:
        """As many requests are granted at once as the log reports remaining, unless one is held back."""
        log = copy.deepcopy(self.world.log)
        remaining, count = log.remaining(self.world.now), 0
        while log.next_at(self.world.now, 0) <= self.world.now:
            log.take(self.world.now)
            count += 1
        assert count <= remaining
        if (
            not log._shared_key.shared
            and log._probes.held_until(self.world.now, 0, log._own) <= self.world.now
        ):
            assert count == remaining

    @rule()
    def resets_in_is_long_enough(self) -> None:
        """If nothing else is sent, the whole limit is free at the reported moment."""
        log = copy.deepcopy(self.world.log)
        whole_at = self.world.now + log.resets_in(self.world.now) + 1e-9
        for slot in list(log._slots.in_flight):
            slot.sent_at = None  # so that no round trip is recorded
            log.answered(slot, self.world.now, 200, NO_HEADERS)
        assert self.limit == log.remaining(whole_at)

    @rule()
    def estimates_are_lower_bounds(self) -> None:
        """At the lowest possible latency, a queue is served no sooner than the log estimates.

        It may be one period sooner if slots free up on their own within a window that is not known yet.
        """
        estimates = [self.world.log.estimate(self.world.now, ahead) for ahead in range(3 * self.limit + 2)]
        assert all(later >= sooner - 1e-9 for sooner, later in itertools.pairwise(estimates))
        for estimate, wait in zip(estimates, self.minimum_waits(len(estimates)), strict=True):
            assert estimate <= wait + PERIOD + 1e-9

    def minimum_waits(self, count: int) -> list[float]:
        """Return the wait of each of ``count`` requests at the lowest possible latency."""
        world = self.world.fork()
        for request in world.granted():
            world.depart(request, late=0.0)
        waits: list[float] = []
        while len(waits) < count:
            while world.log.next_at(world.now) <= world.now and len(waits) < count:
                waits.append(world.now - self.world.now)
                world.depart(world.grant(reports_send=True), late=0.0)
            due = min(world.departed(), key=lambda request: request.counted_at, default=None)
            received_at = math.inf if due is None else max(world.now, due.counted_at + world.back)
            when = world.log.next_at(world.now)
            world.pass_until(min(when, received_at))
            if received_at <= when and due is not None:
                world.finish(due, with_headers=True)
        return waits


LogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestLogInvariants = LogMachine.TestCase
