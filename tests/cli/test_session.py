"""How a command selects the service and the credentials, and its spinner."""

import sys
from pathlib import Path

import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run


def accounts_file(folder: Path, sandbox: Sandbox, count: int) -> Path:
    """Write an accounts file with the sandbox's first ``count`` accounts."""
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


def test_sandbox_option(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--sandbox`` needs neither an account nor a network, and ignores proxy settings in the environment."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("LEMCAL_API_KEY", "of another service")
    result = lemcal("me", "--sandbox")
    assert (0, "") == (result.status, result.err)
    assert "host1@example.com" in result.out


def test_file_with_one_account(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """A file with a single account needs no ``--account``."""
    file = accounts_file(tmp_path, sandbox, 1)
    result = lemcal("me", "--accounts", str(file), "--base-url", sandbox.base_url)
    assert (0, True) == (result.status, "host1@example.com" in result.out)


def test_account_option(lemcal: Run, sandbox: Sandbox, tmp_path: Path) -> None:
    """``--account`` selects an account, and the file takes precedence over the environment."""
    file = accounts_file(tmp_path, sandbox, 2)
    result = lemcal("me", "--accounts", str(file), "--account", "team2", "--base-url", sandbox.base_url)
    assert (0, True) == (result.status, "host2@example.com" in result.out)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [([], "has several accounts"), (["--account", "sales"], "has no account 'sales'")],
)
def test_missing_or_unknown_account_name(
    lemcal: Run, sandbox: Sandbox, tmp_path: Path, argv: list[str], problem: str
) -> None:
    """A missing or unknown name is an error that lists the names."""
    file = accounts_file(tmp_path, sandbox, 2)
    result = lemcal("me", "--accounts", str(file), *argv, "--base-url", sandbox.base_url)
    expected = f"lemcal: {file} {problem}; select one with --account: team1, team2\n"
    assert (2, expected) == (result.status, result.err)
    assert [] == sandbox.requests


def test_missing_accounts_file(lemcal: Run, tmp_path: Path) -> None:
    """A missing accounts file is an error that names it."""
    file = tmp_path / "accounts.toml"
    result = lemcal("me", "--accounts", str(file))
    expected = f"lemcal: {file}: the accounts file cannot be read: No such file or directory\n"
    assert (2, expected) == (result.status, result.err)


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (60.0, False)])
def test_spinner(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, *, delay: float, shown: bool
) -> None:
    """On a terminal, standard error shows a spinner during a long wait."""
    monkeypatch.setattr("lemcal_async.cli._output.SPINNER_DELAY", delay)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    sandbox.inject(faults.slow(0.3))
    result = lemcal("me", "--json", "--base-url", sandbox.base_url)
    assert (0, True) == (result.status, result.out.startswith("{"))
    assert shown is ("Fetching the account" in result.err)
