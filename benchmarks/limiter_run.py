"""One run of one limiter in one scenario, as a function for a worker process: job in, outcome out."""

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
from benchmarks.limiter_peers import open_caller
from benchmarks.limiter_scenarios import LIMIT, PERIOD, Arrival, Backend, Figure, Job, Outcome, Scenario
from benchmarks.limiter_server import SandboxProcess, Target

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

FIRST = -1  # the number of the call made before the burst
GIVE_UP = 300.0  # seconds; the slowest run takes 30


_phase = 0.0


def take_phase(phases: "Synchronized[int]", processes: int) -> None:
    """Give this process its own phase of the period, at which its runs start.

    This keeps the bursts of concurrent runs apart.
    """
    global _phase  # noqa: PLW0603 - one value per process
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
        result = anyio.run(_on_sockets, job, target, backend=job.backend)
    return _outcome(job, result, sandbox.stop(result.started))


@functools.cache
def _sandbox() -> SandboxProcess:
    return SandboxProcess()


@functools.cache
def _warm_up(limiter: str, backend: Backend) -> None:
    """Make some calls first, so that one-time costs are not measured."""
    scenario = Scenario("warm-up", "", Figure(), calls=LIMIT)
    sandbox = _sandbox()
    job = Job(scenario, limiter, backend, "sockets", 0)
    result = anyio.run(_on_sockets, job, sandbox.start(scenario, 0), backend=backend)
    sandbox.stop(result.started)


async def _on_sockets(job: Job, target: Target) -> _Run:
    async with open_caller(job.limiter, target, None) as call:
        await anyio.sleep((_phase - time.monotonic()) % PERIOD)
        return await _drive(job, call, time.monotonic)


async def _in_virtual_time(job: Job) -> Outcome:
    transport = virtual_time.SimulatedTransport(job.scenario, job.seed)
    target = Target("http://127.0.0.1/api/lemcal", "usr_x", "secret")
    async with anyio.create_task_group() as others, open_caller(job.limiter, target, transport) as call:
        if job.scenario.others:
            others.start_soon(transport.send_others)
        result = await _drive(job, call, anyio.current_time)
        others.cancel_scope.cancel()
    arrivals = tuple(attrs.evolve(arrival, at=arrival.at - result.started) for arrival in transport.arrivals)
    return _outcome(job, result, arrivals)


async def _drive(job: Job, call: Callable[[int], Awaitable[object]], clock: Callable[[], float]) -> _Run:
    """Start all calls at once and wait for them."""
    failed = 0
    numbers = itertools.count()
    if job.scenario.others:
        # Start at a random point of the other client's window.
        await anyio.sleep(random.Random(f"phase {job.seed}").uniform(1, 2) * PERIOD)
        await call(FIRST)

    async def one() -> None:
        nonlocal failed
        number = next(numbers)  # numbered in the order they start: trio starts tasks in any order
        try:
            await call(number)
        except Exception as error:  # noqa: BLE001 - counted, and logged
            failed += 1
            logging.getLogger(__name__).warning("%s: call %d: %r", job.limiter, number, error)

    started, cpu = clock(), time.process_time()
    with anyio.fail_after(GIVE_UP):
        async with anyio.create_task_group() as calls:
            for _ in range(job.scenario.calls):
                calls.start_soon(one)
    return _Run(started, clock() - started, time.process_time() - cpu, failed)


def _outcome(job: Job, result: _Run, arrivals: tuple[Arrival, ...]) -> Outcome:
    return Outcome(job, result.seconds, result.cpu, result.failed, arrivals)


@contextlib.contextmanager
def _slow_connects(seconds: float) -> Iterator[None]:
    """Delay every TCP connect by ``seconds``, like a distant or busy host."""
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
