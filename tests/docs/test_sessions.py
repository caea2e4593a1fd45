"""The terminal sessions that the documentation shows are those of the real program.

A line that begins with ``$`` is a command. Each call of ``lemcal`` must be one that the program knows; those
that run on the sandbox are run, and print what is shown below them, where ``...`` stands for further lines.
"""

import re
import shlex
from pathlib import Path

import attrs
import pytest
import typer

from lemcal_async.cli import main
from lemcal_async.cli.app import app

from .conftest import PAGES, ROOT, blocks


@attrs.frozen
class Command:
    """A command of a session, and the lines that it is shown to print."""

    page: str
    line: str
    output: str

    @property
    def arguments(self) -> list[str]:
        """What stands behind the name of the program."""
        return shlex.split(self.line, comments=True)[1:]


def commands() -> list[Command]:
    """Return all commands of all sessions."""
    found: list[Command] = []
    for page in PAGES:
        for session in blocks(page, "console"):
            for shown in re.split(r"^\$ ", str(session.parsed), flags=re.MULTILINE)[1:]:
                line, _, output = shown.partition("\n")
                found.append(Command(str(page.relative_to(ROOT)), line, output.rstrip()))
    return found


OURS = [command for command in commands() if command.line.startswith("lemcal ")]


def test_there_are_sessions() -> None:
    """The pages show the program, and what it prints."""
    assert len(OURS) >= 3
    assert [] != [command for command in OURS if command.output]


@pytest.mark.parametrize("command", OURS, ids=str)
def test_the_program_knows_it(command: Command) -> None:
    """Every command and option that is shown exists."""
    known, arguments = typer.main.get_command(app), command.arguments
    context = known.make_context("lemcal", list(arguments))
    while isinstance(known, typer.core.TyperGroup):
        name, known, arguments = known.resolve_command(context, [*context._protected_args, *context.args])
        assert known is not None
        context = known.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("command", [command for command in OURS if "--sandbox" in command.line], ids=str)
def test_what_it_prints(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It succeeds, and prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    assert 0 == main(command.arguments)
    if command.output:
        shown = "(?s:.*)".join(map(re.escape, command.output.split("...")))
        assert re.fullmatch(shown, capsys.readouterr().out.rstrip())


def test_nothing_else_is_shown_as_output() -> None:
    """Only what is run here is shown with its output."""
    assert [] == [command for command in commands() if command.output and "--sandbox" not in command.line]
