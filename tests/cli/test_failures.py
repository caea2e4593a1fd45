"""An error is one line on standard error, without secrets, and an exit status."""

import importlib
import io
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from lemcal_async import AsyncLemcal, __version__, errors
from lemcal_async._urls import without_secrets
from lemcal_async.cli import main
from lemcal_async.cli._output import HELP, ExitStatus
from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run, set_credentials

ONE_LINE = re.compile(r"lemcal: [^\n]+\n")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (faults.status(500), ExitStatus.FAILED),
        (faults.status(402), ExitStatus.FAILED),
        (faults.status(403), ExitStatus.FAILED),
        (faults.html_200(), ExitStatus.FAILED),
        (faults.too_many_requests(retry_after="3600"), ExitStatus.FAILED),
        (faults.status(403, "User linked to this API key is blocked"), ExitStatus.AUTHENTICATION),
        (faults.status(404), ExitStatus.NOT_FOUND),
    ],
)
def test_error_responses(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, fault: faults.Fault, status: ExitStatus
) -> None:
    """An error response is a line that names the call, and the exit status of its kind of error."""
    monkeypatch.setattr("lemcal_async._retry.backoff", lambda *_: 0.0)
    sandbox.inject(fault, times=5)
    result = lemcal("meetings", "--base-url", sandbox.base_url)
    assert (status, "") == (result.status, result.out)
    assert ONE_LINE.fullmatch(result.err)
    assert "GET /meetings" in result.err


def test_rejected_key(lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected credentials are status 4, and the message does not contain them."""
    set_credentials(sandbox, monkeypatch, api_key="hush-hush-hush")
    result = lemcal("me", "--base-url", sandbox.base_url)
    assert 4 == result.status
    assert ONE_LINE.fullmatch(result.err)
    assert "hush" not in result.err


def test_server_message_is_one_line(lemcal: Run, sandbox: Sandbox) -> None:
    """Line breaks and control characters in the server's message do not reach the terminal."""
    sandbox.inject(faults.status(400, "first\nsecond \x1b[2Jthird"))
    result = lemcal("me", "--base-url", sandbox.base_url)
    assert 1 == result.status
    assert ONE_LINE.fullmatch(result.err)
    assert "\x1b" not in result.err


def test_unreachable_service(lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable service is status 1."""
    monkeypatch.setattr("lemcal_async._retry.backoff", lambda *_: 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = lemcal("me", "--base-url", f"http://127.0.0.1:{port}")
    assert 1 == result.status
    assert ONE_LINE.fullmatch(result.err)


def test_no_credentials(lemcal: Run) -> None:
    """Without credentials, the error lists the ways to provide them."""
    result = lemcal("me")
    expected = (
        "lemcal: no credentials: set LEMCAL_USER_ID and LEMCAL_API_KEY, pass a file with --accounts, "
        "or try --sandbox\n"
    )
    assert (2, "", expected) == (result.status, result.out, result.err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing command; see: lemcal --help"),
        (["hooks"], "Missing command; see: lemcal hooks --help"),
        (["me", "--jsonn"], "No such option"),
        (["me", "--api-key=hush"], "No such option"),
        (["sandbox", "--port", "70000"], "Invalid value for '--port'"),
        (["trigger", "nothing"], "Invalid value for 'ACTION': 'nothing' is not one of"),
        (
            ["meetings", "--sandbox", "--json", "--csv"],
            "--json and --csv are mutually exclusive; pass only one",
        ),
        (["types", "--sandbox", "--json", "--csv"], "--json and --csv are mutually exclusive; pass only one"),
        (
            ["me", "--sandbox", "--base-url", "http://[::1]"],
            "--sandbox provides its own service and account",
        ),
        (["me", "--sandbox", "--accounts", "x.toml"], "service and account; omit --accounts\n"),
        (["meetings", "--sandbox", "--account", "y"], "service and account; omit --account\n"),
        (
            ["meetings", "--sandbox", "--account", "y", "--accounts", "x.toml"],
            "service and account; omit --accounts and --account\n",
        ),
        (
            ["me", "--account", "sales"],
            "--account requires a file; add --accounts FILE",
        ),
        (
            ["me", "--base-url", "http://api.example.com"],
            "the base URL is plain http, which would send the API",
        ),
        (
            ["me", "--base-url", "https://u:hush@example.com"],
            "--base-url must not contain credentials; pass them separately\n",
        ),
        (["me", "--base-url", "hush"], "--base-url must be an absolute http(s) URL"),
        (["me", "--base-url", ""], "--base-url must be an absolute http(s) URL"),  # no fallback
        (["meetings", "--sandbox", "--type", "a/b"], "--type is not an id: 'a/b'"),
        (["meetings", "--sandbox", "--type", ""], "--type must be a non-empty string"),
        (["hooks", "create", "http://x.org", "--type", "..", "--sandbox"], "--type is not an id: '..'"),
        (["hooks", "delete", "a/b", "--sandbox"], "HOOK_ID is not an id: 'a/b'"),
        (["meetings", "--sandbox", "--guest", ""], "--guest must be an e-mail address"),
        (["meetings", "--sandbox", "--guest", "Ada <ada@example.org>"], "--guest must be an e-mail address"),
        (["meetings", "--sandbox", "--from", "0001-01-01T00:00+12:00"], "--from must be a date or a time"),
    ],
)
def test_invalid_usage(lemcal: Run, argv: list[str], message: str) -> None:
    """Invalid usage is status 2 and a line that says what to do, before any request is sent."""
    result = lemcal(*argv)
    assert (2, "") == (result.status, result.out)
    assert ONE_LINE.fullmatch(result.err)
    assert message in result.err
    assert "hush" not in result.err


def test_invalid_base_url_variable(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable that contains the invalid URL."""
    for name, value in (("USER_ID", "usr_1"), ("API_KEY", "hush"), ("BASE_URL", "nonsense")):
        monkeypatch.setenv(f"LEMCAL_{name}", value)
    result = lemcal("me")
    assert (2, True) == (result.status, result.err.startswith("lemcal: LEMCAL_BASE_URL must be an absolute"))


def test_wrong_path(lemcal: Run, sandbox: Sandbox) -> None:
    """The advice names no Python parameter."""
    result = lemcal("me", "--base-url", sandbox.url)
    assert (1, True) == (result.status, "Check the base URL and the path." in result.err)
    assert "base_url" not in result.err


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, typer.Abort])
def test_interrupt(lemcal: Run, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]) -> None:
    """Ctrl-C is status 130 without a message, even if Typer converts it to Abort."""

    async def interrupted(_: AsyncLemcal) -> None:
        raise interrupt

    monkeypatch.setattr(AsyncLemcal, "me", interrupted)
    result = lemcal("me", "--sandbox")
    assert (130, "", "") == (result.status, result.out, result.err.strip())


def test_interrupt_during_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the imports prints no traceback."""

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lemcal_async.cli._app.run", interrupted)
    assert 130 == main(["me"])


def test_bugs_are_not_hidden(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unexpected exceptions propagate."""
    monkeypatch.setattr("lemcal_async.cli._calls.Service", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lemcal("me")


def test_unwritable_output(
    lemcal: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is a one-line error and status 1."""
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    with device.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["--version"])
        monkeypatch.undo()
    assert (1, True) == (status, "lemcal: the output cannot be written: " in capsys.readouterr().err)


def test_closed_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed pipe is a status without a message, and Python does not write to it again at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        status = main(["--version"])
        monkeypatch.undo()
    assert (141, "") == (status, capsys.readouterr().err)


def test_replaced_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller of ``main`` may have replaced standard output with any text stream."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert 0 == main(["--version"])
    assert f"lemcal-async {__version__}\n" == stream.getvalue()


def test_missing_extra_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Typer, one line names the extra to install."""
    monkeypatch.delitem(sys.modules, "lemcal_async.cli._app")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert 2 == main(["me"])
    expected = "lemcal: the command line requires the extra cli: pip install 'lemcal-async[cli]'\n"
    assert expected == capsys.readouterr().err


@pytest.mark.parametrize("argv", [["me", "--sandbox"], ["sandbox"]])
def test_missing_extra_sandbox(lemcal: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Without uvicorn, one line names the extra to install."""
    for name in [name for name in sys.modules if name.startswith("lemcal_async.sandbox")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = lemcal(*argv)
    expected = "lemcal: the sandbox requires the extra sandbox: pip install 'lemcal-async[sandbox]'\n"
    assert (2, expected) == (result.status, result.err)


def test_other_missing_modules_are_bugs(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other import errors are not reported as a missing extra."""
    monkeypatch.setitem(sys.modules, "lemcal_async.sandbox", None)
    with pytest.raises(ModuleNotFoundError):
        lemcal("me", "--sandbox")


def test_help_explains_every_status(lemcal: Run) -> None:
    """``lemcal --help`` has a line for each exit status."""
    result = lemcal("--help")
    assert (0, "") == (result.status, result.err)
    explained = [int(number) for number in re.findall(r"^ +(\d+)  ", result.out, re.MULTILINE)]
    assert sorted(ExitStatus) == explained
    assert explained == [int(number) for number in re.findall(r"^ +(\d+)  ", HELP, re.MULTILINE)]


@pytest.mark.parametrize("missing", ["LEMCAL_API_KEY", "LEMCAL_USER_ID"])
def test_incomplete_credentials(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The error names the missing variable, and no request is sent."""
    monkeypatch.delenv(missing)
    result = lemcal("me", "--base-url", sandbox.base_url)
    assert (2, "", []) == (result.status, result.out, sandbox.requests)
    assert ONE_LINE.fullmatch(result.err)
    assert missing in result.err


def test_every_error_has_a_status() -> None:
    """Every error class of the package has an exit status."""
    from lemcal_async.cli._output import status_of

    kinds: list[Any] = [errors.LemcalError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {ExitStatus.FAILED, ExitStatus.USAGE, ExitStatus.AUTHENTICATION, ExitStatus.NOT_FOUND} == {
        status_of(kind()) for kind in kinds
    }


def test_python_dash_m(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m lemcal_async.cli`` is the same program."""
    monkeypatch.setattr(sys, "argv", ["x", "--version"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("lemcal_async.cli.__main__")
    assert (0, True) == (ended.value.code, capsys.readouterr().out.startswith("lemcal-async "))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.example/x", "https://h.example/x"),
        ("https://h.example:8443/x?token=hush&a=b#c", "https://h.example:8443/x?..."),
        ("https://h.example/x#hush", "https://h.example/x?..."),
        ("https://hush@h.example/x", "https://h.example/x"),
        ("https://user:hu/sh@h.example/x?token=hush", "https://h.example/x?..."),
        ("https://h.example/@page", "https://h.example/@page"),
        ("from https://a.example/?x=hush to https://b.example/?y=hush.", "from https://a.example/?... to "),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    """Shown URLs omit the query, the fragment and the user info."""
    assert shown == without_secrets(url)[: len(shown)]
    assert "hush" not in without_secrets(url)
