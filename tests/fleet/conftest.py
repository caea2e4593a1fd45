"""Fleets on each kind of queue and database, with the accounts of a sandbox server."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from redis_server import RedisServer
from sync.conftest import new_database, postgres  # noqa: F401  # a fixture

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.fleet import Fleet, FleetStatus
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """Run a Valkey server for the session."""
    with RedisServer(tcp=True) as server:
        yield server


@attrs.define
class FleetHarness:
    """The environment of a fleet: sandbox, servers, keys, and the changes its handler received."""

    sandbox: Sandbox
    lemcal: AsyncLemcal
    store: str
    queue: str
    handled: list[Change] = attrs.field(factory=list)
    keys: dict[str, str] = attrs.field(factory=dict)

    def fleet(self, **options: Any) -> Fleet:
        """Return a fleet, as each process would create one."""

        async def keep(change: Change) -> None:
            self.handled.append(change)

        async def key_of(user_id: str) -> str | None:
            return self.keys.get(user_id)

        options = {"on_change": keep, "credentials": key_of, "lemcal": self.lemcal, **options}
        return Fleet(self.store, self.queue, **{"interval": 3600, **options})

    @property
    def user_ids(self) -> list[str]:
        """The user ids of the sandbox's accounts."""
        return [account.user_id for account in self.sandbox.accounts]

    @asynccontextmanager
    async def working(self, fleet: Fleet, **options: Any) -> AsyncIterator[None]:
        """Run a worker for the length of the block."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: fleet.run(**options))
            yield
            tasks.cancel_scope.cancel()

    async def until(self, fleet: Fleet, reached: Callable[[FleetStatus], bool]) -> FleetStatus:
        """Poll the fleet's status until it satisfies ``reached``, and return it."""
        with anyio.fail_after(60):
            while not reached(status := await fleet.status()):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        return status

    async def until_handled(self, count: int) -> None:
        """Wait until ``count`` changes were handled."""
        with anyio.fail_after(60):
            while len(self.handled) < count:  # noqa: ASYNC110
                await anyio.sleep(0.01)


@pytest.fixture
async def create_harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    """Provide a factory: ``create_harness("memory")`` or ``create_harness("streaq")``."""
    clients: list[AsyncLemcal] = []
    with Sandbox(accounts=4, meetings=5, limit=None).serve() as sandbox:

        def create(kind: str) -> FleetHarness:
            if kind == "memory":
                store, queue = new_database("sqlite", tmp_path, request).url, "memory://"
            else:
                store = new_database("postgresql", tmp_path, request).url
                redis: RedisServer = request.getfixturevalue("redis")
                redis.command("FLUSHALL")
                queue = redis.tcp_url
            lemcal = sandbox.client(limiter=Unlimited(), retry=RetryPolicy(attempts=1))
            clients.append(lemcal)
            keys = {account.user_id: account.api_key for account in sandbox.accounts}
            return FleetHarness(sandbox, lemcal, store, queue, keys=keys)

        yield create
        for lemcal in clients:
            await lemcal.aclose()


@pytest.fixture(params=["memory", "streaq"])
def harness(create_harness: Any, request: pytest.FixtureRequest) -> FleetHarness:
    """Provide a harness with each kind of queue."""
    created: FleetHarness = create_harness(request.param)
    return created
