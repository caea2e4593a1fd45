"""The command in its own process: pipes, signals and imports."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from lemcal_async.cli import main
from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run, Spawn

posix_only = pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals and pipes")


def test_meetings(spawn: Spawn, sandbox: Sandbox) -> None:
    """The command fetches over a real socket, with credentials from its environment."""
    process = spawn("meetings", "--csv", "--base-url", sandbox.base_url)
    out, err = process.communicate(timeout=20)
    assert (0, 13, "") == (process.returncode, len(out.splitlines()), err)


@posix_only
def test_reader_closes_pipe(spawn: Spawn) -> None:
    """``lemcal meetings | head`` prints no error."""
    process = spawn("meetings", "--sandbox")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (141, "") == (process.wait(20), process.stderr.read())


@posix_only
def test_spinner_with_piped_output(tmp_path: Path, sandbox: Sandbox, lemcal: Run) -> None:
    """A spinner on standard error does not redirect standard output."""
    database = f"sqlite:///{tmp_path}/lemcal.db"
    assert 0 == lemcal("sync", "--json", "--db", database, "--base-url", sandbox.base_url).status
    terminal, stderr = os.openpty()
    slow_program = (
        "import sys, time; from lemcal_async.cli import _output as progress, _sync as changes, main\n"
        "progress.SPINNER_DELAY = 0\n"
        "line = changes.json_line; changes.json_line = lambda data: time.sleep(0.05) or line(data)\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", slow_program, "changes", "--db", database]
    environment = {**os.environ, "TERM": "xterm"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, env=environment, check=False, timeout=30
    )
    os.close(stderr)
    shown = os.read(terminal, 65_536)
    os.close(terminal)
    assert (0, 12) == (result.returncode, result.stdout.count(b"\n"))
    assert b"Reading the changes" in shown
    assert b"meeting_id" not in shown


@posix_only
def test_ctrl_c_during_a_call(spawn: Spawn, sandbox: Sandbox) -> None:
    """Ctrl-C ends a call immediately, with status 130 and without a message."""
    sandbox.inject(faults.slow(30))
    process = spawn("me", "--base-url", sandbox.base_url)
    deadline = time.monotonic() + 20
    while not sandbox.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert ("", "") == process.communicate(timeout=30)
    assert 130 == process.returncode


@posix_only
def test_sandbox_until_ctrl_c(lemcal: Run, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """``lemcal sandbox`` prints a complete block of lines to copy per account, and runs until Ctrl-C."""
    process = spawn("sandbox", "--accounts", "2", "--meetings", "30", "--no-limit", "--quiet")
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip("\n") for _ in range(10)]
    assert lines[-1].endswith("then try: lemcal me")
    for host, block in (("host1", lines[1:5]), ("host2", lines[5:9])):
        assert f"# {host}@example.com" == block[0]
        for line in block[1:]:
            name, value = line.removeprefix("export ").split("=")
            monkeypatch.setenv(name, value)
        assert f"{host}@example.com" in lemcal("me").out
    assert 30 == len(lemcal("meetings").out.splitlines()) - 1
    process.send_signal(signal.SIGINT)
    assert ("", "") == process.communicate(timeout=30)
    assert 130 == process.returncode


@pytest.mark.parametrize(("argv", "limit"), [([], "20"), (["--no-limit"], None)])
def test_sandbox_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], limit: str | None
) -> None:
    """By default: one account, a free port on loopback, and the service's rate limit."""
    seen: list[tuple[int, str | None]] = []

    def interrupted(_: float) -> None:
        lines = capsys.readouterr().out.splitlines()
        base_url = lines[4].partition("=")[2]
        response = httpx.get(f"{base_url}/me", trust_env=False)
        seen.append((len(lines), response.headers.get("x-ratelimit-limit")))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert 130 == main(["sandbox", *argv])
    assert [(6, limit)] == seen


def test_port_in_use(lemcal: Run, sandbox: Sandbox) -> None:
    """A port in use is a one-line error that names it."""
    port = sandbox.base_url.split(":")[2].split("/")[0]
    result = lemcal("sandbox", "--port", port)
    assert (2, "") == (result.status, result.out)
    assert result.err.startswith(f"lemcal: cannot listen on host 127.0.0.1, port {port}: ")
    assert 1 == result.err.count("\n")


@posix_only
def test_table_on_terminal(spawn: Spawn) -> None:
    """The table fits on a real terminal of 80 columns."""
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}
    process = spawn("types", "--sandbox", stdout=follower, env=environment)
    assert 0 == process.wait(20)
    os.close(follower)
    with os.fdopen(leader, "rb") as terminal:
        out = terminal.read1(65536).decode()
    assert 1 + 4 == out.count("\n")
    assert "Quarterly review" in out


def test_startup_imports_no_server() -> None:
    """Modules that only some commands need are not imported at startup."""
    code = (
        "import sys; from lemcal_async.cli import main; main(['--version']); "
        "print([name for name in ('starlette', 'uvicorn', 'lemcal_async.sandbox') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert "[]" == result.stdout.splitlines()[1]


@posix_only
def test_sandbox_log_lines(spawn: Spawn) -> None:
    """The sandbox prints a line per request and delivery, without tokens; ``--limit`` and ``--hook`` work."""
    target = "http://127.0.0.1:1/hook?token=hush"
    process = spawn("sandbox", "--hook", target, "--limit", "1", "--latency", "1-2", "--seed", "7")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    user_id, api_key, base_url = (line.partition("=")[2].strip() for line in lines[2:5])
    auth = (user_id, api_key)
    statuses = [httpx.get(f"{base_url}/me", auth=auth, trust_env=False).status_code for _ in range(2)]
    assert [200, 429] == statuses
    httpx.post(f"{base_url.removesuffix('/api/lemcal')}/_sandbox/bookings", trust_env=False)
    shown = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    assert ("", "") == process.communicate(timeout=30)
    assert re.fullmatch(r"\S+ GET    /me 200 \d+ ms  host1@example.com  0 of 1 left\n", shown[0])
    assert re.fullmatch(r"\S+ GET    /me 429 \d+ ms  host1@example.com  0 of 1 left\n", shown[1])
    assert re.fullmatch(
        r"\S+ HOOK   http://127.0.0.1:1/hook\?\.\.\. ConnectError \d+ ms  mee_\w+\n", shown[2]
    )


@pytest.mark.parametrize("latency", ["fast", "200-40", "-5", "40-", ""])
def test_invalid_latency(lemcal: Run, latency: str) -> None:
    """The error shows the expected format."""
    result = lemcal("sandbox", f"--latency={latency}")
    expected = "lemcal: --latency must be milliseconds, such as 50 or 40-200\n"
    assert (2, "", expected) == (result.status, result.out, result.err)
