"""The synchronization examples run and print the expected output."""

import subprocess
import sys
from pathlib import Path

import pytest

from lemcal_async.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def output(name: str) -> list[str]:
    """Run an example as a program and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout.splitlines()


def test_sync_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps of ``nox -s demo``: a first run, changes at the service, and a second run that finds them."""
    monkeypatch.setenv("LEMCAL_DB", f"sqlite:///{tmp_path}/demo.db")
    assert 0 == main(["sync", "--sandbox"])
    assert "12" == capsys.readouterr().out.splitlines()[1].split()[2]
    lines = output("sync_again.py")
    numbers = lines[lines.index(next(line for line in lines if line.startswith("Accounts"))) + 1]
    assert ["1", "0", "2", "1", "1", "1", "0", "9"] == numbers.split()[:-1]
    changes = [line for line in lines if line.startswith("  ")]
    assert ["canceled", "changed", "created", "created", "disappeared"] == sorted(
        change.split()[0] for change in changes
    )


def test_sync_crm() -> None:
    """The simulated CRM finally has every change, although it fails now and then."""
    *runs, contacts = output("sync_crm.py")
    assert any("the CRM does not respond" in line for line in runs)
    assert 36 == sum(int(line.split()[0]) for line in runs if "changes were delivered" in line)
    assert "30 booked, 6 lost" in contacts


def test_sync_watch() -> None:
    """The booking's webhook also reveals the cancellation."""
    kinds = [line.split()[0] for line in output("sync_watch.py")]
    assert (["created"] * 3, ["canceled", "created"]) == (kinds[:3], sorted(kinds[3:]))
