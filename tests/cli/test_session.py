"""How a command finds the service and the credentials, and what it shows while it waits."""

import sys
from pathlib import Path

import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run


def accounts_file(folder: Path, sandbox: Sandbox, count: int) -> Path:
    """Write a file with the sandbox's first accounts."""
    file = folder / "accounts.toml"
    file.touch(mode=0o600)
    file.write_text(
        "".join(
            f'[[account]]\nname = "team{number}"\nuser_id = "{account.user_id}"\n'
            f'api_key = "{account.api_key}"\n'
            for number, account in enumerate(sandbox.accounts[:count], 1)
        )
    )
    return file


def test_the_sandbox_of_a_command(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--sandbox`` needs neither account nor network: a proxy of the environment is not used."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("LEMCAL_API_KEY", "of another service")
    done = lemcal("me", "--sandbox")
    assert (0, "") == (done.status, done.err)
    assert "host1@example.com" in done.out


def test_the_only_account_of_a_file(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """If the file has one account, no name is needed."""
    file = accounts_file(tmp_path, sandbox, 1)
    done = lemcal("me", "--accounts", str(file), "--base-url", sandbox.base_url)
    assert (0, True) == (done.status, "host1@example.com" in done.out)


def test_one_of_several_accounts(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """``--account`` selects one, and the file takes precedence over the environment."""
    file = accounts_file(tmp_path, sandbox, 2)
    done = lemcal("me", "--accounts", str(file), "--account", "team2", "--base-url", sandbox.base_url)
    assert (0, True) == (done.status, "host2@example.com" in done.out)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [([], "has several accounts"), (["--account", "sales"], "has no account 'sales'")],
)
def test_no_such_choice(lemcal: Run, sandbox: Sandbox, tmp_path: Path, argv: list[str], problem: str) -> None:
    """A missing or unknown name is an error that lists the names."""
    file = accounts_file(tmp_path, sandbox, 2)
    done = lemcal("me", "--accounts", str(file), *argv, "--base-url", sandbox.base_url)
    expected = f"lemcal: {file} {problem}; select one with --account: team1, team2\n"
    assert (2, expected) == (done.status, done.err)
    assert [] == sandbox.requests


def test_a_file_that_is_not_there(lemcal: Run, tmp_path: Path) -> None:
    """The error says what is wrong with the file."""
    file = tmp_path / "accounts.toml"
    done = lemcal("me", "--accounts", str(file))
    expected = f"lemcal: {file}: the accounts file cannot be read: No such file or directory\n"
    assert (2, expected) == (done.status, done.err)


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (60.0, False)])
def test_a_sign_of_life(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, *, delay: float, shown: bool
) -> None:
    """On a terminal, standard error shows what a longer wait is for."""
    monkeypatch.setattr("lemcal_async.cli._output.SPINNER_DELAY", delay)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    sandbox.inject(faults.slow(0.3))
    done = lemcal("me", "--json", "--base-url", sandbox.base_url)
    assert (0, True) == (done.status, done.out.startswith("{"))
    assert shown is ("Fetching the account" in done.err)
