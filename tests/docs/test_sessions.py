"""The terminal sessions that the documentation shows are those of the real program.

A line that begins with ``$`` is a command. Each call of ``lemcal`` must be one that the program knows; those
that use the sandbox are run, in their order, and print what is shown below them, where ``...`` stands for
any more.
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
    """A command of a session, and the lines that it is shown to print."""

    line: str
    output: str

    @property
    def arguments(self) -> list[str]:
        """What stands behind the name of the program."""
        return shlex.split(self.line, comments=True)[1:]

    @property
    def is_ours(self) -> bool:
        """Whether it is a call of ``lemcal``."""
        return self.line.startswith("lemcal ")

    @property
    def is_run(self) -> bool:
        """Whether it needs nothing but the sandbox."""
        return self.is_ours and "sandbox" in self.line


def commands(session: str) -> list[Command]:
    """Return the commands of a session."""
    parts = re.split(r"^\$ ", session, flags=re.MULTILINE)
    assert "" == parts[0], "a session begins with a command"
    return [
        Command(line, output.rstrip()) for line, _, output in (part.partition("\n") for part in parts[1:])
    ]


SESSIONS = {
    f"{page.name}:{block.line}": commands(str(block.parsed))
    for page in PAGES
    for block in blocks(page, "console")
}


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_the_program_knows_the_commands(session: list[Command]) -> None:
    """Every command and option that is shown exists; nothing is shown as output that is not checked."""
    for command in session:
        assert command.is_run or not command.output
        if command.is_ours:
            known: Any = typer.main.get_command(app)
            context = known.make_context("lemcal", command.arguments)
            while hasattr(known, "resolve_command"):
                _, known, arguments = known.resolve_command(
                    context, [*context._protected_args, *context.args]
                )
                context = known.make_context(known.name, arguments, parent=context)


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_what_the_commands_print(
    session: list[Command],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They succeed, and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMCAL_DB", raising=False)
    for command in session:
        if command.is_run:
            assert 0 == main(command.arguments)
            printed = capsys.readouterr().out.rstrip()
            shown = "(?s:.*)".join(map(re.escape, command.output.split("...")))
            assert not command.output or re.fullmatch(shown, printed), printed


def test_there_is_output() -> None:
    """Some pages show what the program prints."""
    assert 4 <= sum(bool(command.output) for session in SESSIONS.values() for command in session)


def test_accounts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each accounts file that is shown can be read."""
    monkeypatch.setenv("SALES_LEMCAL_KEY", "a-key")
    file = tmp_path / "accounts.toml"
    shown = [str(block.parsed) for page in PAGES for block in blocks(page, "toml")]
    assert shown
    for text in shown:
        file.write_text(text, encoding="utf-8")
        assert ["sales"] == [account.name for account in read_accounts(file)]
