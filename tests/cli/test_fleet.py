"""``lemcal worker`` and ``lemcal fleet``, with a typical user module."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from postgres_server import HAS_POSTGRES

from lemcal_async.sandbox import Sandbox

from .conftest import Run, Spawn

APP = """
import json, os
from lemcal_async import AsyncLemcal
from lemcal_async.fleet import Fleet

KEYS = json.loads(os.environ["KEYS"])

async def key_of(user_id):
    return KEYS.get(user_id)

def on_change(change):
    with open("handled", "a") as file:
        file.write(change.meeting_id + "\\n")

lemcal = AsyncLemcal.for_accounts(base_url=os.environ["BASE_URL"])
fleet = Fleet("sqlite:///fleet.db", "memory://", credentials=key_of, on_change=on_change, lemcal=lemcal)
not_a_fleet = 5
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> str:
    """Change to a folder with a module that creates a fleet, and return the fleet's ``MODULE:NAME``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {account.user_id: account.api_key for account in sandbox.accounts}
    monkeypatch.setenv("KEYS", json.dumps(keys))
    monkeypatch.setenv("BASE_URL", sandbox.base_url)
    name = f"fleet_app_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(APP)
    return f"{name}:fleet"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_worker(app: str, lemcal: Run, spawn: Spawn, sandbox: Sandbox, backend: str) -> None:
    """A worker synchronizes the accounts, logs without keys to standard error, and exits on SIGTERM."""
    ids = [account.user_id for account in sandbox.accounts]
    assert "2 accounts added\n" == lemcal("fleet", "add", app, *ids, "--interval", "60").out
    worker = spawn("worker", app, "--concurrency", "2", "--backend", backend)
    expected = sum(len(sandbox.meetings(number)) for number in range(2))
    until = time.monotonic() + 60
    while not Path("handled").exists() or len(Path("handled").read_text().split()) < expected:
        assert time.monotonic() < until
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(timeout=60)
    assert 0 == worker.returncode
    assert "worker started, up to 2 concurrent accounts" in err
    assert sandbox.api_key not in err
    status = json.loads(lemcal("fleet", "status", app, "--json").out)
    assert (2, 0, 0) == (status["accounts"], status["undelivered"], status["running"])


def test_account_commands(app: str, lemcal: Run, sandbox: Sandbox) -> None:
    """Each command prints the number of accounts it changed, as text or JSON."""
    ids = [account.user_id for account in sandbox.accounts]
    assert {"added": 2} == json.loads(lemcal("fleet", "add", app, *ids, "--json").out)
    assert "1 account paused\n" == lemcal("fleet", "pause", app, ids[0]).out
    assert "1 account resumed\n" == lemcal("fleet", "resume", app, *ids).out
    assert "2 accounts woken\n" == lemcal("fleet", "wake", app, *ids).out
    table = lemcal("fleet", "status", app).out
    assert "Accounts" in table
    assert "Oldest undelivered" in table
    assert "1 account removed\n" == lemcal("fleet", "remove", app, ids[0]).out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not name a fleet; pass MODULE:NAME"),
        ("nowhere:fleet", "there is no module 'nowhere'"),
        ("{module}:not_a_fleet", "is of type int, not Fleet"),
        ("{module}:missing", "has no attribute 'missing'"),
    ],
)
def test_invalid_fleet_name(app: str, lemcal: Run, name: str, message: str) -> None:
    """One line explains why the name is invalid."""
    result = lemcal("fleet", "status", name.format(module=app.partition(":")[0]))
    assert 2 == result.status
    assert message in result.err
    assert 1 == result.err.count("\n")


@pytest.mark.skipif(not HAS_POSTGRES, reason="there is no wheel of a PostgreSQL server for this Python")
def test_example() -> None:
    """The example starts its own servers, and handles a booking immediately."""
    example = Path(__file__).parents[2] / "examples" / "fleet.py"
    result = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": "/tmp"},
    )
    assert 0 == result.returncode, result.stderr
    added, status, handled = result.stdout.splitlines()
    assert "5 accounts added" == added
    assert "undelivered=0" in status
    assert "s after it was booked" in handled
