"""What all tests share: both event loops, no blocking calls on them, a patient hypothesis."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings

# Machines are slow at times: a test may take long then, but must not fail for it.
settings.register_profile("lemcal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What decides whether a change may land draws the same examples each time; new ones are for those who look.
settings.register_profile("ci", settings.get_profile("lemcal"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "lemcal")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every async test on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail a test in which this package blocks the event loop.

    The sandbox may: it starts and stops inside a running loop, for milliseconds.
    """
    with blockbuster_ctx("lemcal_async", excluded_modules=["lemcal_async.sandbox"]) as blockbuster:
        # Coverage has a lock of its own, which its tracers in worker threads contend for.
        blockbuster.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", {"lock_data"})
        yield


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the credentials of whoever runs the tests out of them."""
    monkeypatch.delenv("LEMCAL_USER_ID", raising=False)
    monkeypatch.delenv("LEMCAL_API_KEY", raising=False)
    monkeypatch.delenv("LEMCAL_BASE_URL", raising=False)
