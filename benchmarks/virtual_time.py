"""Virtual time, which advances only when every task waits, with a simulated network and server.

Minutes of traffic take a second of CPU, results depend on the seed alone, and computation takes no time.
Requests are counted by the sandbox's code; this module simulates latency and connections.
"""

import asyncio
import random
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any, TypeVar, TypeVarTuple, Unpack
from unittest import mock

import anyio
import httpx
from trio.testing import MockClock

from benchmarks.limiter_scenarios import LATE, LIMIT, PERIOD, SLOW, Arrival, Scenario
from lemcal_async.sandbox._ratelimit import COUNTERS, rate_limit_headers

EPOCH = 1_800_000_000.0  # the wall clock at virtual time 0
TICK = 1e-5  # seconds per iteration of the loop, so that a limiter that sleeps for 0 s makes progress
LOOPBACK = 0.001  # the round trip in seconds for scenarios without a latency
USER = (
    b'{"_id":"usr_x","email":"host@example.com","publicIdentifier":"host",'
    b'"createdAt":"2026-01-05T08:00:00.000Z"}'
)

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class _Clock:
    now = 0.0
    running = False


def install() -> None:
    """Patch the functions of ``time`` to follow the virtual loop while one is running.

    Call this once, before the limiters are imported: some keep references to the original functions.
    """
    real_monotonic, real_time = time.monotonic_ns, time.time_ns

    def monotonic_ns() -> int:
        return round(_Clock.now * 1e9) if _Clock.running else real_monotonic()

    def time_ns() -> int:
        return round((EPOCH + _Clock.now) * 1e9) if _Clock.running else real_time()

    mock.patch.multiple(
        time,
        monotonic=lambda: _Clock.now if _Clock.running else real_monotonic() / 1e9,
        monotonic_ns=monotonic_ns,
        time=lambda: EPOCH + _Clock.now if _Clock.running else real_time() / 1e9,
        time_ns=time_ns,
    ).start()


class _JumpingSelector(selectors.DefaultSelector):
    """A selector whose timeouts expire immediately."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a timeout, no timer is pending, and only another thread can wake the loop.
        found = super().select(None if timeout is None else 0)
        _Clock.now += TICK if found or timeout is None else max(timeout, TICK)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop in virtual time, like trio with ``MockClock``; starts at 0."""

    def __init__(self) -> None:
        super().__init__(_JumpingSelector())
        _Clock.now = 0.0
        _Clock.running = True

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return _Clock.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Args]], _T], *args: *_Args
    ) -> asyncio.Future[_T]:
        """Run the function synchronously: no virtual time may pass while a thread works."""
        del executor
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - passed on to the caller
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Close the loop and return to real time."""
        _Clock.running = False
        super().close()


def backend_options(backend: str) -> dict[str, Any]:
    """Return the ``backend_options`` of ``anyio.run`` for virtual time."""
    if backend == "trio":
        return {"clock": MockClock(autojump_threshold=0)}
    return {"loop_factory": VirtualLoop}


class SimulatedTransport(httpx.AsyncBaseTransport):
    """A network and the server behind it: latency, delays, slow connects, another client."""

    def __init__(
        self, scenario: Scenario, seed: int, clock: Callable[[], float] = anyio.current_time
    ) -> None:
        self._scenario = scenario
        self._clock = clock
        self._counter = COUNTERS[scenario.window](LIMIT, PERIOD, clock)
        self._rng = random.Random(f"{scenario.name} {seed}")
        self._idle = 0  # connections
        self._last_arrival = 0.0
        self.arrivals: list[Arrival] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Carry the request to the server and the response back."""
        if self._idle:
            self._idle -= 1
        else:
            await anyio.sleep(self._scenario.connect)
        if trace := request.extensions.get("trace"):  # as httpcore does
            started = {
                "request": SimpleNamespace(method=request.method.encode(), extensions=dict[str, object]())
            }
            await trace("http11.send_request_headers.started", started)
        travel = self._travel()
        is_late = self._rng.random() < self._scenario.late
        await anyio.sleep(travel + (self._rng.uniform(*LATE) if is_late else 0.0))
        number = request.url.params.get("call")
        status, headers = self._count(None if number is None else int(number))
        is_slow = self._rng.random() < self._scenario.slow
        await anyio.sleep(travel + (SLOW if is_slow else 0.0))
        self._idle += 1
        body = USER if request.url.path.endswith("/me") else b"[]"
        content = body if status == 200 else b"Too Many Requests"
        return httpx.Response(
            status, headers={**headers, "Content-Type": "application/json"}, content=content, request=request
        )

    async def send_others(self) -> None:
        """Send the other client's requests until canceled."""
        while True:
            # Jittered, so that they are never in step with the windows.
            await anyio.sleep(self._rng.uniform(0.5, 1.5) / self._scenario.others)
            self._count(None)

    def _travel(self) -> float:
        """Return the one-way latency in seconds."""
        low, high = self._scenario.latency
        if high:
            return self._rng.uniform(low, high) / 2
        # Loopback preserves order: requests arrive in the order they are sent.
        now = self._clock()
        self._last_arrival = max(
            now + self._rng.uniform(0.8, 1.2) * LOOPBACK / 2, self._last_arrival + LOOPBACK / 1000
        )
        return self._last_arrival - now

    def _count(self, call: int | None) -> tuple[int, dict[str, str]]:
        count = self._counter.count("key")
        self.arrivals.append(Arrival(count.at, call, count.allowed))
        return 200 if count.allowed else 429, rate_limit_headers(count, EPOCH + count.at)
