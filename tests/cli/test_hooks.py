"""``lemcal hooks``: create and delete hooks without printing the token."""

import io
import json

import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run

TARGET = "https://user:pass@hooks.example.org/lemcal?token=hush"
SHOWN = "https://hooks.example.org/lemcal?..."


@pytest.mark.parametrize("selector", ["any", "type"])
def test_create_and_delete(lemcal: Run, sandbox: Sandbox, selector: str) -> None:
    """The target is read from standard input. The output contains the hook's id but not its token."""
    meeting_type = sandbox.meeting_types()[0]["_id"]
    chosen = ["--any"] if selector == "any" else ["--type", meeting_type]
    result = lemcal("hooks", "create", "-", *chosen, "--base-url", sandbox.base_url, stdin=f"{TARGET}\n")
    [hook] = sandbox.hooks()
    assert TARGET == hook["targetUrl"]
    assert (0, "") == (result.status, result.err)
    assert [
        f"Hook id        {hook['_id']}  (keep it: hooks cannot be listed)",
        f"Target         {SHOWN}",
        f"Meetings       {'of any type' if selector == 'any' else meeting_type}",
    ] == result.out.splitlines()[:3]
    assert "hush" not in result.out

    result = lemcal("hooks", "delete", hook["_id"], "--base-url", sandbox.base_url)
    assert (0, f"Deleted hook {hook['_id']}.\n", "") == (result.status, result.out, result.err)
    assert [] == sandbox.hooks()


def test_create_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``--json`` prints the hook without the secrets in its target."""
    result = lemcal("hooks", "create", "-", "--any", "--json", "--base-url", sandbox.base_url, stdin=TARGET)
    [hook] = sandbox.hooks()
    assert hook | {"targetUrl": SHOWN} == json.loads(result.out)


def test_hook_with_missing_fields(lemcal: Run, sandbox: Sandbox) -> None:
    """The output omits fields that the service omits."""
    sandbox.inject(faults.json({"_id": "hoo_a"}), times=2)
    create = ("hooks", "create", "-", "--any", "--base-url", sandbox.base_url)
    assert {"_id": "hoo_a"} == json.loads(lemcal(*create, "--json", stdin=TARGET).out)
    assert "Hook id  hoo_a  (keep it: hooks cannot be listed)\n" == lemcal(*create, stdin=TARGET).out


def test_duplicate_hook(lemcal: Run, sandbox: Sandbox) -> None:
    """A duplicate hook is an error; with ``--exist-ok``, it is a message, or null in JSON."""
    create = ("hooks", "create", "-", "--any", "--base-url", sandbox.base_url)
    lemcal(*create, stdin=TARGET)
    result = lemcal(*create, stdin=TARGET)
    assert (1, "") == (result.status, result.out)
    assert result.err.startswith('lemcal: POST /hooks: 409 Conflict ("Duplicate hook").')
    result = lemcal(*create, "--exist-ok", stdin=TARGET)
    assert (0, "The hook already exists. Its id cannot be looked up.\n") == (result.status, result.out)
    assert "null\n" == lemcal(*create, "--exist-ok", "--json", stdin=TARGET).out


def test_token_as_argument(lemcal: Run, sandbox: Sandbox) -> None:
    """A target with a query is accepted as an argument, with a warning that does not quote it."""
    result = lemcal("hooks", "create", TARGET, "--any", "--base-url", sandbox.base_url)
    assert (0, 1) == (result.status, len(sandbox.hooks()))
    assert result.err.startswith(
        "lemcal: warning: other users of this machine can see command-line arguments"
    )
    assert 1 == result.err.count("\n")
    assert "hush" not in result.out + result.err


def test_target_without_query(lemcal: Run, sandbox: Sandbox) -> None:
    """A target without a query causes no warning."""
    target = "https://hooks.example.org/lemcal"
    result = lemcal("hooks", "create", target, "--any", "--base-url", sandbox.base_url)
    assert (0, "") == (result.status, result.err)
    assert target in result.out


@pytest.mark.parametrize("argv", [["--type", "met_a", "--any"], []])
def test_meeting_type_or_any_is_required(lemcal: Run, sandbox: Sandbox, argv: list[str]) -> None:
    """``--type`` or ``--any`` is required; otherwise nothing is read or sent."""
    result = lemcal("hooks", "create", "-", *argv, "--base-url", sandbox.base_url, stdin=TARGET)
    assert (2, "lemcal: pass either --type ID or --any\n") == (result.status, result.err)
    assert [] == sandbox.requests


@pytest.mark.parametrize("text", ["", "\n", "ftp://example.org/x", "hush", "https://example.org/a b"])
def test_invalid_target(lemcal: Run, sandbox: Sandbox, text: str) -> None:
    """An invalid URL is rejected, and the message does not quote it."""
    result = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=text)
    expected = "lemcal: TARGET_URL must be an absolute http:// or https:// URL\n"
    assert (2, expected) == (result.status, result.err)
    assert [] == sandbox.requests


def test_undecodable_input(lemcal: Run, sandbox: Sandbox) -> None:
    """Undecodable input is an invalid URL."""
    stdin = io.TextIOWrapper(io.BytesIO(b"https://example.org/\xff\n"), encoding="utf-8")
    result = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=stdin)
    assert (2, []) == (result.status, sandbox.requests)


def test_prompt_on_terminal(lemcal: Run, sandbox: Sandbox) -> None:
    """On a terminal, the command prompts for the target."""
    stdin = io.StringIO(f"{TARGET}\n")
    stdin.isatty = lambda: True  # type: ignore[method-assign]  # pretend to be a terminal
    result = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=stdin)
    assert (0, "lemcal: enter the target URL:\n") == (result.status, result.err)


def test_delete_unknown_hook(lemcal: Run, sandbox: Sandbox) -> None:
    """Deleting an unknown hook is status 5."""
    result = lemcal("hooks", "delete", "hoo_nope", "--base-url", sandbox.base_url)
    assert 5 == result.status
    assert result.err.startswith('lemcal: DELETE /hooks/{id}: 404 Not Found ("hook not found").')


def test_usage_error_hides_token(lemcal: Run) -> None:
    """A usage error quotes an extra argument without its token."""
    result = lemcal("hooks", "delete", "hoo_a", TARGET)
    assert 2 == result.status
    assert SHOWN in result.err
    assert "hush" not in result.err
