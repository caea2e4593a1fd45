"""Hooks: a real POST to a real receiver for every matching booking."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._hooks import WORKERS

from .conftest import Receiver


@pytest.fixture
def idle() -> Iterator[Sandbox]:
    """Return a sandbox that is not served; abort its deliveries at the end."""
    sandbox = Sandbox(accounts=2)
    yield sandbox
    sandbox._sender.close()


def hook(sandbox: Sandbox, url: str, meeting_type_id: str | None = None, account: int = 0) -> str:
    """Create a hook and return its id."""
    hook_id: str = sandbox._state.add_hook(account, url, meeting_type_id)["_id"]
    return hook_id


def test_a_booking_is_posted(idle: Sandbox, receiver: Receiver) -> None:
    """The meeting at top level, as JSON, unsigned, at the target with its query."""
    hook_id = hook(idle, receiver.url())
    meeting = idle.book(note="é")
    (delivery,) = idle.wait_for_deliveries(1)
    ((path, headers, body),) = receiver.seen
    assert "/hook?token=s3cret" == path
    assert "application/json" == headers["Content-Type"]
    assert {"Host", "Content-Type", "Content-Length", "User-Agent"} == set(headers)
    assert meeting == json.loads(body)
    assert (hook_id, meeting["_id"], 200, None) == (
        delivery.hook_id,
        delivery.meeting_id,
        delivery.status_code,
        delivery.error,
    )
    assert idle.deliveries == [delivery]


def test_only_the_hooks_that_match_fire(idle: Sandbox, receiver: Receiver) -> None:
    """Hooks of the account fire if they are for the meeting's type or for any."""
    first, second, *_ = [row["_id"] for row in idle.meeting_types()]
    fitting = hook(idle, receiver.url("/of-first"), first)
    hook(idle, receiver.url("/of-second"), second)
    of_any = hook(idle, receiver.url("/of-any"))
    hook(idle, receiver.url("/of-other-account"), account=1)
    idle.book(meeting_type_id=first)
    deliveries = idle.wait_for_deliveries(2)
    idle.book(1)
    assert {fitting, of_any} == {delivery.hook_id for delivery in deliveries}
    assert ["/of-any", "/of-first", "/of-other-account"] == sorted(
        path for path, _, _ in receiver.seen if idle.wait_for_deliveries(3)
    )


def test_nothing_but_a_booking_fires(idle: Sandbox, receiver: Receiver) -> None:
    """Only bookings fire; a cancellation shows in the list only (observed)."""
    hook(idle, receiver.url())
    meeting = idle.meetings()[0]
    idle.edit(meeting["_id"], note=1)
    idle.cancel(meeting["_id"])
    idle.remove(meeting["_id"])
    idle.book()
    assert 1 == len(idle.wait_for_deliveries(1))
    assert 1 == len(receiver.seen)


def test_a_refusal_is_not_tried_again(idle: Sandbox, receiver: Receiver) -> None:
    """The status is recorded, and nothing is retried."""
    receiver.status_code = 503
    hook(idle, receiver.url())
    idle.book()
    assert [503] == [delivery.status_code for delivery in idle.wait_for_deliveries(1)]
    assert 1 == len(receiver.seen)


def test_a_receiver_that_is_not_there(idle: Sandbox) -> None:
    """The kind of failure is recorded, without the target's token."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    hook(idle, f"http://127.0.0.1:{port}/?token=s3cret")
    idle.book()
    (delivery,) = idle.wait_for_deliveries(1)
    assert (None, "ConnectError") == (delivery.status_code, delivery.error)
    assert "s3cret" not in repr(delivery)


def test_a_receiver_that_is_too_slow(
    idle: Sandbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delivery fails after its time limit."""
    monkeypatch.setattr("lemcal_async.sandbox._hooks.TIMEOUT", 0.05)
    receiver.answers.clear()
    hook(idle, receiver.url())
    idle.book()
    (delivery,) = idle.wait_for_deliveries(1)
    assert None is delivery.status_code
    assert delivery.error in {"TimeoutError", "ReadTimeout"}


def test_the_token_is_not_logged(idle: Sandbox, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """The token is not logged, not even at DEBUG."""
    caplog.set_level("DEBUG")
    hook(idle, receiver.url())
    idle.book()
    idle.wait_for_deliveries(1)
    assert "s3cret" not in caplog.text


def test_waiting_in_vain(idle: Sandbox) -> None:
    """The TimeoutError says how many have finished."""
    with pytest.raises(TimeoutError, match="0 of 2"):
        idle.wait_for_deliveries(2, timeout=0.01)


def test_many_bookings(idle: Sandbox, receiver: Receiver) -> None:
    """All are delivered by a few threads, which end by themselves."""
    hook(idle, receiver.url())
    booked = {idle.book()["_id"] for _ in range(50)}
    names = [thread.name for thread in threading.enumerate()]
    deliveries = idle.wait_for_deliveries(50, timeout=20)
    assert booked == {delivery.meeting_id for delivery in deliveries}
    assert WORKERS >= names.count("lemcal-sandbox-hooks")
    until = time.monotonic() + 5
    while any(thread.name == "lemcal-sandbox-hooks" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.001)


def test_slow_receivers_do_not_hold_up_others(idle: Sandbox, receiver: Receiver) -> None:
    """A delivery that hangs takes one worker only."""
    receiver.answers.clear()
    hook(idle, receiver.url())
    idle.book()
    receiver.arrived.acquire(timeout=30)
    with Receiver() as quick:
        thread = threading.Thread(target=quick.serve_forever, args=[0.01])
        thread.start()
        hook(idle, quick.url(), account=1)
        idle.book(1)
        assert [200] == [delivery.status_code for delivery in idle.wait_for_deliveries(1)]
        quick.shutdown()
        thread.join()


def test_closing_aborts_deliveries(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and queued deliveries are aborted, and no thread is left."""
    monkeypatch.setattr("lemcal_async.sandbox._hooks.TIMEOUT", 600)  # longer than a test may take
    receiver.answers.clear()
    with Sandbox().serve() as sandbox:
        hook(sandbox, receiver.url())
        for _ in range(WORKERS * 2):
            sandbox.book()
        for _ in range(WORKERS):
            assert receiver.arrived.acquire(timeout=30)
    assert [] == sandbox.deliveries
    assert "lemcal-sandbox-hooks" not in [thread.name for thread in threading.enumerate()]


def test_a_delivery_that_starts_while_closing_is_dropped(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery that starts during close() is aborted."""
    sandbox = Sandbox()
    hook(sandbox, receiver.url())
    sandbox._sender._closing = True
    sandbox.book()
    for thread in list(sandbox._sender._threads):
        thread.join()
    assert ([], []) == (sandbox.deliveries, receiver.seen)


def test_a_sandbox_served_again_delivers_again(receiver: Receiver) -> None:
    """The state, including hooks, survives the server."""
    sandbox = Sandbox()
    hook(sandbox, receiver.url())
    for count in (1, 2):
        with sandbox.serve():
            sandbox.book()
            assert count == len(sandbox.wait_for_deliveries(count))
