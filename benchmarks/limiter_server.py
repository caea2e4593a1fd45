"""A sandbox in its own process, to keep its CPU out of the client's; one run after another."""

import contextlib
import multiprocessing
import random
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import attrs
import httpx
from starlette.types import Message, Receive, Scope, Send

from benchmarks.limiter_scenarios import LATE, LIMIT, PERIOD, SLOW, Arrival, Scenario
from lemcal_async.sandbox import Sandbox


@attrs.frozen
class Target:
    """The server's address and the credentials to use."""

    base_url: str
    user_id: str
    api_key: str = attrs.field(repr=False)


class _LateSandbox(Sandbox):
    """A sandbox that delays some requests, before or after counting them."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(
            limit=LIMIT, period=PERIOD, window=scenario.window, latency=scenario.latency, seed=seed
        )
        self._late = scenario.late
        self._slow = scenario.slow
        self._rng = random.Random(f"late {seed}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import anyio

        if self._rng.random() < self._late:
            await anyio.sleep(self._rng.uniform(*LATE))
        is_slow = self._rng.random() < self._slow

        async def send_slowly(message: Message) -> None:
            if is_slow and message["type"] == "http.response.start":
                await anyio.sleep(SLOW)
            await send(message)

        await super().__call__(scope, receive, send_slowly)


@contextlib.contextmanager
def _others(target: Target, rate: float, seed: int) -> Iterator[None]:
    """Send ``rate`` requests per second with the same key from a thread."""
    if not rate:
        yield
        return
    done = threading.Event()
    rng = random.Random(f"others {seed}")

    def send() -> None:
        auth = (target.user_id, target.api_key)
        with httpx.Client(auth=auth, base_url=target.base_url, trust_env=False) as http:
            while not done.wait(rng.uniform(0.5, 1.5) / rate):
                http.get("/me")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _serve(pipe: Connection) -> None:
    """Serve one sandbox for each scenario received, until the pipe is closed."""
    with contextlib.suppress(EOFError):
        while True:
            scenario, seed = pipe.recv()
            with _LateSandbox(scenario, seed).serve() as sandbox:
                target = Target(sandbox.base_url, sandbox.user_id, sandbox.api_key)
                with _others(target, scenario.others, seed):
                    pipe.send(target)
                    started = pipe.recv()
                # CLOCK_MONOTONIC is the same in all processes.
                pipe.send(
                    [_arrival(seen.at - started, seen.query, seen.status_code) for seen in sandbox.requests]
                )


def _arrival(at: float, query: str, status_code: int | None) -> Arrival:
    number = httpx.QueryParams(query).get("call")
    return Arrival(at, None if number is None else int(number), accepted=status_code != 429)


class SandboxProcess:
    """The client's end of the pipe."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs,), daemon=True).start()
        theirs.close()

    def start(self, scenario: Scenario, seed: int) -> Target:
        """Start a new sandbox."""
        self._pipe.send((scenario, seed))
        target: Target = self._pipe.recv()
        return target

    def stop(self, started: float) -> tuple[Arrival, ...]:
        """Stop the sandbox; return its requests, in seconds after ``started`` (``time.monotonic``)."""
        self._pipe.send(started)
        return tuple(self._pipe.recv())
