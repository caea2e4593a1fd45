"""``lemcal sync``, ``lemcal changes`` and ``lemcal forget``."""

import json
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from lemcal_async.cli import main
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sync import Change, SQLStore, sync_meetings

from .conftest import Run, Spawn
from .test_session import accounts_file

ONE_LINE = re.compile(r"lemcal: [^\n]+\n")
COUNTS = ("accounts", "failed", "created", "changed", "canceled", "disappeared", "restored", "unchanged")

posix_only = pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals and pipes")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary working folder, and unset LEMCAL_DB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMCAL_DB", raising=False)
    return tmp_path


def counts(**other: int) -> dict[str, int]:
    """Return the counts of a report: one account, and zeros except for ``other``."""
    return {**dict.fromkeys(COUNTS, 0), "accounts": 1, **other}


def report(out: str) -> dict[str, int]:
    """Return the counts of a JSON report, which must be one line."""
    data: dict[str, Any] = json.loads(out)
    assert out.count("\n") == 1
    assert data.pop("seconds") >= 0
    return data


def test_sync_sandbox_twice(lemcal: Run, folder: Path) -> None:
    """``--sandbox`` needs no account, and a second run finds no changes."""
    result = lemcal("sync", "--sandbox")
    assert (0, "") == (result.status, result.err)
    heading, line = result.out.splitlines()
    assert [*map(str.capitalize, COUNTS), "Seconds"] == heading.split()
    assert [1, 0, 12, 0, 0, 0, 0, 0] == [int(number) for number in line.split()[:-1]]
    assert counts(unchanged=12) == report(lemcal("sync", "--sandbox", "--json").out)
    assert ["lemcal-sandbox.db"] == [file.name for file in folder.iterdir()]


def test_all_kinds_of_changes(lemcal: Run, sandbox: Sandbox, folder: Path) -> None:
    """Every kind of change is found, with the environment's account and the default database."""
    arguments = ("sync", "--json", "--base-url", sandbox.base_url)
    assert counts(created=12) == report(lemcal(*arguments).out)
    rows = [row for row in sandbox.meetings() if "canceledAt" not in row]
    sandbox.book()
    sandbox.edit(rows[0]["_id"], start="2026-03-02T09:00:00.000Z")
    sandbox.cancel(rows[1]["_id"])
    sandbox.remove(rows[2]["_id"])
    expected = counts(created=1, changed=1, canceled=1, disappeared=1, unchanged=9)
    assert expected == report(lemcal(*arguments).out)
    sandbox.book(**rows[2])
    assert counts(restored=1, unchanged=12) == report(lemcal(*arguments).out)

    lines = [json.loads(line) for line in lemcal("changes").out.splitlines()]
    assert lines == [json.loads(line) for line in lemcal("changes", "--json").out.splitlines()]
    assert ["created"] * 12 == [line["kind"] for line in lines[:12]]
    assert [
        (rows[0]["_id"], "changed", ["start"]),
        (rows[1]["_id"], "canceled", ["canceledAt"]),
        (rows[2]["_id"], "disappeared", []),
        (rows[2]["_id"], "restored", []),
    ] == [
        (line["meeting_id"], line["kind"], line["fields"]) for line in lines[12:] if line["kind"] != "created"
    ]
    assert {sandbox.user_id} == {line["user_id"] for line in lines}
    assert {None} == {line["delivered_at"] for line in lines}
    assert (folder / "lemcal.db").exists()


def test_accounts_file(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """An account with a wrong key fails without affecting others: status 1, and one line with its name."""
    file = accounts_file(tmp_path, sandbox, 2)
    arguments = ("sync", "--json", "--accounts", str(file), "--base-url", sandbox.base_url)
    assert counts(accounts=2, created=24) == report(lemcal(*arguments).out)
    file.write_text(file.read_text().replace(sandbox.accounts[1].api_key, "hush-hush"))
    result = lemcal(*arguments)
    assert (1, counts(accounts=2, failed=1, unchanged=12)) == (result.status, report(result.out))
    assert ONE_LINE.fullmatch(result.err)
    assert f"account team2 ({sandbox.accounts[1].user_id}): GET /meetings: 401" in result.err
    assert "hush" not in result.err
    with sqlite3.connect("lemcal.db") as connection:
        assert [(24,)] == connection.execute(
            "SELECT count(*) FROM meetings WHERE status <> 'disappeared'"
        ).fetchall()
    connection.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_accounts_from_pipe(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """The accounts file may be a pipe, as in ``--accounts <(decrypt accounts)``."""
    file = accounts_file(tmp_path, sandbox, 2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()), daemon=True)
    writer.start()
    result = lemcal("sync", "--json", "--accounts", str(pipe), "--base-url", sandbox.base_url)
    writer.join(5)
    assert counts(accounts=2, created=24) == report(result.out)


def test_unreadable_row(lemcal: Run, sandbox: Sandbox) -> None:
    """An unreadable row is a warning and status 3, but the account does not count as failed."""
    sandbox.inject(faults.json([{"name": "x"}, {"_id": "mee_1", "start": 5}]))
    result = lemcal("sync", "--json", "--base-url", sandbox.base_url)
    assert (3, counts(created=1)) == (result.status, report(result.out))
    assert ONE_LINE.fullmatch(result.err)
    assert f"warning: account {sandbox.user_id}: row 0 cannot be read: " in result.err


def test_changes_file(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """Each change is appended once, and a line truncated by a crash stays separate."""
    file = tmp_path / "changes.jsonl"
    file.write_text('{"cut": ')
    arguments = ("sync", "--base-url", sandbox.base_url, "--changes", str(file))
    assert 0 == lemcal(*arguments).status
    sandbox.cancel(sandbox.meetings()[0]["_id"])
    assert 0 == lemcal(*arguments).status
    cut, *lines = file.read_text().splitlines()
    assert '{"cut": ' == cut
    assert ["created"] * 12 + ["canceled"] == [json.loads(line)["kind"] for line in lines]
    assert sandbox.meetings()[0] == json.loads(lines[-1])["meeting"]
    assert "" == lemcal("changes", "--pending").out
    assert 13 == len(lemcal("changes").out.splitlines())


def test_changes_file_permissions(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """Only the owner can read a new file; an existing file keeps its mode."""
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    old.touch()
    old.chmod(0o640)
    for file in (new, old):
        lemcal("sync", "--base-url", sandbox.base_url, "--changes", str(file))
        sandbox.book()
    assert [0o600, 0o640] == [file.stat().st_mode & 0o777 for file in (new, old)]


@posix_only
@pytest.mark.parametrize("rotation", ["move", "move and create", "delete"])
def test_changes_file_rotation(spawn: Spawn, sandbox: Sandbox, tmp_path: Path, rotation: str) -> None:
    """If the file is moved or deleted while ``--watch`` runs, the next changes go to a new file."""
    file, moved = tmp_path / "changes.jsonl", tmp_path / "changes.jsonl.1"
    process = spawn("sync", "--watch", "0.05", "--base-url", sandbox.base_url, "--changes", str(file))
    assert process.stdout is not None
    for _ in range(2):  # the heading, and the first run
        assert process.stdout.readline()
    if rotation == "delete":
        file.unlink()
    else:
        file.rename(moved)
    if rotation == "move and create":
        file.touch(mode=0o640)
    booked = sandbox.book()["_id"]
    wait_until(lambda: file.exists() and booked in file.read_text())
    process.terminate()
    process.communicate(timeout=30)
    assert 1 == file.read_text().count("\n")
    assert (rotation == "delete") or 12 == moved.read_text().count("\n")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + 50  # below the test timeout, so that the traceback shows the caller
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_changes_file_on_full_disk(lemcal: Run, sandbox: Sandbox) -> None:
    """If the disk is full, the account fails, and its changes stay in the outbox for the next run."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = lemcal("sync", "--base-url", sandbox.base_url, "--changes", "/dev/full")
    assert 1 == result.status
    assert f"account {sandbox.user_id}: a change could not be delivered: " in result.err
    assert 12 == len(lemcal("changes", "--pending").out.splitlines())


def test_baseline(lemcal: Run, sandbox: Sandbox) -> None:
    """With ``--baseline``, existing meetings are not reported as changes."""
    arguments = ("sync", "--baseline", "--json", "--base-url", sandbox.base_url)
    assert counts(created=12) == report(lemcal(*arguments).out)
    assert "" == lemcal("changes").out
    sandbox.book()
    lemcal(*arguments)
    assert 1 == len(lemcal("changes").out.splitlines())


def test_database_from_environment(lemcal: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LEMCAL_DB overrides the default, and --db overrides LEMCAL_DB."""
    monkeypatch.setenv("LEMCAL_DB", "sqlite:///environment.db")
    lemcal("sync", "--sandbox")
    lemcal("sync", "--sandbox", "--db", "sqlite:///argument.db")
    assert ["argument.db", "environment.db"] == sorted(file.name for file in folder.iterdir())
    assert 12 == len(lemcal("changes").out.splitlines())


def test_forget(lemcal: Run, sandbox: Sandbox) -> None:
    """``forget`` asks for confirmation, then erases the account's data. An unknown account is status 5."""
    lemcal("sync", "--base-url", sandbox.base_url)
    for answer in ("", "\n", "no\n"):
        result = lemcal("forget", sandbox.user_id, stdin=answer)
        assert (2, "") == (result.status, result.out)
        question, refusal = result.err.splitlines()
        assert f"lemcal: erase all data of {sandbox.user_id}? This cannot be undone. [y/N]" == question
        assert "lemcal: nothing was erased; answer y, or pass --yes" == refusal
    assert 12 == len(lemcal("changes").out.splitlines())
    result = lemcal("forget", sandbox.user_id, stdin="y\n")
    expected = f"Erased 12 meetings and 12 changes of {sandbox.user_id}.\n"
    assert (0, expected) == (result.status, result.out)
    result = lemcal("forget", sandbox.user_id, "--yes", "--db", "sqlite:///lemcal.db")
    expected = f"lemcal: the database contains no data of {sandbox.user_id}\n"
    assert (5, "", expected) == (result.status, result.out, result.err)
    assert "" == lemcal("changes").out


def test_forget_by_name(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """An account can be given by its name in the accounts file, even if its key is no longer set."""
    file = accounts_file(tmp_path, sandbox, 2)
    lemcal("sync", "--accounts", str(file), "--base-url", sandbox.base_url)
    file.write_text(re.sub(r'api_key = ".*"', 'api_key_env = "GONE"', file.read_text()))
    result = lemcal("forget", "team2", "--accounts", str(file), stdin="y\n")
    user_id = sandbox.accounts[1].user_id
    expected = f"Erased 12 meetings and 12 changes of team2 ({user_id}).\n"
    assert (0, expected) == (result.status, result.out)
    assert {sandbox.user_id} == {json.loads(line)["user_id"] for line in lemcal("changes").out.splitlines()}


def test_changes_on_terminal(lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, the changes are a table, or a message if there are none."""
    lemcal("sync", "--base-url", sandbox.base_url)
    sandbox.edit(sandbox.meetings()[0]["_id"], start="2026-03-02T09:00:00.000Z", brandNew=1)
    lemcal("sync", "--base-url", sandbox.base_url)
    monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda _: True)
    monkeypatch.setenv("COLUMNS", "160")
    lines = lemcal("changes").out.splitlines()
    assert (1 + 13, True) == (len(lines), "brandNew, start" in lines[-1])
    assert "2026-03-02 09:00" in lines[-1]
    assert lemcal("changes", "--json").out.startswith("{")
    lemcal("forget", sandbox.user_id, "--yes")
    assert ("", "lemcal: no changes\n") == (lemcal("changes").out, lemcal("changes").err)


def test_progress(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, standard error shows a progress bar of the accounts."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    result = lemcal("sync", "--sandbox", "--json")
    assert (0, counts(created=12)) == (result.status, report(result.out))
    assert "1/1" in result.err


def test_parked_changes(lemcal: Run, sandbox: Sandbox) -> None:
    """A parked change is listed with its error, and is pending again after ``lemcal retry``."""

    def refuse(change: Change) -> None:
        if change.meeting_id == sandbox.meetings()[0]["_id"]:
            raise ValueError("no such customer")

    async def run() -> None:
        async with SQLStore("sqlite:///lemcal.db") as store, sandbox.client() as client:
            await sync_meetings([client], store, on_change=refuse, max_attempts=1)

    assert 0 == lemcal("sync", "--base-url", sandbox.base_url).status
    anyio.run(run)
    [line] = lemcal("changes", "--parked").out.splitlines()
    parked = json.loads(line)
    assert (sandbox.meetings()[0]["_id"], 1) == (parked["meeting_id"], parked["attempts"])
    assert "no such customer" in parked["error"]
    assert parked["parked_at"] > parked["found_at"]
    assert "" == lemcal("changes", "--pending").out
    assert 5 == lemcal("retry", "usr_other").status
    assert "1 parked change will be delivered again.\n" == lemcal("retry", sandbox.user_id).out
    assert "0 parked changes will be delivered again.\n" == lemcal("retry", sandbox.user_id).out
    assert "0 parked changes will be delivered again.\n" == lemcal("retry").out
    assert "" == lemcal("changes", "--parked").out
    assert parked["seq"] == json.loads(lemcal("changes", "--pending").out)["seq"]


@posix_only
def test_watch(spawn: Spawn, sandbox: Sandbox) -> None:
    """``--watch`` prints a line per run until Ctrl-C, which is status 130."""
    process = spawn("sync", "--watch", "0.05", "--json", "--base-url", sandbox.base_url)
    assert process.stdout is not None
    assert counts(created=12) == report(process.stdout.readline())
    assert counts(unchanged=12) == report(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert 130 == process.returncode


@posix_only
def test_watch_table(spawn: Spawn, sandbox: Sandbox, tmp_path: Path) -> None:
    """The table has one heading, then a line per run with its time and the number of accounts it skipped."""
    file = accounts_file(tmp_path, sandbox, 2)
    file.write_text(file.read_text().replace(sandbox.accounts[1].api_key, "wrong"))
    process = spawn("sync", "--watch", "0.5", "--accounts", str(file), "--base-url", sandbox.base_url)
    assert process.stdout is not None
    headings = process.stdout.readline().split()
    names = [name.capitalize() for name in COUNTS]
    assert ["Ended", "(UTC)", *names, "Seconds", "Skipped"] == headings

    def row() -> dict[str, str]:
        assert process.stdout is not None
        return dict(zip(["day", "time", *headings[2:]], process.stdout.readline().split(), strict=True))

    first = second = row()
    while second["Skipped"] == "0":  # on a slow machine, the failed account may be due again
        second = row()
    process.terminate()
    process.communicate(timeout=30)
    now = datetime.now(UTC)
    assert abs(datetime.fromisoformat(f"{first['day']}T{first['time']}+00:00") - now) < timedelta(minutes=5)
    assert ("2", "1", "0") == (first["Accounts"], first["Failed"], first["Skipped"])
    assert ("1", "0", "1") == (second["Accounts"], second["Failed"], second["Skipped"])


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (
            ["sync", "--db", "lemcal.db", "--sandbox"],
            2,
            "the database URL is invalid: use sqlite:",
        ),
        (["sync", "--db", "oracle://x", "--sandbox"], 2, "the database URL has an unsupported scheme"),
        (["sync", "--db", "sqlite:///no/such/x.db", "--sandbox"], 2, "unable to open database file"),
        (["sync", "--watch", "0", "--sandbox"], 2, "--watch must be a number of seconds above 0"),
        (["sync", "--changes", "no/such/file", "--sandbox"], 1, "no/such/file cannot be written"),
        (["sync", "--changes", ".", "--sandbox"], 1, ". cannot be written: Is a directory"),
        (["sync"], 2, "no credentials: set LEMCAL_USER_ID"),
        (["sync", "--sandbox", "--accounts", "x.toml"], 2, "omit --accounts"),
        (["sync", "--accounts", "none.toml"], 2, "the accounts file cannot be read"),
        (["sync", "--accounts", "others.toml"], 2, "other users can read the API keys in this file"),
        (["sync", "--accounts", "twice.toml"], 2, "has the same name as account 1"),
        (["sync", "--accounts", "broken.toml"], 2, "the accounts file is not valid TOML"),
        (["changes"], 2, "the file does not exist; check its name"),
        (["forget", "usr_1", "--yes", "--db", "sqlite:///none.db"], 2, "the file does not exist"),
        (["forget", "sales", "--yes"], 2, "'sales' is not a user id (usr_...)"),
        (["retry", "sales"], 2, "'sales' is not a user id (usr_...)"),
        (
            ["forget", "sales", "--yes", "--accounts", "one.toml"],
            2,
            "no account is named 'sales'; the names",
        ),
        (["forget"], 2, "Missing argument 'ACCOUNT'"),
    ],
)
def test_invalid_usage(lemcal: Run, folder: Path, argv: list[str], status: int, message: str) -> None:
    """The error is one line with its status, and no database is created or changed."""
    table = '[[account]]\nname = "a"\nuser_id = "usr_1"\napi_key = "k1"\n'
    files = {
        "one.toml": table,
        "others.toml": table,
        "twice.toml": table + table.replace("usr_1", "usr_2"),
        "broken.toml": "= =",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644 if name == "others.toml" else 0o600)
    result = lemcal(*argv)
    assert (status, "") == (result.status, result.out)
    assert ONE_LINE.fullmatch(result.err), result.err
    assert message in result.err
    assert sorted(files) == sorted(file.name for file in folder.iterdir())


def test_newer_schema(lemcal: Run) -> None:
    """A database of a newer version is status 2, and no request is sent."""
    lemcal("sync", "--sandbox")
    with sqlite3.connect("lemcal-sandbox.db") as connection:
        connection.execute("UPDATE lemcal_schema SET version = 99")
    connection.close()
    result = lemcal("sync", "--sandbox")
    assert (2, True) == (result.status, "its tables have version 99" in result.err)
    assert ONE_LINE.fullmatch(result.err)


def test_locked_database(lemcal: Run) -> None:
    """A locked database is status 2, and its data is intact."""
    lemcal("sync", "--sandbox")
    connection = sqlite3.connect("lemcal-sandbox.db")
    connection.execute("BEGIN IMMEDIATE")
    result = lemcal("sync", "--sandbox", "--db", "sqlite:///lemcal-sandbox.db?timeout=0.05")
    connection.close()
    assert 2 == result.status
    assert ONE_LINE.fullmatch(result.err)
    assert "sqlite:///lemcal-sandbox.db: database is locked; another program holds the lock" in result.err
    assert counts(unchanged=12) == report(lemcal("sync", "--sandbox", "--json").out)


def test_password_in_arguments(lemcal: Run) -> None:
    """A password in the database URL causes a warning that does not contain it."""
    result = lemcal("sync", "--sandbox", "--db", "postgresql://user:hush-hush@127.0.0.1:1/x")
    assert 2 == result.status
    warning, failure = result.err.splitlines()
    assert "put it in LEMCAL_DB" in warning
    assert "lemcal: postgresql://127.0.0.1:1/x: " in failure
    assert "refused; Is the server running on that host" in failure
    assert "hush" not in result.err
    assert 2 == lemcal("sync", "--sandbox", "--db", "mysql://[").status


@pytest.mark.parametrize("argv", [["sync", "--sandbox"], ["changes"], ["forget", "usr_1"]])
def test_missing_extra_sql(lemcal: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Without SQLAlchemy, one line names the extra to install."""
    import lemcal_async.sync

    monkeypatch.delitem(vars(lemcal_async.sync), "SQLStore", raising=False)
    monkeypatch.delitem(sys.modules, "lemcal_async.sync.sql", raising=False)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    result = lemcal(*argv)
    expected = "lemcal: SQLStore requires the extra sql: pip install 'lemcal-async[sql]'\n"
    assert (2, expected) == (result.status, result.err)


def test_other_missing_modules_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other import errors are not reported as a missing extra."""
    import lemcal_async.sync

    monkeypatch.delitem(vars(lemcal_async.sync), "SQLStore", raising=False)
    monkeypatch.setitem(sys.modules, "lemcal_async.sync.sql", None)
    with pytest.raises(ModuleNotFoundError):
        main(["changes"])
