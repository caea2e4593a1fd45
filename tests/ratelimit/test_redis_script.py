"""The script and ``Budget`` in simulated time: a real Redis, on the clock of the test.

The processes are ``Budget`` objects. The server counts in fixed windows, like lemcal, or in a sliding log.
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
from lemcal_async.ratelimit.redis._budget import GRANT_TTL, Budget, ScriptReply
from lemcal_async.ratelimit.redis._connection import SCRIPT

LIMIT = 20
PERIOD = 2.0
BEGIN = 1_800_000_000.0  # the clock of Redis at time 0 of the processes
CLOCK = SCRIPT.replace("redis.call('TIME')", "{ARGV[2], ARGV[3]}")


Run = Callable[[Any, float], ScriptReply]


@pytest.fixture
def run(redis: RedisServer) -> Iterator[Run]:
    """Return a function that runs the script at a given time."""
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
    """Counts requests in a strict sliding log, or in fixed windows that the first request opens.

    Until ``closed_until`` it refuses every request, with a Retry-After of half a second.
    """

    def __init__(self, *, fixed: bool, closed_until: float = -math.inf) -> None:
        self.fixed = fixed
        self._closed_until = closed_until
        self.counted: list[float] = []
        self.refused = 0
        self._opened = -math.inf

    def count(self, now: float) -> tuple[int, Quota]:
        """Count a request; return the status code and the quota of the response."""
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
        reset_at = float(math.floor(BEGIN + 3600.7 + now + rest))  # its own clock, in whole seconds
        rest = math.floor(rest * 1000) / 1000
        return Quota(limit=LIMIT, remaining=remaining, retry_after=rest, resets_in=rest, reset_at=reset_at)


Delay = Callable[[random.Random], float]


class Simulation:
    """Processes that make calls. ``there`` and ``back`` are the delays of requests and of responses."""

    def __init__(
        self,
        run: Run,
        server: Server,
        *,
        there: "Delay | None" = None,
        back: "Delay | None" = None,
        seed: int = 1,
    ) -> None:
        self._run = run
        self._server = server
        self._there, self._back = there or quick, back or quick
        self._dice = random.Random(seed)
        self._sequence = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Callable[[], object]]] = []
        self._runs: dict[str, int] = {}
        self._suspended: dict[str, float] = {}  # until then
        self.processes: dict[str, Budget] = {}
        self.now = 0.0

    def calls(self, name: str, count: int) -> None:
        """Add ``count`` calls to a process."""
        self.processes.setdefault(name, Budget(LIMIT, PERIOD)).waiting += count

    def stop(self, name: str, seconds: float) -> None:
        """Suspend a process."""
        self._suspended[name] = self.now + seconds

    def at(self, moment: float, event: Callable[[], object], process: str = "") -> None:
        """Schedule an event, in a process or outside of all."""
        heapq.heappush(self._events, (moment, next(self._order), process, event))

    def until(self, over: Callable[[], bool]) -> None:
        """Run until ``over()`` is true."""
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
        return max(self.now, moment, self._suspended.get(name, 0.0))

    def _exchange(self, name: str, budget: Budget) -> None:
        asked_at = self.now
        request = budget.request(asked_at)
        request.update(process=name, sequence=next(self._sequence), runs=self._runs.get(name, 0))
        self.now += 0.0005  # to Redis,
        reply = self._run(request, self.now)
        self.now += 0.0005  # and back
        self._runs[name] = reply.runs
        budget.apply(request, reply, asked_at, self.now)

    def _grant(self, name: str, budget: Budget) -> None:
        while (
            self._next_at(name, 0.0) == self.now and budget.waiting and budget.next_at(self.now) <= self.now
        ):
            budget.waiting -= 1
            slot = budget.take(self.now)
            # It leaves a moment later, unless the process is suspended.
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
        response = partial(self._answer, budget, slot, status, quota)
        self.at(self.now + self._back(self._dice), response, name)

    def _answer(self, budget: Budget, slot: Any, status: int, quota: Quota) -> None:
        budget.answered(slot, self.now, status, quota)
        budget.waiting += status == 429


def quick(dice: random.Random) -> float:
    """Return a delay as on loopback, in seconds."""
    return 0.0005 + 0.0005 * dice.random()


def jitter(dice: random.Random) -> float:
    """Return half a round trip of 40 to 200 ms, in seconds."""
    return 0.02 + 0.08 * dice.random()


def sometimes(share: float, least: float, most: float) -> Delay:
    """Return a delay that is longer by ``least`` to ``most`` seconds in a ``share`` of cases."""
    return lambda dice: quick(dice) + (dice.uniform(least, most) if dice.random() < share else 0.0)


def four(simulation: Simulation, calls: int = 50) -> None:
    """Add ``calls`` calls to each of four processes."""
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
def test_late_requests_and_responses_cause_no_429(
    run: Run, there: Delay, back: Delay, bound: float, seed: int, *, fixed: bool
) -> None:
    """Four processes, 50 calls each: a request that is counted late costs time, but never causes a 429."""
    server = Server(fixed=fixed)
    simulation = Simulation(run, server, there=there, back=back, seed=seed)
    four(simulation)
    simulation.until(lambda: len(server.counted) == 200)
    assert 0 == server.refused
    assert server.counted[-1] - server.counted[0] <= bound * (200 / LIMIT - 1) * PERIOD


@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
@pytest.mark.parametrize(("way", "least"), [(quick, 18.0), (jitter, 17.2)], ids=["near", "far"])
def test_slow_handlers_do_not_occupy_slots(run: Run, way: Delay, least: float, *, fixed: bool) -> None:
    """With 30 % of the responses 2.5 s late, about 18 requests still pass in 2 s."""
    server = Server(fixed=fixed)
    slow = sometimes(0.3, 2.5, 2.5)
    simulation = Simulation(run, server, there=way, back=lambda dice: way(dice) + slow(dice))
    four(simulation, 100)
    simulation.until(lambda: len(server.counted) == 400)
    assert 0 == server.refused
    assert least <= (400 - LIMIT) / (server.counted[-1] - server.counted[0]) * PERIOD


def test_processes_get_equal_shares(run: Run) -> None:
    """Despite unequal queues. Only the first burst goes to the first process that asks."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    for number, name in enumerate("abcd"):
        simulation.calls(name, 20 * (number + 2))
    simulation.until(lambda: len(server.counted) == 180)
    left = [20 * (number + 2) - simulation.processes[name].waiting for number, name in enumerate("abcd")]
    assert max(left) - min(left) <= LIMIT + 2


def test_a_dead_process_costs_one_window(run: Run) -> None:
    """The others lose its slots, and do not wait for it again."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    four(simulation)
    simulation.at(4.5, partial(simulation.processes.pop, "a"))
    simulation.until(lambda: sum(each.waiting for each in simulation.processes.values()) == 0)
    assert 0 == server.refused
    ideal = (len(server.counted) / LIMIT - 1) * PERIOD
    assert simulation.now <= 1.05 * ideal + PERIOD + GRANT_TTL


@pytest.mark.parametrize("seconds", [0.6, 1.0, 3.0, 10.0])
def test_suspended_processes_do_not_use_expired_slots(run: Run, seconds: float) -> None:
    """After waking up, and just before sending, an expired slot is returned and requested again."""
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
def test_trial_requests_during_a_long_429(run: Run, there: Delay, *, fixed: bool) -> None:
    """After the first burst, all processes send one trial request at a time, until one passes."""
    server = Server(fixed=fixed, closed_until=10.0)
    simulation = Simulation(run, server, there=there)
    four(simulation)
    simulation.until(lambda: len(server.counted) == 200)
    assert server.refused <= LIMIT + (10.0 - PERIOD) / 0.5
    assert server.counted[LIMIT - 5] <= server.counted[0] + 1.0  # the last few had just been refused
    assert server.counted[-1] <= 10.0 + 1.0 + 1.1 * (200 / LIMIT - 1) * PERIOD


@pytest.mark.parametrize("end", ["dies", "unsent", "unknown"])
def test_a_lost_trial_request(run: Run, end: str) -> None:
    """If its process reports it, the next trial starts at once; otherwise all follow a period later."""
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
    simulation.until(lambda: server.refused == LIMIT + 2)  # the first trial request is refused
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
    "foreign data": ["SET", "budget", "foreign"],
    "a list": ["EVAL", "redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[1], 1)", "1", "budget"],
}


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("moment", [0.5, 2.006, 2.0095, 3.9])
def test_lost_data_is_not_taken_for_a_new_key(run: Run, redis: RedisServer, loss: str, moment: float) -> None:
    """Sending is on hold until every process has reported its slots; idle processes notice it as well."""
    server = Server(fixed=False)
    simulation = Simulation(run, server)
    simulation.calls("a", 40)
    simulation.calls("idle", 0)
    simulation.calls("other", 1)
    simulation.at(moment, lambda: redis.command(*LOSS[loss]))
    simulation.at(moment + 0.001, partial(simulation.calls, "other", 40))
    if loss in {"flushed", "without a marker"}:  # it never used this key, but it knows that Redis had data
        simulation.processes["idle"].apply({"waiting": 0}, run(probe(simulation), 0.0), 0.0, 0.0)
        simulation._runs["idle"] = 1
        simulation.at(moment + 0.001, partial(simulation.calls, "idle", 20))
    simulation.until(lambda: sum(each.waiting for each in simulation.processes.values()) == 0)
    simulation.until(lambda: not any(each._open for each in simulation.processes.values()))
    assert 0 == server.refused


def probe(simulation: Simulation) -> Any:
    """Return the request of a new process."""
    request = simulation.processes["idle"].request(0.0)
    request.update(process="idle", sequence=0.5, runs=0)
    return request


def test_an_old_snapshot_is_restored(run: Run, redis: RedisServer) -> None:
    """The data is older than the last reply of a process, so sending is on hold."""
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
@example(seed=748948, late=0.3, most=4.25)  # an out-of-order count was taken for the later state
@example(seed=3480718092, late=0.05, most=2.0)
@given(seed=st.integers(0, 2**32), late=st.sampled_from([0.0, 0.05, 0.3]), most=st.floats(0.0, 5.0))
@pytest.mark.parametrize("fixed", [False, True], ids=["sliding", "fixed"])
def test_random_schedules(
    run: Run, redis: RedisServer, seed: int, late: float, most: float, *, fixed: bool
) -> None:
    """Late requests and responses, and processes that join or are suspended, never cause a 429."""
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
        if not late:  # a late request of a suspended process is not reported by anybody
            simulation.at(moment, partial(simulation.stop, name, 5 * dice.random()))
    simulation.at(10.1, lambda: None)
    simulation.until(
        lambda: simulation.now > 10 and not any(p.waiting for p in simulation.processes.values())
    )
    assert 0 == server.refused


def test_a_script_call_that_runs_late_changes_nothing(run: Run) -> None:
    """Redis hung, the process sent a new request on another connection, and then the first one runs."""
    budget = Budget(LIMIT, PERIOD)
    budget.waiting = 5
    late, asked = budget.request(0.0), budget.request(0.3)
    late.update(process="a", sequence=1, runs=0)
    asked.update(process="a", sequence=2, runs=0)
    budget.apply(asked, run(asked, 0.3), 0.3, 0.3)
    for _ in range(5):
        budget.take(0.3)
    with pytest.raises(TypeError):  # the script returns nothing
        run(late, 0.4)
    other = Budget(LIMIT, PERIOD).request(0.5)
    other.update(process="b", sequence=1, runs=0, waiting=LIMIT)
    assert LIMIT - 5 == run(other, 0.5).granted
