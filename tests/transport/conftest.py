"""The wires that everything in here is tested on."""

from typing import TypeAlias

import pytest

from lemcal_async.transport import PooledTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

MakeWire: TypeAlias = type[PooledTransport] | type[HTTPX2Transport]


@pytest.fixture(params=[PooledTransport, HTTPX2Transport], ids=["httpx", "httpx2"])
def make_wire(request: pytest.FixtureRequest) -> MakeWire:
    """Run a test on each wire."""
    wire: MakeWire = request.param
    return wire
