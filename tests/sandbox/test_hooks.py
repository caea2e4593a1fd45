"""Hooks: an HTTP POST to a real receiver for every matching booking."""

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
def sandbox() -> Iterator[Sandbox]:
    """Return a sandbox that is not served; abort its deliveries after the test."""
    sandbox = Sandbox(accounts=2)
    yield sandbox
    sandbox._sender.close()


def create_hook(sandbox: Sandbox, url: str, meeting_type_id: str | None = None, account: int = 0) -> str:
    """Create a hook and return its id."""
    hook_id: str = sandbox._state.add_hook(account, url, meeting_type_id)["_id"]
    return hook_id


def test_booking_is_posted(sandbox: Sandbox, receiver: Receiver) -> None:
    """The body is the meeting as JSON, unsigned; the target's query string is kept."""
    hook_id = create_hook(sandbox, receiver.url())
    meeting = sandbox.book(note="é")
    (delivery,) = sandbox.wait_for_deliveries(1)
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
    assert sandbox.deliveries == [delivery]


def test_only_matching_hooks_fire(sandbox: Sandbox, receiver: Receiver) -> None:
    """An account's hook fires if it is for the meeting's type or for any type."""
    first, second, *_ = [row["_id"] for row in sandbox.meeting_types()]
    matching = create_hook(sandbox, receiver.url("/of-first"), first)
    create_hook(sandbox, receiver.url("/of-second"), second)
    for_any = create_hook(sandbox, receiver.url("/of-any"))
    create_hook(sandbox, receiver.url("/of-other-account"), account=1)
    sandbox.book(meeting_type_id=first)
    deliveries = sandbox.wait_for_deliveries(2)
    sandbox.book(1)
    assert {matching, for_any} == {delivery.hook_id for delivery in deliveries}
    assert ["/of-any", "/of-first", "/of-other-account"] == sorted(
        path for path, _, _ in receiver.seen if sandbox.wait_for_deliveries(3)
    )


def test_only_bookings_fire_hooks(sandbox: Sandbox, receiver: Receiver) -> None:
    """Edits, cancellations and removals fire no hook (observed)."""
    create_hook(sandbox, receiver.url())
    meeting = sandbox.meetings()[0]
    sandbox.edit(meeting["_id"], note=1)
    sandbox.cancel(meeting["_id"])
    sandbox.remove(meeting["_id"])
    sandbox.book()
    assert 1 == len(sandbox.wait_for_deliveries(1))
    assert 1 == len(receiver.seen)


def test_refused_delivery_is_not_retried(sandbox: Sandbox, receiver: Receiver) -> None:
    """The status code is recorded, and the delivery is not retried."""
    receiver.status_code = 503
    create_hook(sandbox, receiver.url())
    sandbox.book()
    assert [503] == [delivery.status_code for delivery in sandbox.wait_for_deliveries(1)]
    assert 1 == len(receiver.seen)


def test_unreachable_receiver(sandbox: Sandbox) -> None:
    """The error's type is recorded, without the target's token."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    create_hook(sandbox, f"http://127.0.0.1:{port}/?token=s3cret")
    sandbox.book()
    (delivery,) = sandbox.wait_for_deliveries(1)
    assert (None, "ConnectError") == (delivery.status_code, delivery.error)
    assert "s3cret" not in repr(delivery)


def test_delivery_times_out(sandbox: Sandbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery fails after its time limit."""
    monkeypatch.setattr("lemcal_async.sandbox._hooks.TIMEOUT", 0.05)
    receiver.may_respond.clear()
    create_hook(sandbox, receiver.url())
    sandbox.book()
    (delivery,) = sandbox.wait_for_deliveries(1)
    assert None is delivery.status_code
    assert delivery.error in {"TimeoutError", "ReadTimeout"}


def test_token_is_not_logged(sandbox: Sandbox, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """The target's token is not logged, even at DEBUG."""
    caplog.set_level("DEBUG")
    create_hook(sandbox, receiver.url())
    sandbox.book()
    sandbox.wait_for_deliveries(1)
    assert "s3cret" not in caplog.text


def test_wait_for_deliveries_times_out(sandbox: Sandbox) -> None:
    """The TimeoutError says how many have finished."""
    with pytest.raises(TimeoutError, match="0 of 2"):
        sandbox.wait_for_deliveries(2, timeout=0.01)


def test_many_bookings(sandbox: Sandbox, receiver: Receiver) -> None:
    """All bookings are delivered by a few threads, which end on their own."""
    create_hook(sandbox, receiver.url())
    booked = {sandbox.book()["_id"] for _ in range(50)}
    names = [thread.name for thread in threading.enumerate()]
    deliveries = sandbox.wait_for_deliveries(50, timeout=20)
    assert booked == {delivery.meeting_id for delivery in deliveries}
    assert WORKERS >= names.count("lemcal-sandbox-hooks")
    until = time.monotonic() + 5
    while any(thread.name == "lemcal-sandbox-hooks" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.001)


def test_slow_receivers_do_not_delay_others(sandbox: Sandbox, receiver: Receiver) -> None:
    """A delivery that hangs occupies only one worker."""
    receiver.may_respond.clear()
    create_hook(sandbox, receiver.url())
    sandbox.book()
    receiver.arrived.acquire(timeout=30)
    with Receiver() as responsive:
        thread = threading.Thread(target=responsive.serve_forever, args=[0.01])
        thread.start()
        create_hook(sandbox, responsive.url(), account=1)
        sandbox.book(1)
        assert [200] == [delivery.status_code for delivery in sandbox.wait_for_deliveries(1)]
        responsive.shutdown()
        thread.join()


def test_closing_aborts_deliveries(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and queued deliveries are aborted, and no thread remains."""
    monkeypatch.setattr("lemcal_async.sandbox._hooks.TIMEOUT", 600)  # longer than a test may take
    receiver.may_respond.clear()
    with Sandbox().serve() as sandbox:
        create_hook(sandbox, receiver.url())
        for _ in range(WORKERS * 2):
            sandbox.book()
        for _ in range(WORKERS):
            assert receiver.arrived.acquire(timeout=30)
    assert [] == sandbox.deliveries
    assert "lemcal-sandbox-hooks" not in [thread.name for thread in threading.enumerate()]


def test_delivery_that_starts_while_closing_is_aborted(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery that starts during close() is aborted."""
    sandbox = Sandbox()
    create_hook(sandbox, receiver.url())
    sandbox._sender._closing = True
    sandbox.book()
    for thread in list(sandbox._sender._threads):
        thread.join()
    assert ([], []) == (sandbox.deliveries, receiver.seen)


def test_hooks_survive_a_restart_of_the_server(receiver: Receiver) -> None:
    """The state, including hooks, survives the server."""
    sandbox = Sandbox()
    create_hook(sandbox, receiver.url())
    for count in (1, 2):
        with sandbox.serve():
            sandbox.book()
            assert count == len(sandbox.wait_for_deliveries(count))
