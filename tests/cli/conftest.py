"""Fixtures that run the command line against a sandbox, in this process or in a new one."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import attrs
import pytest

from lemcal_async.cli import main
from lemcal_async.sandbox import Sandbox


@attrs.frozen
class Result:
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def lemcal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command line in this process."""

    def run(*argv: str, stdin: str | TextIO = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        status = main(argv)
        out, err = capsys.readouterr()
        return Result(int(status), out, err)

    return run


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Return a function that starts the command line as a process, which is killed after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*argv: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "lemcal_async.cli", *argv],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """Serve a sandbox, and set the credentials of its first account in the environment."""
    with Sandbox(accounts=2).serve() as sandbox:
        set_credentials(sandbox, monkeypatch)
        yield sandbox


def set_credentials(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, api_key: str | None = None) -> None:
    """Set the sandbox's credentials in the environment."""
    monkeypatch.setitem(os.environ, "LEMCAL_USER_ID", sandbox.user_id)
    monkeypatch.setitem(os.environ, "LEMCAL_API_KEY", api_key or sandbox.api_key)
