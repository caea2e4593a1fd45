"""Minutes of calls through a faulty proxy: only correct results and documented errors, and no leaks.

``nox -s storms -- soak`` runs for 5 minutes on each wire and backend, or for LEMCAL_SOAK_SECONDS.
"""

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import LemcalError, MeetingNotFoundError
from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.sandbox import Sandbox

from .conftest import MakeWire
from .faulty_proxy import FAULTS, FaultyProxy

pytestmark = pytest.mark.anyio

ACCOUNTS = 20
TASKS = 24


class Soak:
    """Concurrent calls of many accounts, and their outcomes."""

    def __init__(self, sandbox: Sandbox, lemcal: AsyncLemcal, seed: int) -> None:
        self.sandbox = sandbox
        self.random = random.Random(seed)
        self.accounts = [
            (number, lemcal.for_account(account.user_id, account.api_key))
            for number, account in enumerate(sandbox.accounts)
        ]
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.undocumented: list[str] = []

    async def run(self, seconds: float) -> None:
        """Make calls for this many seconds."""
        until = anyio.current_time() + seconds
        async with anyio.create_task_group() as tasks:
            for _ in range(TASKS):
                tasks.start_soon(self._call_until, until)

    async def _call_until(self, until: float) -> None:
        while anyio.current_time() < until:
            number, lemcal = self.random.choice(self.accounts)
            call = self.random.choice([self._me, self._meetings, self._types, self._meeting])
            deadline = self.random.choice([None, None, 0.3, 2.0])
            try:
                with anyio.move_on_after(self.random.choice([30, 30, 30, 0.02, 0.2])) as scope:
                    await call(number, lemcal.with_options(deadline=deadline))
                self.outcomes["canceled" if scope.cancelled_caught else "answered"] += 1
            except LemcalError as error:
                self.outcomes[type(error).__name__] += 1
            except Exception as error:  # noqa: BLE001  # undocumented errors are recorded
                self.undocumented.append(repr(error))

    async def _me(self, number: int, lemcal: AsyncLemcal) -> None:
        self._check((await lemcal.me()).id == self.sandbox.accounts[number].user_id, "me")

    async def _meetings(self, number: int, lemcal: AsyncLemcal) -> None:
        expected = [row["_id"] for row in self.sandbox.meetings(number)]
        self._check([meeting.id for meeting in await lemcal.meetings.list()] == expected, "meetings")

    async def _types(self, number: int, lemcal: AsyncLemcal) -> None:
        expected = [row["_id"] for row in self.sandbox.meeting_types(number)]
        self._check([kind.id for kind in await lemcal.meeting_types.list()] == expected, "types")

    async def _meeting(self, number: int, lemcal: AsyncLemcal) -> None:
        others = self.sandbox.meetings((number + 1) % ACCOUNTS)[0]["_id"]
        try:
            await lemcal.meetings.get(others)
        except MeetingNotFoundError:
            return
        self._check(False, "meeting")  # noqa: FBT003

    def _check(self, correct: bool, call: str) -> None:  # noqa: FBT001
        if not correct:
            self.wrong.append(call)


def open_files() -> int:
    """Return the number of open files and sockets of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def run_soak(make_wire: MakeWire, seconds: float, seed: int) -> tuple[Soak, FaultyProxy, int, int]:
    """Run a soak; return it with its proxy, the number of 429s, and the number of leaked files."""
    # Few meetings, so that calls are fast; the latency makes requests overlap.
    with Sandbox(accounts=ACCOUNTS, meetings=3, latency=(0.002, 0.01)).serve() as sandbox:
        port = int(sandbox.base_url.partition("127.0.0.1:")[2].partition("/")[0])
        with FaultyProxy(port, seed) as proxy:
            gc.collect()
            before = open_files()
            wire = make_wire()
            lemcal = AsyncLemcal.for_accounts(
                base_url=f"http://127.0.0.1:{proxy.port}/api/lemcal",
                transport=wire,
                limiter=LocalRateLimiter(),
                retry=RetryPolicy(attempts=3, backoff=0.05),
                timeout=1.0,
            )
            soak = Soak(sandbox, lemcal, seed)
            await soak.run(seconds)
            await wire.aclose()
            until = time.monotonic() + 10
            # The proxy's connections close, too.
            while open_files() > before + 5 and time.monotonic() < until:  # noqa: ASYNC110
                await anyio.sleep(0.1)
            leaked = max(0, open_files() - before - 5)
        refused = sum(request.status_code == 429 for request in list(sandbox.requests))
    return soak, proxy, refused, leaked


def table(soak: Soak, proxy: FaultyProxy, refused: int, leaked: int) -> str:
    """Return a table of the results."""
    rows = {
        "calls": sum(soak.outcomes.values()) + len(soak.undocumented),
        "faults": sum(proxy.faults.values()),
        "wrong results": len(soak.wrong),
        "undocumented errors": len(soak.undocumented),
        "429s": refused,
        "leaked files": leaked,
        **dict(soak.outcomes.most_common()),
    }
    return "\n".join(f"{name:<28}{count:>8}" for name, count in rows.items())


async def check(make_wire: MakeWire, seconds: float, seed: int, show: Callable[[str], object]) -> None:
    """Run a soak, and check its results."""
    result = await run_soak(make_wire, seconds, seed)
    show(table(*result))
    soak, proxy, refused, leaked = result
    assert proxy.faults
    assert [] == soak.wrong
    assert [] == soak.undocumented
    assert (0, 0) == (refused, leaked)
    assert soak.outcomes["answered"]


async def test_a_short_soak(make_wire: MakeWire) -> None:
    """One second, for the regular test suite."""
    await check(make_wire, 1, 1, print)


@pytest.mark.storm
@pytest.mark.timeout(900)
async def test_soak(make_wire: MakeWire) -> None:
    """Several minutes, with every kind of fault."""
    seconds = float(os.environ.get("LEMCAL_SOAK_SECONDS", "300"))
    faults: Counter[str] = Counter()
    soak: Awaitable[tuple[Soak, FaultyProxy, int, int]] = run_soak(make_wire, seconds, 2)
    result = await soak
    print(table(*result))  # noqa: T201  # what a soak is for
    assert ([], [], 0, 0) == (result[0].wrong, result[0].undocumented, result[2], result[3])
    faults.update(result[1].faults)
    assert FAULTS.keys() == faults.keys()
