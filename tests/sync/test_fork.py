"""A store that was opened before its process forked, such as by gunicorn's ``--preload``."""

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from .conftest import Database

FORK = """
import os, sys, anyio
from lemcal_async.sync import SQLStore

store = SQLStore(sys.argv[1])
anyio.run(store.record_failure, "usr_parent", "before")

async def work(name):
    for number in range(30):
        await store.record_failure(f"usr_{name}_{number}", "after")
        assert await store.revision("usr_parent") == 0

children = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        anyio.run(work, child, backend=sys.argv[2])
        os._exit(0)
    children.append(pid)
anyio.run(work, "parent", backend=sys.argv[2])
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
anyio.run(store.aclose)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_children_reconnect(database: Database, backend: str) -> None:
    """Parent and children continue to work, and none receives another's rows."""
    command = [sys.executable, "-W", "error", "-c", FORK, database.url, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ("[0, 0, 0]\n", "") == (done.stdout, done.stderr)
    assert [(1 + 4 * 30,)] == database.query("SELECT count(*) FROM accounts")


GUNICORN = """
import anyio, os
from lemcal_async.sync import SQLStore

store = SQLStore(os.environ["DB"])
anyio.run(store.open)

def application(environ, start_response):
    number = environ["PATH_INFO"].strip("/")
    anyio.run(store.record_failure, f"usr_{number}", "served")
    assert anyio.run(store.revision, f"usr_{number}") == 0
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]
"""


@pytest.mark.storm
def test_gunicorn_preload(database: Database, tmp_path: Path) -> None:
    """Four workers with a preloaded application: 400 requests, no failure."""
    (tmp_path / "served.py").write_text(GUNICORN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "4", "--bind", f"127.0.0.1:{port}"]
    responses: Counter[str] = Counter()

    def send_requests(client: int) -> None:
        for number in range(50):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{client}_{number}", timeout=30) as response:
                responses[response.read().decode()] += 1

    with subprocess.Popen(
        [*command, "served:application"],
        cwd=tmp_path,
        env={"DB": database.url, "PATH": ""},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for_server(port)
            threads = [threading.Thread(target=send_requests, args=(client,)) for client in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            process.terminate()
        _, log = process.communicate(timeout=30)
    assert 400 == responses.total(), log
    assert len(responses) > 1
    assert "Traceback" not in log
    assert [(400,)] == database.query("SELECT count(*) FROM accounts")


def wait_for_server(port: int) -> None:
    """Wait until a server listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server does not listen")
