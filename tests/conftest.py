"""Fixtures for all tests: both event loops, no blocking calls, and no hypothesis deadline."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings

# A test must not fail because the machine is slow.
settings.register_profile("lemcal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# CI draws the same examples in every run; local runs draw new ones.
settings.register_profile("ci", settings.get_profile("lemcal"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "lemcal")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every async test on both backends."""
    return str(request.param)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail any test in which this package blocks the event loop.

    The sandbox may block it: it starts and stops inside a running loop, within milliseconds.
    """
    with blockbuster_ctx("lemcal_async", excluded_modules=["lemcal_async.sandbox"]) as blockbuster:
        # Coverage's tracers in worker threads contend for a lock.
        blockbuster.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", {"lock_data"})
        yield


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the developer's own credentials from the environment."""
    monkeypatch.delenv("LEMCAL_USER_ID", raising=False)
    monkeypatch.delenv("LEMCAL_API_KEY", raising=False)
    monkeypatch.delenv("LEMCAL_BASE_URL", raising=False)
