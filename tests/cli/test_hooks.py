"""``lemcal hooks``: create and delete, without showing the token."""

import io
import json

import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run

TARGET = "https://user:pass@hooks.example.org/lemcal?token=hush"
SHOWN = "https://hooks.example.org/lemcal?..."


@pytest.mark.parametrize("selector", ["any", "type"])
def test_create_and_delete(lemcal: Run, sandbox: Sandbox, selector: str) -> None:
    """The target comes from standard input; the output has the id, which deletes the hook, and no token."""
    meeting_type = sandbox.meeting_types()[0]["_id"]
    chosen = ["--any"] if selector == "any" else ["--type", meeting_type]
    done = lemcal("hooks", "create", "-", *chosen, "--base-url", sandbox.base_url, stdin=f"{TARGET}\n")
    [hook] = sandbox.hooks()
    assert TARGET == hook["targetUrl"]
    assert (0, "") == (done.status, done.err)
    assert [
        f"Hook id        {hook['_id']}  (keep it: hooks cannot be listed)",
        f"Target         {SHOWN}",
        f"Meetings       {'of any type' if selector == 'any' else meeting_type}",
    ] == done.out.splitlines()[:3]
    assert "hush" not in done.out

    done = lemcal("hooks", "delete", hook["_id"], "--base-url", sandbox.base_url)
    assert (0, f"Deleted hook {hook['_id']}.\n", "") == (done.status, done.out, done.err)
    assert [] == sandbox.hooks()


def test_create_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``--json`` prints the hook, without what may be secret in its target."""
    done = lemcal("hooks", "create", "-", "--any", "--json", "--base-url", sandbox.base_url, stdin=TARGET)
    [hook] = sandbox.hooks()
    assert hook | {"targetUrl": SHOWN} == json.loads(done.out)


def test_a_hook_of_which_little_is_known(lemcal: Run, sandbox: Sandbox) -> None:
    """Fields that the service leaves out are left out."""
    sandbox.inject(faults.json({"_id": "hoo_a"}), times=2)
    create = ("hooks", "create", "-", "--any", "--base-url", sandbox.base_url)
    assert {"_id": "hoo_a"} == json.loads(lemcal(*create, "--json", stdin=TARGET).out)
    assert "Hook id  hoo_a  (keep it: hooks cannot be listed)\n" == lemcal(*create, stdin=TARGET).out


def test_a_duplicate(lemcal: Run, sandbox: Sandbox) -> None:
    """A second hook for a target fails; with ``--exist-ok`` it is a message, or null in JSON."""
    create = ("hooks", "create", "-", "--any", "--base-url", sandbox.base_url)
    lemcal(*create, stdin=TARGET)
    done = lemcal(*create, stdin=TARGET)
    assert (1, "") == (done.status, done.out)
    assert done.err.startswith('lemcal: POST /hooks: 409 Conflict ("Duplicate hook").')
    done = lemcal(*create, "--exist-ok", stdin=TARGET)
    assert (0, "The hook already exists. Its id cannot be looked up.\n") == (done.status, done.out)
    assert "null\n" == lemcal(*create, "--exist-ok", "--json", stdin=TARGET).out


def test_a_token_as_an_argument(lemcal: Run, sandbox: Sandbox) -> None:
    """A target with a query works as an argument, with a warning that does not repeat it."""
    done = lemcal("hooks", "create", TARGET, "--any", "--base-url", sandbox.base_url)
    assert (0, 1) == (done.status, len(sandbox.hooks()))
    assert done.err.startswith("lemcal: warning: other users of this machine can see command-line arguments")
    assert 1 == done.err.count("\n")
    assert "hush" not in done.out + done.err


def test_a_target_without_a_query(lemcal: Run, sandbox: Sandbox) -> None:
    """Without a query, there is no warning."""
    target = "https://hooks.example.org/lemcal"
    done = lemcal("hooks", "create", target, "--any", "--base-url", sandbox.base_url)
    assert (0, "") == (done.status, done.err)
    assert target in done.out


@pytest.mark.parametrize("argv", [["--type", "met_a", "--any"], []])
def test_which_meetings(lemcal: Run, sandbox: Sandbox, argv: list[str]) -> None:
    """Either ``--type`` or ``--any`` is required, before anything is read or sent."""
    done = lemcal("hooks", "create", "-", *argv, "--base-url", sandbox.base_url, stdin=TARGET)
    assert (2, "lemcal: pass either --type ID or --any\n") == (done.status, done.err)
    assert [] == sandbox.requests


@pytest.mark.parametrize("text", ["", "\n", "ftp://example.org/x", "hush", "https://example.org/a b"])
def test_no_target(lemcal: Run, sandbox: Sandbox, text: str) -> None:
    """An invalid URL is refused, and not repeated in the message."""
    done = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=text)
    expected = "lemcal: target_url must be an absolute http:// or https:// URL\n"
    assert (2, expected) == (done.status, done.err)
    assert [] == sandbox.requests


def test_input_that_is_no_text(lemcal: Run, sandbox: Sandbox) -> None:
    """Undecodable input is an invalid URL."""
    stdin = io.TextIOWrapper(io.BytesIO(b"https://example.org/\xff\n"), encoding="utf-8")
    done = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=stdin)
    assert (2, []) == (done.status, sandbox.requests)


def test_typing_the_target(lemcal: Run, sandbox: Sandbox) -> None:
    """On a terminal, there is a prompt."""
    stdin = io.StringIO(f"{TARGET}\n")
    stdin.isatty = lambda: True  # type: ignore[method-assign]  # a terminal, for the purpose
    done = lemcal("hooks", "create", "-", "--any", "--base-url", sandbox.base_url, stdin=stdin)
    assert (0, "lemcal: enter the target URL:\n") == (done.status, done.err)


def test_deleting_what_is_not_there(lemcal: Run, sandbox: Sandbox) -> None:
    """An unknown hook has its own status."""
    done = lemcal("hooks", "delete", "hoo_nope", "--base-url", sandbox.base_url)
    assert 5 == done.status
    assert done.err.startswith('lemcal: DELETE /hooks/{id}: 404 Not Found ("hook not found").')


def test_a_target_is_in_no_usage_error(lemcal: Run) -> None:
    """A superfluous argument is repeated without its token."""
    done = lemcal("hooks", "delete", "hoo_a", TARGET)
    assert 2 == done.status
    assert SHOWN in done.err
    assert "hush" not in done.err
