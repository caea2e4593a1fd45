"""The example service, started as a user would start it, with its own sandbox."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_app.py"


@attrs.frozen
class Example:
    """The running service, and the URL for bookings in its sandbox."""

    process: "subprocess.Popen[str]"
    url: str
    bookings: str

    @property
    def meetings(self) -> str:
        """The URL that controls meetings in the sandbox."""
        return self.bookings.replace("/bookings", "/meetings")

    def get(self, path: str, *, until: int) -> list[dict[str, Any]]:
        """Return a list from the service once it has ``until`` rows, or after ten seconds."""
        deadline = time.monotonic() + 10
        rows: list[dict[str, Any]] = []
        while len(rows) < until and time.monotonic() < deadline:
            try:
                rows = httpx.get(f"{self.url}{path}").raise_for_status().json()
            except httpx.ConnectError:
                rows = []  # it is still starting
            time.sleep(0.05)
        return rows

    def stop(self) -> tuple[int, str, str]:
        """Press Ctrl-C; return the exit status, the access log and standard error."""
        self.process.send_signal(signal.SIGINT)
        access_log, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, access_log, stderr


@pytest.fixture
def example() -> Iterator[Example]:
    """Start the example service."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--sandbox", "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        found = re.search(r"POST (\S+)", process.stdout.readline())
        assert found is not None
        yield Example(process, f"http://127.0.0.1:{port}", found[1])
        process.kill()


def test_booking_arrives(example: Example) -> None:
    """A booking arrives through a real hook; the service stops without errors and logs no token."""
    before = example.get("/meetings", until=1)
    canceled = httpx.post(f"{example.meetings}/{before[0]['_id']}/cancel").raise_for_status().json()
    booked = httpx.post(example.bookings, json={}).raise_for_status().json()
    assert [booked] == example.get("/bookings", until=1)
    # The delivery woke the synchronization, which also found the cancellation, for which there is no hook.
    changes = {change["kind"]: change["meeting"] for change in example.get("/changes", until=2)}
    assert {"created": booked, "canceled": canceled} == changes
    assert len(before) == len(example.get("/meetings", until=len(before)))
    status, access_log, stderr = example.stop()
    assert (0, []) == (status, [line for line in stderr.splitlines() if not line.startswith("INFO")])
    assert 'POST /webhooks/lemcal?token=hidden HTTP/1.1" 200' in access_log
