"""The wires that every test in this folder runs on."""

from typing import TypeAlias

import pytest

from lemcal_async.transport import PooledTransport
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

MakeWire: TypeAlias = type[PooledTransport] | type[HTTPX2Transport] | type[AiohttpTransport]
WIRES: dict[str, MakeWire] = {
    "httpx": PooledTransport,
    "httpx2": HTTPX2Transport,
    "aiohttp": AiohttpTransport,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deselect aiohttp on trio: aiohttp runs on asyncio only."""
    items[:] = [item for item in items if not _is_aiohttp_on_trio(item)]


def _is_aiohttp_on_trio(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    params: dict[str, object] = {} if callspec is None else callspec.params
    return (params.get("make_wire"), params.get("anyio_backend")) == ("aiohttp", "trio")


@pytest.fixture(params=WIRES)
def make_wire(request: pytest.FixtureRequest) -> MakeWire:
    """Run a test on each wire."""
    return WIRES[request.param]
