"""All commands share one set of exit statuses, for errors, signals and closed streams."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lemcal_async.cli._output import ExitStatus
from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run, Spawn, set_credentials

posix_only = pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals and streams")

ONE_CALL = ["me", "meetings", "types", "hooks create https://example.com/x --any", "hooks delete hoo_1"]
SERVICE = [*ONE_CALL, "sync"]
DATABASE = ["sync", "changes", "retry", "report", "forget usr_1 --yes"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary working folder, unset LEMCAL_DB, and retry without delay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMCAL_DB", raising=False)
    monkeypatch.setattr("lemcal_async._retry.backoff", lambda *_: 0.0)
    return tmp_path


@pytest.mark.parametrize("command", SERVICE)
def test_rejected_credentials(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The status is 4 if the service rejects the key."""
    set_credentials(sandbox, monkeypatch, api_key="wrong")
    result = lemcal(*command.split(), "--base-url", sandbox.base_url)
    assert ExitStatus.AUTHENTICATION == result.status, result.err


@pytest.mark.parametrize("command", SERVICE)
def test_failing_service(lemcal: Run, sandbox: Sandbox, command: str) -> None:
    """The status is 1 if the service returns an error."""
    sandbox.inject(faults.status(500), times=9)
    result = lemcal(*command.split(), "--base-url", sandbox.base_url)
    assert ExitStatus.FAILED == result.status, result.err


@pytest.mark.parametrize("command", SERVICE)
def test_unreachable_service(lemcal: Run, sandbox: Sandbox, command: str) -> None:  # sets credentials
    """The status is 1 if the service cannot be reached."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = lemcal(*command.split(), "--base-url", f"http://127.0.0.1:{port}")
    assert ExitStatus.FAILED == result.status, result.err


@pytest.mark.parametrize("command", SERVICE)
def test_missing_credentials(lemcal: Run, command: str) -> None:
    """The status is 2 without credentials."""
    assert ExitStatus.USAGE == lemcal(*command.split()).status


@pytest.mark.parametrize("command", ["meetings", "meetings --json", "types --csv", "sync"])
def test_unreadable_rows(lemcal: Run, sandbox: Sandbox, command: str) -> None:
    """The status is 3 if some rows cannot be read; the others are processed."""
    sandbox.inject(faults.json([{"name": "no id"}, {"_id": "met_1"}]))
    result = lemcal(*command.split(), "--base-url", sandbox.base_url)
    assert ExitStatus.UNREADABLE_ROWS == result.status, result.err
    assert 1 == result.err.count("warning: ")


@pytest.mark.parametrize("command", ["hooks delete hoo_1", "forget usr_1 --yes", "retry usr_1"])
def test_not_found(lemcal: Run, sandbox: Sandbox, command: str) -> None:
    """The status is 5 if the hook or the account does not exist."""
    if not command.startswith("hooks"):
        lemcal("sync", "--base-url", sandbox.base_url)
        result = lemcal(*command.split())
    else:
        result = lemcal(*command.split(), "--base-url", sandbox.base_url)
    assert ExitStatus.NOT_FOUND == result.status, result.err


@pytest.mark.parametrize("command", DATABASE)
@pytest.mark.parametrize("problem", ["missing folder", "junk", "refused", "unknown dialect"])
def test_unusable_database(lemcal: Run, sandbox: Sandbox, folder: Path, problem: str, command: str) -> None:
    """The status is 2 if the database is unusable. The message is one line, and no request is sent."""
    (folder / "junk.db").write_bytes(b"not a database, but long enough to be checked " * 50)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = {
        "missing folder": "sqlite:///no/such/folder/x.db",
        "junk": "sqlite:///junk.db",
        "refused": f"postgresql://127.0.0.1:{port}/x",
        "unknown dialect": "oracle://x",
    }[problem]
    service = ["--base-url", sandbox.base_url] if command == "sync" else []
    result = lemcal(*command.split(), "--db", url, *service)
    assert (ExitStatus.USAGE, "", 1) == (result.status, result.out, result.err.count("\n"))
    assert [] == sandbox.requests


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("sync", ExitStatus.USAGE),
        ("retry", ExitStatus.USAGE),
        ("changes", ExitStatus.OK),
        ("report", ExitStatus.OK),
    ],
)
def test_locked_database(lemcal: Run, sandbox: Sandbox, command: str, status: ExitStatus) -> None:
    """While another program writes to the database, only commands that read it succeed."""
    lemcal("sync", "--base-url", sandbox.base_url)
    connection = sqlite3.connect("lemcal.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    service = ["--base-url", sandbox.base_url] if command == "sync" else []
    result = lemcal(command, "--db", "sqlite:///lemcal.db?timeout=0.05", *service)
    connection.close()
    assert status == result.status, result.err
    if command == "changes":
        assert (12, "") == (len(result.out.splitlines()), result.err)


def test_all_accounts_fail_for_the_same_reason(lemcal: Run, sandbox: Sandbox, folder: Path) -> None:
    """If all accounts fail for the same reason, the status is that of the reason, otherwise 1."""
    file = folder / "accounts.toml"
    file.touch(mode=0o600)

    def sync(*keys: str) -> int:
        tables = (
            f'[[account]]\nname = "{index}"\nuser_id = "{account.user_id}"\napi_key = "{key}"\n'
            for index, (account, key) in enumerate(zip(sandbox.accounts, keys, strict=True))
        )
        file.write_text("".join(tables))
        return lemcal("sync", "--accounts", str(file), "--base-url", sandbox.base_url).status

    right = [account.api_key for account in sandbox.accounts]
    assert ExitStatus.OK == sync(*right)
    assert ExitStatus.FAILED == sync(right[0], "wrong")
    assert ExitStatus.AUTHENTICATION == sync("wrong", "wrong")


def wait_for_request(sandbox: Sandbox) -> None:
    """Return once the sandbox has seen a request."""
    deadline = time.monotonic() + 30
    while not sandbox.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@posix_only
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(spawn: Spawn, sandbox: Sandbox, number: signal.Signals, status: int) -> None:
    """Ctrl-C and SIGTERM end a running call without a message."""
    sandbox.inject(faults.slow(60))
    process = spawn("me", "--base-url", sandbox.base_url)
    wait_for_request(sandbox)
    process.send_signal(number)
    assert ("", "") == process.communicate(timeout=30)
    assert status == process.returncode


@posix_only
@pytest.mark.parametrize("command", ["sync --sandbox --watch 60", "sandbox --quiet"])
def test_sigterm_of_long_running_command(spawn: Spawn, command: str) -> None:
    """SIGTERM ends a long-running command, even one that ignores SIGINT, as background jobs do."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    for preexec_fn in (None, ignore):
        process = spawn(*command.split(), preexec_fn=preexec_fn)
        assert process.stdout is not None
        assert process.stdout.readline()
        if preexec_fn is not None:
            process.send_signal(signal.SIGINT)  # ignored
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert (143, "") == (process.returncode, err)


def has_namespaces() -> bool:
    """Whether this process may create a PID namespace."""
    command = ["unshare", "--map-root-user", "--pid", "--fork", "true"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    )


@posix_only
@pytest.mark.parametrize("command", ["sync --sandbox --watch 60", "sandbox --quiet"])
def test_sigterm_with_pid_1(command: str) -> None:
    """SIGTERM also ends PID 1 of a container, which ignores it by default."""
    if not has_namespaces():
        pytest.skip("`unshare --pid` is not available or not permitted")
    program = [sys.executable, "-m", "lemcal_async.cli", *command.split()]
    wrapper = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", *program]
    process = subprocess.Popen(wrapper, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert (143, "") == (process.returncode, err)
    finally:
        process.kill()
        process.communicate()


@posix_only
@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("sync --sandbox --json", ">&-"),
        ("sync --sandbox --json", "2>&-"),
        ("sync --sandbox --json", ">&- 2>&- <&-"),
        ("hooks create - --any --sandbox", "<&-"),
        ("nonsense", "2>&-"),
    ],
)
def test_closed_standard_streams(folder: Path, command: str, closed: str) -> None:
    """A closed stream is ignored, and the database file does not take its descriptor."""
    line = f"{sys.executable} -m lemcal_async.cli {command} {closed}"
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (0 if command.startswith("sync") else 2) == result.returncode
    assert "Traceback" not in result.stderr
    assert (command.startswith("sync") and closed == "2>&-") is bool(result.stdout)
    if command.startswith("sync"):
        with sqlite3.connect(folder / "lemcal-sandbox.db") as connection:
            assert [(12,)] == connection.execute("SELECT count(*) FROM meetings").fetchall()
        connection.close()


@posix_only
@pytest.mark.parametrize(
    ("command", "end"),
    [("--help", "full"), ("sandbox --help", "full"), ("meetings --sandbox", "full"), ("--help", "closed")],
)
def test_unwritable_output(spawn: Spawn, end: str, command: str) -> None:
    """A full disk is a one-line error and status 1, a closed pipe only status 141, even for help."""
    full = Path("/dev/full")
    if end == "full" and not full.exists():
        pytest.skip("this system has no /dev/full")
    if end == "full":
        with full.open("w") as target:
            process = spawn(*command.split(), stdout=target)
        _, err = process.communicate(timeout=60)
        expected = "lemcal: the output cannot be written: No space left on device\n"
        assert (1, expected) == (process.returncode, err)
        return
    reader, writer = os.pipe()
    os.close(reader)
    process = spawn(*command.split(), stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (141, "") == (process.returncode, err)


@posix_only
def test_unwritable_standard_error(spawn: Spawn) -> None:
    """If standard error is not writable, the exit status is still correct."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as target:
        process = spawn("me", stderr=target)
    process.communicate(timeout=60)
    assert 2 == process.returncode
