"""``lemcal listen`` and ``lemcal trigger``, with a sandbox and a local receiver."""

import json
import re
import subprocess  # noqa: TC003  # evaluated by pytest
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest

from lemcal_async._auth import Secret
from lemcal_async.cli._listen import EVENT_HEADER, _Forwarder
from lemcal_async.sandbox import Sandbox

from .conftest import Run, Spawn, set_credentials
from .test_sync import posix_only, wait_until


class Receiver(ThreadingHTTPServer):
    """Receives deliveries, and responds with the next of ``statuses``, then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.seen: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        """The target URL, with a token."""
        return f"http://127.0.0.1:{self.server_port}/webhooks/lemcal?token=hush"


class Handler(BaseHTTPRequestHandler):
    """The request handler of ``Receiver``."""

    server: Receiver

    def do_POST(self) -> None:
        """Receive a delivery."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("content-length", "0")
        self.send_header("retry-after", "0.01")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Serve a receiver."""
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=[0.01])
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


@pytest.fixture
def listen(spawn: Spawn, sandbox: Sandbox, receiver: Receiver) -> Callable[..., "subprocess.Popen[str]"]:
    """Return a function that starts ``lemcal listen`` and waits for its first poll."""

    def listen(*options: str) -> "subprocess.Popen[str]":
        arguments = ("--forward-to", receiver.url, "--interval", "0.2", "--base-url", sandbox.base_url)
        process = spawn("listen", *arguments, *options)
        assert process.stdout is not None
        assert f"watching {sandbox.user_id}, posting to " in (line := process.stdout.readline())
        assert "hush" not in line
        wait_until(lambda: "/meetings" in [entry.path for entry in sandbox.requests if entry.seconds])
        return process

    return listen


def end(process: "subprocess.Popen[str]") -> str:
    """Terminate the command, and return its remaining output."""
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (143, "") == (process.returncode, err)
    assert "hush" not in out
    return out


@posix_only
def test_new_bookings(listen: Callable[..., Any], sandbox: Sandbox, receiver: Receiver) -> None:
    """A new booking is posted as lemcal would post it; existing meetings and other changes are not posted."""
    process = listen()
    sandbox.cancel(sandbox.meetings()[0])
    booked = sandbox.book(guest="Léa <lea@example.org>")
    wait_until(lambda: bool(receiver.seen))
    [(path, headers, body)] = receiver.seen
    assert ("/webhooks/lemcal?token=hush", booked) == (path, body)
    assert "application/json" == headers["Content-Type"]
    assert EVENT_HEADER not in headers
    wait_until(lambda: len([1 for request in sandbox.requests if request.path == "/meetings"]) > 4)
    out = end(process)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d created {booked['_id']} 200 \d+ ms\n", out)
    assert 1 == len(receiver.seen)


@posix_only
def test_all_changes(listen: Callable[..., Any], sandbox: Sandbox, receiver: Receiver) -> None:
    """With ``--all``, other changes are posted too, with a header that names their kind."""
    process = listen("--all")
    first, second, third, *_ = (row for row in sandbox.meetings() if "canceledAt" not in row)
    sandbox.edit(first, start="2030-01-01T09:00:00.000Z")
    sandbox.cancel(second)
    sandbox.remove(third)
    sandbox.book()
    wait_until(lambda: 4 == len(receiver.seen))
    end(process)
    kinds = {body["_id"]: headers[EVENT_HEADER] for _, headers, body in receiver.seen}
    expected = {first["_id"]: "changed", second["_id"]: "canceled", third["_id"]: "disappeared"}
    assert expected.items() <= kinds.items()
    assert ["canceled", "changed", "created", "disappeared"] == sorted(kinds.values())


@posix_only
def test_busy_receiver(listen: Callable[..., Any], sandbox: Sandbox, receiver: Receiver) -> None:
    """A delivery is retried after Retry-After, and each attempt prints a line."""
    receiver.statuses = [503, 429]
    process = listen()
    booked = sandbox.book()
    lines = [process.stdout.readline() for _ in range(3)]
    assert "" == end(process)
    assert 3 == len(receiver.seen)
    assert [["created", booked["_id"], status] for status in ("503", "429", "200")] == [
        line.split()[1:4] for line in lines
    ]


def forward(receiver_url: str, kind: str = "created") -> tuple[bool, list[float]]:
    """Post a meeting without sleeping; return whether it was delivered, and the delays."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> bool:
        async with httpx.AsyncHTTPTransport(trust_env=False) as transport:
            forwarder = _Forwarder(transport, Secret(receiver_url), all_changes=False, sleep=sleep)
            return await forwarder.post(kind, "mee_1", {"_id": "mee_1"})

    return anyio.run(run), waits


def test_unreachable_receiver(capsys: pytest.CaptureFixture[str]) -> None:
    """After five attempts with growing delays, a message says how to send the meeting again."""
    delivered, waits = forward("http://127.0.0.1:1/?token=hush")
    assert (False, [1.0, 2.0, 4.0, 8.0]) == (delivered, waits)
    out, err = capsys.readouterr()
    assert 5 == out.count("created mee_1 no response (ConnectError)")
    assert "lemcal: gave up on mee_1 after 5 attempts; send it again with --replay mee_1\n" == err
    assert "hush" not in out + err


@pytest.mark.parametrize(("status", "delivered"), [(204, True), (401, False), (302, False), (410, False)])
def test_final_responses(receiver: Receiver, status: int, *, delivered: bool) -> None:
    """A success, a redirect or a client error is not retried."""
    receiver.statuses = [status]
    assert (delivered, []) == forward(receiver.url)
    assert 1 == len(receiver.seen)


def test_replay(lemcal: Run, sandbox: Sandbox, receiver: Receiver) -> None:
    """``--replay`` posts one meeting again, and the status shows whether it was accepted."""
    row = sandbox.meetings()[3]
    replay = ("listen", "--forward-to", receiver.url, "--base-url", sandbox.base_url, "--replay")
    result = lemcal(*replay, row["_id"])
    assert (0, "") == (result.status, result.err)
    assert row == receiver.seen[0][2]
    receiver.statuses = [401]
    assert 1 == lemcal(*replay, row["_id"]).status
    result = lemcal(*replay, "mee_unknown")
    assert (5, 1) == (result.status, result.err.count("\n"))
    assert 2 == len(receiver.seen)


def test_wrong_credentials(
    lemcal: Run, sandbox: Sandbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``listen`` exits if the credentials are rejected."""
    set_credentials(sandbox, monkeypatch, api_key="wrong")
    result = lemcal("listen", "--forward-to", receiver.url, "--base-url", sandbox.base_url)
    assert (4, "", 1) == (result.status, result.out, result.err.count("\n"))


@pytest.mark.parametrize("target", ["nonsense", "ftp://x/", "http://[::1"])
def test_invalid_target(lemcal: Run, target: str) -> None:
    """An invalid URL is rejected before any request is sent."""
    result = lemcal("listen", "--sandbox", "--forward-to", target)
    expected = "lemcal: --forward-to must be an absolute http:// or https:// URL\n"
    assert (2, "", expected) == (result.status, result.out, result.err)


def test_trigger(lemcal: Run, sandbox: Sandbox) -> None:
    """``trigger`` books, moves and cancels meetings in a running sandbox, by default the latest one."""
    url = sandbox.url
    result = lemcal(
        "trigger", "booking", "--url", url, "--guest", "ada@example.org", "--start", "2030-01-01T09:00Z"
    )
    booked = sandbox.meetings()[-1]
    expected = f"booked {booked['_id']}, starting at 2030-01-01T09:00:00.000Z\n"
    assert (0, expected, "") == (result.status, result.out, result.err)
    assert "ada@example.org" == booked["providedInfos"]["email"]
    moved = json.loads(lemcal("trigger", "move", "--url", sandbox.base_url, "--json").out)
    assert (booked["_id"], "2030-01-02T09:00:00.000Z") == (moved["_id"], moved["start"])
    assert moved["end"] > moved["start"]
    assert moved == sandbox.meetings()[-1]
    other = sandbox.meetings()[0]["_id"]
    lemcal("trigger", "move", other, "--url", url, "--start", "2031-01-01T10:00+01:00")
    assert "2031-01-01T09:00:00.000Z" == sandbox.meetings()[0]["start"]
    assert lemcal("trigger", "cancel", "--url", url).out.startswith(f"canceled {booked['_id']}")
    assert "canceledAt" in sandbox.meetings()[-1]
    assert 0 == lemcal("trigger", "booking", "--account", "2", "--start", "2030-05-01", "--url", url).status
    assert (13, "2030-05-01T00:00:00.000Z") == (len(sandbox.meetings(1)), sandbox.meetings(1)[-1]["start"])
    lemcal("trigger", "move", sandbox.meetings(1)[-1]["_id"], "--url", url)
    assert "2030-05-02T00:00:00.000Z" == sandbox.meetings(1)[-1]["start"]
    assert [] == sandbox.requests  # no credentials, no rate limit


def test_trigger_with_environment_variable(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trigger`` and other commands work with the variables that the sandbox's page shows."""
    monkeypatch.setenv("LEMCAL_BASE_URL", sandbox.base_url)
    assert 0 == lemcal("trigger", "booking").status
    assert 13 == len(json.loads(lemcal("meetings", "--json").out))


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["booking", "--url", "{url}", "--guest", "x"], 2, "--guest must be an e-mail address"),
        (["booking", "--url", "{url}", "--account", "9"], 2, "there is no account 9; the sandbox has 2"),
        (["cancel", "--url", "{url}", "--account", "3"], 2, "there is no account 3; the sandbox has 2"),
        (["move", "--url", "{url}", "--account", "3"], 2, "there is no account 3; the sandbox has 2"),
        (["booking", "mee_x", "--url", "{url}"], 2, "booking does not accept MEETING_ID; omit it"),
        (["cancel", "--guest", "a@x.org", "--url", "{url}"], 2, "cancel does not accept --guest; omit it"),
        (["cancel", "--start", "2030-01-01", "--url", "{url}"], 2, "cancel does not accept --start"),
        (["move", "--guest", "a@x.org", "--url", "{url}"], 2, "move does not accept --guest; omit it"),
        (["move", "mee_x", "--account", "1", "--url", "{url}"], 2, "omit --account"),
        (["cancel", "", "--url", "{url}"], 2, "MEETING_ID must be a non-empty string"),
        (["cancel", "mee_x", "--account", "1", "--url", "{url}"], 2, "omit --account"),
        (["cancel", "mee_unknown", "--url", "{url}"], 5, "there is no meeting mee_unknown"),
        (["move", "mee_unknown", "--url", "{url}"], 5, "there is no meeting mee_unknown"),
        (["move", "--start", "tomorrow", "--url", "{url}"], 2, "--start must be a date or a time"),
        (["move", "--start", "9999-12-31T23:59", "--url", "{url}"], 2, "pass an earlier --start"),
        (["booking", "--start", "", "--url", "{url}"], 2, "--start must be a date or a time"),
        (["booking", "--url", "{receiver}"], 2, "there is no sandbox at"),
        (["booking", "--url", "http://127.0.0.1:1"], 1, "cannot reach a sandbox at http://127.0.0.1:1"),
        (["booking", "--url", "nonsense"], 2, "the sandbox's URL must look like"),
        (["booking"], 2, "no sandbox URL: pass --url or set LEMCAL_BASE_URL"),
        (["party"], 2, "party"),
    ],
)
def test_trigger_errors(  # noqa: PLR0917  # fixtures
    lemcal: Run, sandbox: Sandbox, receiver: Receiver, argv: list[str], status: int, message: str
) -> None:
    """The error is one line that says what to do, and nothing is done."""
    before = [sandbox.meetings(account) for account in range(2)]
    result = lemcal("trigger", *(part.format(url=sandbox.url, receiver=receiver.url) for part in argv))
    assert (status, "", 1) == (result.status, result.out, result.err.count("\n")), result.err
    assert message in result.err
    assert before == [sandbox.meetings(account) for account in range(2)]
