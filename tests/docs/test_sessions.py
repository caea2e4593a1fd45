"""The terminal sessions in the documentation match the real program.

A line that starts with ``$`` is a command. Every ``lemcal`` command must exist. Commands that use the sandbox
are run in order and must print the output shown below them, where ``...`` matches any text.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import attrs
import pytest
import typer

from lemcal_async.cli import main
from lemcal_async.cli._accounts import read_accounts
from lemcal_async.cli._app import app

from .conftest import PAGES, blocks


@attrs.frozen
class Command:
    """A command of a session and its expected output."""

    line: str
    output: str

    @property
    def arguments(self) -> list[str]:
        """The arguments after the program's name."""
        return shlex.split(self.line, comments=True)[1:]

    @property
    def is_lemcal(self) -> bool:
        """Whether the command is ``lemcal``."""
        return self.line.startswith("lemcal ")

    @property
    def is_run(self) -> bool:
        """Whether the test runs the command: it requires nothing but the sandbox."""
        return self.is_lemcal and "sandbox" in self.line


def commands(session: str) -> list[Command]:
    """Return the commands of a session."""
    parts = re.split(r"^\$ ", session, flags=re.MULTILINE)
    assert "" == parts[0], "a session must start with a command"
    return [
        Command(line, output.rstrip()) for line, _, output in (part.partition("\n") for part in parts[1:])
    ]


SESSIONS = {
    f"{page.name}:{block.line}": commands(str(block.parsed))
    for page in PAGES
    for block in blocks(page, "console")
}


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_commands_exist(session: list[Command]) -> None:
    """Every command and option exists, and only commands that are run have an expected output."""
    for command in session:
        assert command.is_run or not command.output
        if command.is_lemcal:
            known: Any = typer.main.get_command(app)
            context = known.make_context("lemcal", command.arguments)
            while hasattr(known, "resolve_command"):
                _, known, arguments = known.resolve_command(
                    context, [*context._protected_args, *context.args]
                )
                context = known.make_context(known.name, arguments, parent=context)


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_command_output(
    session: list[Command],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands succeed and print the output that the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMCAL_DB", raising=False)
    for command in session:
        if command.is_run:
            assert 0 == main(command.arguments)
            printed = capsys.readouterr().out.rstrip()
            shown = "(?s:.*)".join(map(re.escape, command.output.split("...")))
            assert not command.output or re.fullmatch(shown, printed), printed


def test_some_sessions_show_output() -> None:
    """At least four commands in the documentation have an expected output."""
    assert 4 <= sum(bool(command.output) for session in SESSIONS.values() for command in session)


def test_accounts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every accounts file in the documentation is valid."""
    monkeypatch.setenv("SALES_LEMCAL_KEY", "a-key")
    file = tmp_path / "accounts.toml"
    shown = [str(block.parsed) for page in PAGES for block in blocks(page, "toml")]
    assert shown
    for text in shown:
        file.write_text(text, encoding="utf-8")
        assert ["sales"] == [account.name for account in read_accounts(file)]
