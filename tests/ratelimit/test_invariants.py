"""The law of the limiter: one key's slots against a server that really counts, under any order of events.

Hypothesis decides what is asked, sent, answered, lost and canceled, and how long every way takes,
within what the limiter relies on: no way there or back is faster than the first answers have shown, and
what is cut off is counted within ``LOST_AFTER`` of its departure or never.
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
SILENT = Quota()

lateness = st.sampled_from([0.0, 0.0, 0.5, 2.0, 4.0]) | st.floats(0, 4)
ways = st.sampled_from([0.0, 0.001, 0.05, 0.3])


@attrs.define(eq=False)
class Request:
    """One request, and what only the network and the server know of it."""

    slot: Slot
    tells: bool  # whether the wire reports the departure
    departed_at: float | None = None
    counted_at: float = math.inf
    count: Count | None = None


@attrs.define
class Clock:
    """A clock that is copied with the world in which it runs."""

    now: float = 100.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now


class World:
    """A client's log, the network, and a server that counts; ``talks`` is whether it sends headers."""

    def __init__(
        self, kind: WindowKind, limit: int, spare: int, there: float, back: float, *, talks: bool
    ) -> None:
        self.there, self.back, self.talks = there, back, talks
        self.clock = Clock()
        self.server = ServerModel(PERIOD)
        self.log = SlidingWindowLog(limit, PERIOD, self.server)
        self.counter = COUNTERS[kind](limit + spare, PERIOD, self.clock)
        self.requests: list[Request] = []
        self.under_way: list[tuple[float, int, Request]] = []  # to the server, a heap
        self.sent = 0
        self.arrivals: list[float] = []
        self.held_until = -math.inf

    @property
    def now(self) -> float:
        """Return the time."""
        return self.clock.now

    def fork(self) -> "World":
        """Return a world that is the same until now."""
        return copy.deepcopy(self, {id(self.counter._lock): threading.Lock()})

    def pass_until(self, moment: float) -> None:
        """Let time pass, in which requests arrive and are counted."""
        while self.under_way and self.under_way[0][0] <= moment:
            self.clock.now, _, request = heapq.heappop(self.under_way)
            request.count = self.counter.count("key")
            self.arrivals.append(self.now)
            assert request.count.allowed
        self.clock.now = max(self.now, moment)

    def grant(self, *, tells: bool) -> Request:
        """Take a slot."""
        assert self.held_until <= self.now
        request = Request(self.log.take(self.now), tells)
        self.requests.append(request)
        return request

    def depart(self, request: Request, late: float) -> None:
        """Send a request that the server counts ``late`` seconds after it could have at the earliest."""
        assert self.there + late < LOST_AFTER
        request.departed_at = self.now
        self.sent += 1
        request.counted_at = self.now + self.there + late
        heapq.heappush(self.under_way, (request.counted_at, self.sent, request))
        if request.tells:
            self.log.sent(request.slot, self.now)

    def finish(self, request: Request, *, told: bool) -> None:
        """Report the answer."""
        assert request.count is not None
        self.requests.remove(request)
        headers: dict[str, str] = {}
        if told and self.talks:
            headers = rate_limit_headers(request.count, request.count.at + AHEAD)
        quota = parse_quota({name.lower(): value for name, value in headers.items()})
        status_code = 200 if request.count.allowed else 429
        self.log.answered(request.slot, self.now, status_code, quota)
        if status_code == 429:
            hold = PERIOD if quota.retry_after is None else min(quota.retry_after, PAUSE_CAP)
            self.held_until = max(self.held_until, self.now + hold)

    def granted(self) -> list[Request]:
        """Return the requests that have not left."""
        return [request for request in self.requests if request.departed_at is None]

    def departed(self) -> list[Request]:
        """Return the requests that have left."""
        return [request for request in self.requests if request.departed_at is not None]


class LogMachine(RuleBasedStateMachine):
    """Anything may happen to the requests of one key."""

    @initialize(
        kind=st.sampled_from(["fixed", "fixed", "sliding"]),
        limit=st.sampled_from([1, 2, 3, 6]),
        spare=st.sampled_from([0, 0, 1]),
        there=ways,
        back=ways,
        talks=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, *, kind: WindowKind, limit: int, spare: int, there: float, back: float, talks: bool
    ) -> None:
        """Show the quickest ways in two moments; a whole window of them where there is room for it."""
        self.kind, self.limit, self.talks = kind, limit, talks
        self.world = world = World(kind, limit, spare, there, back, talks=talks)
        for _ in range(2):
            world.pass_until(max(world.now + 0.6, world.log.next_at(world.now)))
            while world.log.next_at(world.now) <= world.now:
                world.depart(world.grant(tells=True), late=0.0)
            self.hear_all()

    # What happens.

    @rule(tells=st.booleans(), count=st.integers(1, 7), waiting=st.integers(1, 9))
    def ask(self, *, tells: bool, count: int, waiting: int) -> None:
        """Take what is granted."""
        for _ in range(count):
            if self.world.log.next_at(self.world.now, waiting) > self.world.now:
                return
            self.world.grant(tells=tells)

    @rule(late=st.lists(lateness, min_size=7, max_size=7), waiting=st.integers(1, 9))
    def burst(self, late: list[float], waiting: int) -> None:
        """Take what is granted, and send it at once."""
        for seconds in late:
            if self.world.log.next_at(self.world.now, waiting) > self.world.now:
                return
            self.world.depart(self.world.grant(tells=True), seconds)

    @precondition(lambda self: self.world.granted())
    @rule(data=st.data(), late=lateness)
    def leave(self, data: st.DataObject, late: float) -> None:
        """Let a granted request leave, maybe long after the grant."""
        self.world.depart(data.draw(st.sampled_from(self.world.granted())), late)

    @precondition(lambda self: self.world.departed())
    @rule(data=st.data(), told=st.sampled_from([True, True, True, False]))
    def hear(self, *, data: st.DataObject, told: bool) -> None:
        """Let an answer come, as soon as it can or later."""
        request = data.draw(st.sampled_from(self.world.departed()))
        self.world.pass_until(request.counted_at + self.world.back)
        self.world.finish(request, told=told)

    @precondition(lambda self: self.world.departed())
    @rule()
    def hear_all(self) -> None:
        """Let all answers come, each as soon as it can."""
        for request in sorted(self.world.departed(), key=lambda request: request.counted_at):
            self.world.pass_until(request.counted_at + self.world.back)
            self.world.finish(request, told=True)

    @precondition(lambda self: self.world.granted())
    @rule(data=st.data())
    def fail_to_connect(self, data: st.DataObject) -> None:
        """Give up a request that has not left."""
        request = data.draw(st.sampled_from(self.world.granted()))
        self.world.requests.remove(request)
        self.world.log.unsent(request.slot)

    @precondition(lambda self: self.world.departed())
    @rule(data=st.data())
    def break_off(self, data: st.DataObject) -> None:
        """Lose a request that has left: canceled, timed out, disconnected. It arrives all the same."""
        request = data.draw(st.sampled_from(self.world.departed()))
        self.world.requests.remove(request)
        self.world.log.unknown(request.slot, self.world.now)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.world.pass_until(self.world.now + seconds)

    @rule()
    def wait_for_the_next(self) -> None:
        """Let time pass until just the moment at which the log wants to grant again."""
        when = self.world.log.next_at(self.world.now)
        if when < math.inf:
            self.world.pass_until(when)
            assert self.world.log.next_at(self.world.now) <= self.world.now

    # What holds.

    @invariant()
    def the_limit_holds(self) -> None:
        """Until the answers have proven windows, look for more arrivals than the limit in a period."""
        if self.world.server.is_fixed:
            return
        arrivals = sorted(self.world.arrivals)
        for first, last in zip(arrivals, arrivals[self.limit :], strict=False):
            assert last - first >= PERIOD - 1e-9

    @invariant()
    def nothing_else_is_taken_for_windows(self) -> None:
        """Neither a sliding log nor silence proves fixed windows."""
        if self.kind == "sliding" or not self.talks:
            assert not self.world.server.is_fixed

    @invariant()
    def windows_are_not_taken_for_something_else(self) -> None:
        """See that a server which counts in fixed windows is never believed to contradict them."""
        if self.kind == "fixed":
            assert not self.world.server.is_sliding

    @invariant()
    def a_grant_comes(self) -> None:
        """Nobody waits for ever, unless for requests in flight; and a limit is never raised."""
        assert self.world.log.limit <= self.limit
        assert self.world.log.next_at(self.world.now) < math.inf or self.world.requests

    @invariant()
    def an_idle_key_grants_the_limit_at_once(self) -> None:
        """Take what has nothing to remember for as good as new."""
        if self.world.log.idle(self.world.now):
            assert self.limit == self.world.log.remaining(self.world.now)

    @rule()
    def remaining_is_what_can_be_had(self) -> None:
        """As many can be taken at once as the log says remain, if none is to be held back."""
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
        """If nothing else is sent, the whole limit is free when the log says."""
        log = copy.deepcopy(self.world.log)
        whole_at = self.world.now + log.resets_in(self.world.now) + 1e-9
        for slot in list(log._slots.in_flight):
            slot.sent_at = None  # so that nothing is learned of round trips
            log.answered(slot, self.world.now, 200, SILENT)
        assert self.limit == log.remaining(whole_at)

    @rule()
    def nobody_waits_less_than_estimated(self) -> None:
        """In the fastest of all worlds, a queue is served about as soon as the log estimates.

        By a period sooner if slots go round by themselves within a window that it does not know yet.
        """
        estimates = [self.world.log.estimate(self.world.now, ahead) for ahead in range(3 * self.limit + 2)]
        assert all(later >= sooner - 1e-9 for sooner, later in itertools.pairwise(estimates))
        for estimate, wait in zip(estimates, self.fastest(len(estimates)), strict=True):
            assert estimate <= wait + PERIOD + 1e-9

    def fastest(self, count: int) -> list[float]:
        """Return how long each of ``count`` requests waits if all goes as fast as it can."""
        world = self.world.fork()
        for request in world.granted():
            world.depart(request, late=0.0)
        waits: list[float] = []
        while len(waits) < count:
            while world.log.next_at(world.now) <= world.now and len(waits) < count:
                waits.append(world.now - self.world.now)
                world.depart(world.grant(tells=True), late=0.0)
            due = min(world.departed(), key=lambda request: request.counted_at, default=None)
            heard_at = math.inf if due is None else max(world.now, due.counted_at + world.back)
            when = world.log.next_at(world.now)
            world.pass_until(min(when, heard_at))
            if heard_at <= when and due is not None:
                world.finish(due, told=True)
        return waits


LogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
Test01TheLaw = LogMachine.TestCase
