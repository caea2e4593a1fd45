"""``lemcal worker`` and ``lemcal fleet``, on a module as users write it."""

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
    """Be in a folder with a module that makes a fleet; the value is its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {account.user_id: account.api_key for account in sandbox.accounts}
    monkeypatch.setenv("KEYS", json.dumps(keys))
    monkeypatch.setenv("BASE_URL", sandbox.base_url)
    name = f"fleet_app_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(APP)
    return f"{name}:fleet"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_worker(app: str, lemcal: Run, spawn: Spawn, sandbox: Sandbox, backend: str) -> None:
    """It synchronizes what is added, logs to standard error, shows no key, and ends well at SIGTERM."""
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
    assert "worker started, up to 2 accounts at once" in err
    assert sandbox.api_key not in err
    status = json.loads(lemcal("fleet", "status", app, "--json").out)
    assert (2, 0, 0) == (status["accounts"], status["undelivered"], status["running"])


def test_the_accounts_of_a_fleet(app: str, lemcal: Run, sandbox: Sandbox) -> None:
    """Each command says how many accounts it was about; a table for people, JSON for programs."""
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
def test_no_fleet(app: str, lemcal: Run, name: str, message: str) -> None:
    """One line says what is wrong."""
    done = lemcal("fleet", "status", name.format(module=app.partition(":")[0]))
    assert 2 == done.status
    assert message in done.err
    assert 1 == done.err.count("\n")


@pytest.mark.skipif(not HAS_POSTGRES, reason="there is no wheel of a PostgreSQL server for this Python")
def test_the_example() -> None:
    """A fleet on servers of its own, with one command: a booking is handled as it is made."""
    example = Path(__file__).parents[2] / "examples" / "fleet.py"
    done = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": "/tmp"},
    )
    assert 0 == done.returncode, done.stderr
    added, status, handled = done.stdout.splitlines()
    assert "5 accounts are added" == added
    assert "undelivered=0" in status
    assert "s after it was booked" in handled
