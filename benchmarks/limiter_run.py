"""One run of one limiter in one scenario: a function from a job to its outcome, for a worker process."""

import contextlib
import functools
import gc
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
import attrs
import httpcore

from benchmarks import virtual_time
from benchmarks.limiter_peers import opened
from benchmarks.limiter_scenarios import LIMIT, PERIOD, Arrival, Backend, Figure, Job, Outcome, Scenario
from benchmarks.limiter_server import SandboxProcess, Target

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

FIRST = -1  # the number of the call before the others
GIVE_UP = 300.0  # seconds; the slowest takes 30


_phase = 0.0


def take_phase(phases: "Synchronized[int]", processes: int) -> None:
    """Have this process start its runs at a moment of the period of its own.

    So that the bursts of runs that go on side by side do not meet.
    """
    global _phase  # noqa: PLW0603 - there is one process to each
    with phases.get_lock():
        _phase = phases.value * PERIOD / processes
        phases.value += 1


@attrs.frozen
class _Run:
    started: float
    seconds: float
    cpu: float
    failed: int


def run(job: Job) -> Outcome:
    """Run ``job`` alone in this process."""
    logging.getLogger("lemcal_async").setLevel(logging.ERROR)
    gc.collect()
    if job.world == "virtual":
        options = virtual_time.backend_options(job.backend)
        return anyio.run(_in_virtual_time, job, backend=job.backend, backend_options=options)
    sandbox = _sandbox()
    _warm_up(job.limiter, job.backend)
    target = sandbox.start(job.scenario, job.seed)
    with _slow_connects(job.scenario.connect):
        taken = anyio.run(_on_sockets, job, target, backend=job.backend)
    return _outcome(job, taken, sandbox.stop(taken.started))


@functools.cache
def _sandbox() -> SandboxProcess:
    return SandboxProcess()


@functools.cache
def _warm_up(limiter: str, backend: Backend) -> None:
    """Make some calls, so that what is loaded at the first one is not measured."""
    scenario = Scenario("warm-up", "", Figure(), calls=LIMIT)
    sandbox = _sandbox()
    job = Job(scenario, limiter, backend, "sockets", 0)
    taken = anyio.run(_on_sockets, job, sandbox.start(scenario, 0), backend=backend)
    sandbox.stop(taken.started)


async def _on_sockets(job: Job, target: Target) -> _Run:
    async with opened(job.limiter, target, None) as call:
        await anyio.sleep((_phase - time.monotonic()) % PERIOD)
        return await _drive(job, call, time.monotonic)


async def _in_virtual_time(job: Job) -> Outcome:
    wire = virtual_time.SimulatedWire(job.scenario, job.seed)
    target = Target("http://127.0.0.1/api/lemcal", "usr_x", "secret")
    async with anyio.create_task_group() as others, opened(job.limiter, target, wire) as call:
        if job.scenario.others:
            others.start_soon(wire.send_others)
        taken = await _drive(job, call, anyio.current_time)
        others.cancel_scope.cancel()
    arrivals = tuple(attrs.evolve(arrival, at=arrival.at - taken.started) for arrival in wire.arrivals)
    return _outcome(job, taken, arrivals)


async def _drive(job: Job, call: Callable[[int], Awaitable[object]], clock: Callable[[], float]) -> _Run:
    """Make all calls at once."""
    failed = 0
    numbers = itertools.count()
    if job.scenario.others:
        # At any point of a window of theirs.
        await anyio.sleep(random.Random(f"phase {job.seed}").uniform(1, 2) * PERIOD)
        await call(FIRST)

    async def one() -> None:
        nonlocal failed
        number = next(numbers)  # in the order in which they ask: trio starts tasks in any order
        try:
            await call(number)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted, and shown
            failed += 1
            logging.getLogger(__name__).warning("%s: call %d: %r", job.limiter, number, error)

    started, cpu = clock(), time.process_time()
    with anyio.fail_after(GIVE_UP):
        async with anyio.create_task_group() as calls:
            for _ in range(job.scenario.calls):
                calls.start_soon(one)
    return _Run(started, clock() - started, time.process_time() - cpu, failed)


def _outcome(job: Job, taken: _Run, arrivals: tuple[Arrival, ...]) -> Outcome:
    return Outcome(job, taken.seconds, taken.cpu, taken.failed, arrivals)


@contextlib.contextmanager
def _slow_connects(seconds: float) -> Iterator[None]:
    """Have every TCP connection take so long: as a distant or busy host's does."""
    with contextlib.ExitStack() as patches:
        for backend in (httpcore.AnyIOBackend, httpcore.TrioBackend) if seconds else ():
            slow = _slowed(backend.connect_tcp, seconds)
            patches.enter_context(mock.patch.object(backend, "connect_tcp", slow))
        yield


def _slowed(connect: Callable[..., Awaitable[Any]], seconds: float) -> Callable[..., Awaitable[Any]]:
    async def slow(*args: Any, **kwargs: Any) -> Any:
        await anyio.sleep(seconds)
        return await connect(*args, **kwargs)

    return slow
