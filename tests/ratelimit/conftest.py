"""Fixtures for event loops in virtual time: when all tasks wait, the clock jumps to the next deadline."""

import asyncio
import selectors
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis_server import RedisServer
from trio.testing import MockClock

from lemcal_async.ratelimit.redis import _budget


class _JumpingSelector(selectors.DefaultSelector):
    """A selector whose timeouts expire immediately."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a timeout, no timer is pending, and only another thread can wake the loop.
        found = super().select(None if timeout is None else 0)
        if not found and timeout is not None:
            self.now += max(0.0, timeout)
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """An asyncio loop in virtual time, like trio with ``MockClock``."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._jumping.now


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Run every async test on both backends, in virtual time; ``anyio.current_time`` is the clock."""
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": JumpingLoop}
    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Run a real Redis for the tests, on its own socket."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def lease_ttl(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets how many seconds a slot lasts without a reply of Redis, or a response."""

    def set_ttl(seconds: float) -> None:
        monkeypatch.setattr(_budget, "GRANT_TTL", seconds)
        monkeypatch.setattr(_budget, "LOST_AFTER", seconds)

    return set_ttl


@pytest.fixture
def redis(redis_server: RedisServer) -> RedisServer:
    """Return the server, empty and with its counters reset."""
    redis_server.command("FLUSHALL")
    redis_server.command("CONFIG", "RESETSTAT")
    return redis_server
