"""A network that drops packets between a store and PostgreSQL: two connected namespaces."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import make_url

pytestmark = [
    pytest.mark.storm,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"),
        reason="making network namespaces takes root, and the command ip",
    ),
]

SERVER, CLIENT = "lemcal-server", "lemcal-client"
ADDRESS = "10.214.7.1"

FORWARD = """
import asyncio, sys

async def connected(reader, writer):
    theirs = await asyncio.open_unix_connection(sys.argv[1])
    async def pass_on(source, sink):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    await asyncio.gather(pass_on(reader, theirs[1]), pass_on(theirs[0], writer), return_exceptions=True)

async def main():
    server = await asyncio.start_server(connected, "0.0.0.0", 5432)
    print("listening", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

USE = """
import sys, time, anyio
from lemcal_async.errors import StoreError
from lemcal_async.sync import SQLStore

async def main():
    async with SQLStore(sys.argv[1]) as store:
        await store.record_failure("usr_1", "before")
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.monotonic()
        if sys.argv[2] == "cancel":
            with anyio.move_on_after(3) as scope:
                await store.revision("usr_1")
            assert scope.cancelled_caught
        else:
            try:
                await store.revision("usr_1")
            except StoreError as error:
                print(error, file=sys.stderr)
        print(time.monotonic() - started, flush=True)

anyio.run(main)
"""


@pytest.fixture
def namespaces(postgres: str) -> Iterator[str]:
    """Provide two connected namespaces, with the server behind the far one; yield its URL."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with ExitStack() as stack:
        for name in (SERVER, CLIENT):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip(
            "link",
            "add",
            "lemcal0",
            "netns",
            SERVER,
            "type",
            "veth",
            "peer",
            "name",
            "lemcal1",
            "netns",
            CLIENT,
        )
        for name, device, address in ((SERVER, "lemcal0", ADDRESS), (CLIENT, "lemcal1", "10.214.7.2")):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        socket = Path(str(make_url(postgres).query["host"])) / ".s.PGSQL.5432"
        command = ["ip", "netns", "exec", SERVER, sys.executable, "-c", FORWARD, str(socket)]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        assert "listening\n" == process.stdout.readline()
        yield f"postgresql://postgres@{ADDRESS}/postgres"


@pytest.mark.parametrize(("how", "longest"), [("cancel", 20.0), ("wait", 60.0)])
def test_dropped_packets(namespaces: str, how: str, longest: float) -> None:
    """A canceled caller continues promptly; others get an error after the connection's own timeouts."""
    command = ["ip", "netns", "exec", CLIENT, sys.executable, "-c", USE, namespaces, how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert "ready\n" == process.stdout.readline()
            subprocess.run(["ip", "-n", SERVER, "link", "set", "lemcal0", "down"], check=True)
            out, errors = process.communicate("go\n", timeout=120)
        finally:
            process.kill()
    assert float(out) < longest
    if how == "wait":
        assert f"postgresql://postgres@{ADDRESS}/postgres: " in errors
