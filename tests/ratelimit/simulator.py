"""A simulation in virtual time: clients, the network, and a server that counts. Seeded, so repeatable.

Minutes of traffic take a second. The clients are the real ``SlidingWindowLog``, one for each process; the
server counts with the sandbox's counters, and its headers go through the real parser. Only time is
simulated: round trips, spikes, slow connects, a full pool, another client with the same key.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal

import attrs

from lemcal_async._headers import parse_quota
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._slots import Slot
from lemcal_async.sandbox._ratelimit import COUNTERS, Counter, WindowKind, rate_limit_headers

Rounding = Literal["up", "down", "nearest"]
Lateness = tuple[float, float, float]  # fraction of the requests, minimum and maximum delay
_ROUNDINGS: dict[Rounding, Callable[[float], int]] = {"up": math.ceil, "down": math.floor, "nearest": round}


@attrs.frozen(kw_only=True)
class World:
    """The conditions of one run. Times are in seconds; ranges are uniform distributions."""

    calls: int = 100
    processes: int = 1
    limit: int = 20
    period: float = 2.0
    counting: WindowKind = "fixed"
    changes: tuple[
        tuple[float, WindowKind], ...
    ] = ()  # when the server restarts, and how it counts from then on
    servers_limit: int | None = None  # None: the limit that the client assumes
    rounded: Rounding | None = None  # Retry-After in whole seconds
    round_trip: tuple[float, float] = (0.001, 0.001)
    asymmetry: float | None = None  # forward latency as a fraction of the round trip; None: random
    apart: bool = False  # whether both directions vary independently
    late_there: Lateness = (0.0, 0.0, 0.0)  # before the server counts a request
    late_back: Lateness = (0.0, 0.0, 0.0)  # after that
    slow_connect: float = 0.0  # before each of the first requests
    connections: int = 100  # of each process
    cpu: float = 0.0005  # between two departures
    foreign: float = 0.0  # foreign requests per second
    foreign_evenly: bool = True
    first_call: bool = False  # whether one call completes before the others start
    headers: bool = True


@attrs.define
class Result:
    """The outcome of a run; times in seconds from the start of the burst."""

    finished: float = 0.0
    refused: int = 0
    arrivals: list[float] = attrs.field(
        factory=list[float]
    )  # our counted requests, on the simulation's clock
    order: list[int] = attrs.field(factory=list[int])  # calls in the order of their grants
    foreign: int = 0
    foreign_served: int = 0
    proven: bool = False  # whether the client relies on fixed windows at the end
    fell_back: bool = False  # whether it relied on fixed windows until responses contradicted them

    def most_in(self, period: float) -> int:
        """Return the maximum number of arrivals in less than a period."""
        moments = sorted(self.arrivals)
        most = first = 0
        for last, moment in enumerate(moments):
            while moment - moments[first] >= period - 1e-9:
                first += 1
            most = max(most, last - first + 1)
        return most


class _Process:
    """One process: its log, its queue and its connections."""

    def __init__(self, simulation: "Simulation", calls: list[int]) -> None:
        self.simulation = simulation
        self.server = ServerModel(simulation.world.period)
        self.log = SlidingWindowLog(simulation.world.limit, simulation.world.period, self.server)
        self.waiting = deque(calls)
        self.pool_queue: deque[tuple[int, Slot]] = deque()
        self.in_use = 0
        self.opened = 0
        self.leaves_at = 0.0
        self.alarm: float | None = None
        self.fell_back = False

    def serve(self) -> None:
        """Grant what can be granted now, and schedule the next check."""
        simulation = self.simulation
        now = simulation.now
        while self.waiting:
            when = self.log.next_at(now, len(self.waiting))
            if when > now:
                if when < float("inf") and (self.alarm is None or when < self.alarm or self.alarm <= now):
                    self.alarm = when
                    simulation.at(when, self.serve)
                return
            call = self.waiting.popleft()
            simulation.result.order.append(call)
            self.pool_queue.append((call, self.log.take(now)))
            self._connect()

    def _connect(self) -> None:
        world, simulation = self.simulation.world, self.simulation
        while self.pool_queue and self.in_use < world.connections:
            call, slot = self.pool_queue.popleft()
            self.in_use += 1
            ready = simulation.now
            if world.slow_connect and self.in_use > self.opened:
                self.opened += 1
                ready += world.slow_connect
            self.leaves_at = max(ready, self.leaves_at + world.cpu)
            simulation.at(self.leaves_at, partial(self._send, call, slot))

    def _send(self, call: int, slot: Slot) -> None:
        simulation = self.simulation
        self.log.sent(slot, simulation.now)
        there, back = simulation.travel()
        simulation.at(simulation.now + there, lambda: self._arrive(call, slot, back))

    def _arrive(self, call: int, slot: Slot, back: float) -> None:
        simulation = self.simulation
        count = simulation.counter.count("key")
        if count.allowed:
            simulation.result.arrivals.append(simulation.now)
        headers = (
            rate_limit_headers(count, simulation.now + simulation.wall_clock)
            if simulation.world.headers
            else {}
        )
        if headers and (rounded := simulation.world.rounded):
            headers["Retry-After"] = str(_ROUNDINGS[rounded](count.resets_in))
        quota = parse_quota({name.lower(): value for name, value in headers.items()})
        status_code = 200 if count.allowed else 429

        def receive() -> None:
            self.fell_back |= self.log.answered(slot, simulation.now, status_code, quota) == "contradiction"
            self.in_use -= 1
            if count.allowed:
                simulation.completed()
            else:
                simulation.result.refused += 1
                self.waiting.appendleft(call)
            self._connect()
            self.serve()

        simulation.at(simulation.now + back, receive)


class Simulation:
    """One run."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.now = 100.0
        self.wall_clock = 1.6e9 + random.Random(-seed).random()  # the offset of the server's clock from ours
        self.result = Result()
        self.counter = self._new_counter(world.counting)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._left = world.calls
        calls = list(range(world.calls))
        self._processes = [
            _Process(self, calls[number :: world.processes]) for number in range(world.processes)
        ]

    def _new_counter(self, kind: WindowKind) -> Counter:
        return COUNTERS[kind](
            self.world.servers_limit or self.world.limit, self.world.period, lambda: self.now
        )

    def _restart(self, kind: WindowKind) -> None:
        self.counter = self._new_counter(kind)

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Schedule an event."""
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def travel(self) -> tuple[float, float]:
        """Return the forward and the return latency in seconds."""
        total = self.rng.uniform(*self.world.round_trip)
        share = self.rng.random() if self.world.asymmetry is None else self.world.asymmetry
        there, back = total * share, total * (1 - share)
        if self.world.apart:
            there, back = total / 2, self.rng.uniform(*self.world.round_trip) / 2
        return there + self._lateness(self.world.late_there), back + self._lateness(self.world.late_back)

    def _lateness(self, lateness: Lateness) -> float:
        share, least, most = lateness
        return self.rng.uniform(least, most) if share and self.rng.random() < share else 0.0

    def completed(self) -> None:
        """Count a completed call."""
        self._left -= 1

    def run(self) -> Result:
        """Run until all calls have completed."""
        if self.world.foreign:
            self.at(self.now + self.rng.random(), self._foreign_request)
            self._until(self.now + 1 + 3 * self.rng.random())
        started = self.now
        if self.world.first_call:
            process = self._processes[0]
            others, process.waiting = process.waiting, deque([-1])
            left, self._left = self._left, 1
            process.serve()
            self._run_to_completion()
            process.waiting, self._left, started = others, left, self.now
        for moment, kind in self.world.changes:
            self.at(started + moment, partial(self._restart, kind))
        before = self.result.foreign, self.result.foreign_served
        for process in self._processes:
            process.serve()
        self._run_to_completion()
        self.result.finished = self.now - started
        self.result.foreign -= before[0]
        self.result.foreign_served -= before[1]
        self.result.proven = all(process.server.is_fixed for process in self._processes)
        self.result.fell_back = any(process.fell_back for process in self._processes)
        return self.result

    def _run_to_completion(self) -> None:
        while self._left:
            self._step()

    def _until(self, moment: float) -> None:
        while self._events and self._events[0][0] <= moment:
            self._step()
        self.now = moment

    def _step(self) -> None:
        when, _, event = heapq.heappop(self._events)
        self.now = max(self.now, when)
        event()

    def _foreign_request(self) -> None:
        self.result.foreign += 1
        self.result.foreign_served += self.counter.count("key").allowed
        gap = 1 / self.world.foreign
        self.at(
            self.now + (gap if self.world.foreign_evenly else self.rng.expovariate(1 / gap)),
            self._foreign_request,
        )
