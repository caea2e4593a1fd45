"""The script and what processes make of it, in simulated time: a real Redis, on a clock of the test.

The processes are ``Budget`` objects, and the server counts as lemcal or as a strict sliding log would.
"""

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from redis_server import RedisServer
from valkey.connection import UnixDomainSocketConnection

from lemcal_async._headers import Quota
from lemcal_async.ratelimit.redis._budget import LAPSE, Budget, ScriptReply
from lemcal_async.ratelimit.redis._connection import SCRIPT

LIMIT = 20
PERIOD = 2.0
BEGIN = 1_700_000_000.0  # what the clock of Redis shows at the time 0 of the processes
CLOCK = SCRIPT.replace("redis.call('TIME')", "{ARGV[2], ARGV[3]}")


Run = Callable[[Any, float], ScriptReply]


@pytest.fixture
def run(redis: RedisServer) -> Iterator[Run]:
    """Return what runs the script at a time."""
    connect: Any = UnixDomainSocketConnection  # untyped
    connection = connect(str(redis.socket))

    def run(request: Any, now: float) -> ScriptReply:
        micros = round((BEGIN + now) * 1e6)
        argument = json.dumps(request)
        clock = str(micros // 1_000_000), str(micros % 1_000_000)
        connection.send_command("EVAL", CLOCK, "2", "budget", "marker", argument, *clock)
        return ScriptReply(**json.loads(connection.read_response()))

    yield run
    connection.disconnect()


class Server:
    """Counts requests in a strict sliding log, or in windows that the first request opens.

    Until ``closed_until`` it refuses all of them, each time for half a second.
    """

    def __init__(self, *, fixed: bool, closed_until: float = -math.inf) -> None:
        self.fixed = fixed
        self._closed_until = closed_until
        self.counted: list[float] = []
        self.refused = 0
        self._opened = -math.inf

    def count(self, now: float) -> tuple[int, Quota]:
        """Count a request; return the status and what the headers say."""
        if now < self._closed_until:
            self.refused += 1
            return 429, self._quota(0, 0.5, now)
        if self.fixed:
            self._opened = now if now >= self._opened + PERIOD else self._opened
            mine = [at for at in self.counted if at >= self._opened]
            rest = self._opened + PERIOD - now
        else:
            mine = [at for at in self.counted if at > now - PERIOD]
            rest = mine[0] + PERIOD - now if mine else PERIOD
        if len(mine) >= LIMIT:
            self.refused += 1
            return 429, self._quota(0, rest, now)
        self.counted.append(now)
        return 200, self._quota(LIMIT - len(mine) - 1, rest, now)

    def _quota(self, remaining: int, rest: float, now: float) -> Quota:
        reset_at = float(math.floor(BEGIN + 3600.7 + now + rest))  # a clock of its own, in whole seconds
        rest = math.floor(rest * 1000) / 1000
        return Quota(limit=LIMIT, remaining=remaining, retry_after=rest, resets_in=rest, reset_at=reset_at)


Way = Callable[[random.Random], float]


class Simulation:
    """Processes that make calls; ``there`` and ``back`` are the ways of a request and of its answer."""

    def __init__(
        self,
        run: Run,
        server: Server,
        *,
        there: "Way | None" = None,
        back: "Way | None" = None,
        seed: int = 1,
    ) -> None:
        self._run = run
        self._server = server
        self._there, self._back = there or quick, back or quick
        self._dice = random.Random(seed)
        self._sequence = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Callable[[], object]]] = []
        self._counts: dict[str, int] = {}
        self._stands_still: dict[str, float] = {}  # until when
        self.processes: dict[str, Budget] = {}
        self.now = 0.0

    def calls(self, name: str, count: int) -> None:
        """Have a process make so many calls."""
        self.processes.setdefault(name, Budget(LIMIT, PERIOD)).waiting += count

    def stop(self, name: str, seconds: float) -> None:
        """Have a process stand still."""
        self._stands_still[name] = self.now + seconds

    def at(self, moment: float, event: Callable[[], object], process: str = "") -> None:
        """Have something happen, in a process or outside."""
        heapq.heappush(self._events, (moment, next(self._order), process, event))

    def until(self, over: Callable[[], bool]) -> None:
        """Run until then."""
        while not over():
            due = {name: self._next_at(name, budget.due()) for name, budget in self.processes.items()}
            name = min(due, key=due.__getitem__)
            if self._events and self._events[0][0] <= due[name]:
                self.now, _, owner, event = heapq.heappop(self._events)
                if (later := self._next_at(owner, self.now)) > self.now:
                    self.at(later, event, owner)
                else:
                    event()
            else:
                assert due[name] < math.inf
                self.now = due[name]
                self._exchange(name, self.processes[name])
            for name, budget in self.processes.items():
                self._grant(name, budget)

    def _next_at(self, name: str, moment: float) -> float:
        return max(self.now, moment, self._stands_still.get(name, 0.0))

    def _exchange(self, name: str, budget: Budget) -> None:
        asked_at = self.now
        request = budget.request(asked_at)
        request.update(process=name, sequence=next(self._sequence), count=self._counts.get(name, 0))
        self.now += 0.0005  # there,
        reply = self._run(request, self.now)
        self.now += 0.0005  # and back
        self._counts[name] = reply.count
        budget.apply(request, reply, asked_at, self.now)

    def _grant(self, name: str, budget: Budget) -> None:
        while (
            self._next_at(name, 0.0) == self.now and budget.waiting and budget.next_at(self.now) <= self.now
        ):
            budget.waiting -= 1
            slot = budget.take(self.now)
            # It leaves a moment later, if the process does not stand still.
            self.at(self.now + 0.001, partial(self._send, name, budget, slot), name)

    def _send(self, name: str, budget: Budget, slot: Any) -> None:
        if not budget.is_valid(slot, self.now):
            budget.unsent(slot)
            budget.waiting += 1
            return
        budget.sent(slot, self.now)
        self.at(self.now + self._there(self._dice), partial(self._count, name, budget, slot))

    def _count(self, name: str, budget: Budget, slot: Any) -> None:
        status, quota = self._server.count(self.now)
        answer = partial(self._answer, budget, slot, status, quota)
        self.at(self.now + self._back(self._dice), answer, name)

    def _answer(self, budget: Budget, slot: Any, status: int, quota: Quota) -> None:
        budget.answered(slot, self.now, status, quota)
        budget.waiting += status == 429


def quick(dice: random.Random) -> float:
    """Return the seconds of a way on loopback."""
    return 0.0005 + 0.0005 * dice.random()


def jitter(dice: random.Random) -> float:
    """Return the seconds of half a round trip of 40 to 200 ms."""
    return 0.02 + 0.08 * dice.random()


def sometimes(share: float, least: float, most: float) -> Way:
    """Return a way that takes that much longer at times."""
    return lambda dice: quick(dice) + (dice.uniform(least, most) if dice.random() < share else 0.0)


def four(simulation: Simulation, calls: int = 50) -> None:
    """Have four processes make their calls."""
    for name in "abcd":
        simulation.calls(name, calls)


@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
@pytest.mark.parametrize(
    ("there", "back", "bound"),
    [
        pytest.param(quick, quick, 1.02, id="quick"),
        pytest.param(jitter, jitter, 1.10, id="jitter"),
        pytest.param(sometimes(0.05, 0.52, 0.54), quick, 1.12, id="late"),
        pytest.param(sometimes(0.05, 0.0, 4.0), quick, 1.5, id="very late"),
        pytest.param(quick, sometimes(0.3, 2.5, 2.5), 1.3, id="slow after counting"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_14_18_no_429_however_late(
    run: Run, there: Way, back: Way, bound: float, seed: int, *, fixed: bool
) -> None:
    """Four processes, 50 calls each: lateness before the server counts costs time, never a 429."""
    server = Server(fixed=fixed)
    simulation = Simulation(run, server, there=there, back=back, seed=seed)
    four(simulation)
    simulation.until(lambda: len(server.counted) == 200)
    assert 0 == server.refused
    assert server.counted[-1] - server.counted[0] <= bound * (200 / LIMIT - 1) * PERIOD


@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
@pytest.mark.parametrize(("way", "least"), [(quick, 18.0), (jitter, 17.2)], ids=["near", "far"])
def test_14_18_slow_handlers_do_not_hold_the_limit(run: Run, way: Way, least: float, *, fixed: bool) -> None:
    """With 30 % of the answers 2.5 s late, 18 requests pass in 2 s all the same."""
    server = Server(fixed=fixed)
    slow = sometimes(0.3, 2.5, 2.5)
    simulation = Simulation(run, server, there=way, back=lambda dice: way(dice) + slow(dice))
    four(simulation, 100)
    simulation.until(lambda: len(server.counted) == 400)
    assert 0 == server.refused
    assert least <= (400 - LIMIT) / (server.counted[-1] - server.counted[0]) * PERIOD


def test_processes_are_served_alike(run: Run) -> None:
    """However unequal their queues are; the first burst goes to who asks first."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    for number, name in enumerate("abcd"):
        simulation.calls(name, 20 * (number + 2))
    simulation.until(lambda: len(server.counted) == 180)
    left = [20 * (number + 2) - simulation.processes[name].waiting for number, name in enumerate("abcd")]
    assert max(left) - min(left) <= LIMIT + 2


def test_11_a_process_that_dies_costs_a_window(run: Run) -> None:
    """The others lose what it held, and do not wait for it again."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    four(simulation)
    simulation.at(4.5, partial(simulation.processes.pop, "a"))
    simulation.until(lambda: sum(each.waiting for each in simulation.processes.values()) == 0)
    assert 0 == server.refused
    ideal = (len(server.counted) / LIMIT - 1) * PERIOD
    assert simulation.now <= 1.05 * ideal + PERIOD + LAPSE


@pytest.mark.parametrize("seconds", [0.6, 1.0, 3.0, 10.0])
def test_14_13_a_process_that_stands_still_sends_nothing_late(run: Run, seconds: float) -> None:
    """On waking, and at the moment of sending, what has run out is given back and asked for again."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    four(simulation)

    def stop() -> None:
        for name in "abc":
            simulation.stop(name, seconds)

    for moment in 0.0012, 2.0075, 4.0, 15.0, 17.0135:  # some of them between a grant and its request
        simulation.at(moment, stop)
    simulation.until(lambda: len(server.counted) == 200)
    assert 0 == server.refused


@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
@pytest.mark.parametrize("there", [quick, jitter], ids=["near", "far"])
def test_14_07_during_a_long_429_one_request_looks(run: Run, there: Way, *, fixed: bool) -> None:
    """After the first burst, one request of all processes at a time is refused; let through, all follow."""
    server = Server(fixed=fixed, closed_until=10.0)
    simulation = Simulation(run, server, there=there)
    four(simulation)
    simulation.until(lambda: len(server.counted) == 200)
    assert server.refused <= LIMIT + (10.0 - PERIOD) / 0.5
    assert server.counted[LIMIT - 5] <= server.counted[0] + 1.0  # four have just been refused
    assert server.counted[-1] <= 10.0 + 1.0 + 1.1 * (200 / LIMIT - 1) * PERIOD


@pytest.mark.parametrize("end", ["dies", "unsent", "unknown"])
def test_14_07_one_that_looked_and_does_not_come_back(run: Run, end: str) -> None:
    """The next one looks at once if its process says so; else all follow a period later."""
    server = Server(fixed=False, closed_until=10.0)
    simulation = Simulation(run, server)
    simulation.calls("a", 40)

    def lose() -> None:
        budget = simulation.processes["a"]
        (slot,) = budget._open
        if end == "dies":
            del simulation.processes["a"]
        elif end == "unsent":
            budget.unsent(slot)
        else:
            budget.unknown(slot, simulation.now)

    simulation.until(lambda: server.refused == LIMIT + 1)
    simulation.until(lambda: server.refused == LIMIT + 2)  # one is refused by itself, as it should be
    simulation.until(lambda: len(simulation.processes["a"]._open) == 1)
    lost_at = simulation.now
    lose()
    refused = server.refused
    simulation.calls("b", 40)
    simulation.until(lambda: len(server.counted) == 40)
    assert server.refused - refused <= (10.0 - lost_at) / 0.5 + (LIMIT if end == "dies" else 1)
    assert server.counted[0] <= 11.0 + PERIOD


LOSS = {
    "flushed": ["FLUSHALL"],
    "evicted": ["DEL", "budget"],
    "without a marker": ["DEL", "marker"],
    "not ours": ["SET", "budget", "somebody else's"],
    "a list": ["EVAL", "redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[1], 1)", "1", "budget"],
}


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("moment", [0.5, 2.006, 2.0095, 3.9])
def test_14_14_lost_data_is_not_a_first_use(run: Run, redis: RedisServer, loss: str, moment: float) -> None:
    """Nobody sends until all have restated what they hold; a process that was idle notices as well."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    simulation.calls("a", 40)
    simulation.calls("idle", 0)
    simulation.calls("other", 1)
    simulation.at(moment, lambda: redis.command(*LOSS[loss]))
    simulation.at(moment + 0.001, partial(simulation.calls, "other", 40))
    if loss in {"flushed", "without a marker"}:  # it has never had this key, but it knows that Redis had data
        simulation.processes["idle"].apply({"waiting": 0}, run(probe(simulation), 0.0), 0.0, 0.0)
        simulation._counts["idle"] = 1
        simulation.at(moment + 0.001, partial(simulation.calls, "idle", 20))
    simulation.until(lambda: sum(each.waiting for each in simulation.processes.values()) == 0)
    simulation.until(lambda: not any(each._open for each in simulation.processes.values()))
    assert 0 == server.refused


def probe(simulation: Simulation) -> Any:
    """Return the question of a process that has just come."""
    request = simulation.processes["idle"].request(0.0)
    request.update(process="idle", sequence=0.5, count=0)
    return request


def test_14_14_an_old_snapshot(run: Run, redis: RedisServer) -> None:
    """Restored, the data is older than what a process has heard: nobody sends on its word."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    simulation.calls("a", 60)
    saved: dict[str, bytes] = {}

    def save() -> None:
        saved.update({name: redis.run("DUMP", name) for name in ("budget", "marker")})

    def restore() -> None:
        redis.run("FLUSHALL")
        for name, value in saved.items():
            redis.run("RESTORE", name, "0", value, "REPLACE")  # type: ignore[arg-type]

    simulation.at(0.5, save)
    simulation.at(2.0095, restore)
    simulation.until(lambda: len(server.counted) == 60)
    assert 0 == server.refused
    assert server.counted[40] - server.counted[39] >= PERIOD


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(seed=748948, late=0.3, most=4.25)  # what a later answer said was taken for the later state
@example(seed=3480718092, late=0.05, most=2.0)
@given(seed=st.integers(0, 2**32), late=st.sampled_from([0.0, 0.05, 0.3]), most=st.floats(0.0, 5.0))
@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
def test_whatever_happens(
    run: Run, redis: RedisServer, seed: int, late: float, most: float, *, fixed: bool
) -> None:
    """Lateness on both ways, processes that come, stand still and go: never a request too many."""
    redis.run("FLUSHALL")
    dice = random.Random(seed)
    server = Server(fixed=fixed)
    way = sometimes(late, 0.0, most)
    simulation = Simulation(run, server, there=way, back=way, seed=seed)
    for name in "abc":
        simulation.calls(name, dice.randrange(40))
    for _ in range(dice.randrange(6)):
        name, moment = dice.choice("abc"), 10 * dice.random()
        simulation.at(moment, partial(simulation.calls, name, dice.randrange(10)))
        if not late:  # nobody speaks for a request that is late if its process stands still, too
            simulation.at(moment, partial(simulation.stop, name, 5 * dice.random()))
    simulation.at(10.1, lambda: None)
    simulation.until(
        lambda: simulation.now > 10 and not any(p.waiting for p in simulation.processes.values())
    )
    assert 0 == server.refused


def test_a_request_that_is_carried_out_late_changes_nothing(run: Run) -> None:
    """Redis hung, the process asked again on another connection, and then the first request runs."""
    budget = Budget(LIMIT, PERIOD)
    budget.waiting = 5
    late, asked = budget.request(0.0), budget.request(0.3)
    late.update(process="a", sequence=1, count=0)
    asked.update(process="a", sequence=2, count=0)
    budget.apply(asked, run(asked, 0.3), 0.3, 0.3)
    for _ in range(5):
        budget.take(0.3)
    with pytest.raises(TypeError):  # it has no reply
        run(late, 0.4)
    other = Budget(LIMIT, PERIOD).request(0.5)
    other.update(process="b", sequence=1, count=0, waiting=LIMIT)
    assert LIMIT - 5 == run(other, 0.5).granted
