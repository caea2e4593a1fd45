"""A service in separate processes with a database: two workers, and a killed process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx
import pytest
from redis_server import RedisServer

from lemcal_async.sandbox import Sandbox

TESTS = Path(__file__).parents[1]
TOKEN = "wh-token-8Lp3-quiet"


@attrs.frozen
class Service:
    """A running service, with methods to deliver to it."""

    process: "subprocess.Popen[str]"
    port: int
    handled: Path

    def deliver(self, meeting_id: str) -> tuple[int | None, str | None]:
        """Deliver on a new connection; return the status and the process, or None without a response."""
        url = f"http://127.0.0.1:{self.port}/hook"
        try:
            response = httpx.post(url, params={"token": TOKEN}, json={"_id": meeting_id}, timeout=20)
        except httpx.TransportError:
            return None, None
        return response.status_code, response.headers["x-process"]

    def listens(self) -> bool:
        """Return whether the service responds."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/hook").status_code == 405
        except httpx.TransportError:
            return False

    def deliver_until_handled(self, meeting_id: str) -> str:
        """Deliver repeatedly until a 200; return the process that sent it."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            status, process = self.deliver(meeting_id)
            if status == 200 and process is not None:
                return process
            time.sleep(0.1)
        raise TimeoutError(meeting_id)

    def counts(self) -> Counter[str]:
        """Return the number of times each meeting was handled."""
        lines = self.handled.read_text().splitlines() if self.handled.exists() else []
        return Counter(line.split()[1] for line in lines)


@contextmanager
def running(sandbox: Sandbox, folder: Path, *, workers: int = 1, **more: str) -> Iterator[Service]:
    """Start the service, and stop it after the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "BASE_URL": sandbox.base_url,
        "LEMCAL_USER_ID": sandbox.user_id,
        "LEMCAL_API_KEY": sandbox.api_key,
        "DATABASE": f"sqlite:///{folder / 'memory.db'}",
        "HANDLED": str(folder / "handled"),
        "TOKEN": TOKEN,
        **more,
    }
    command = [sys.executable, "-W", "error", "-m", "uvicorn", "webhooks.service:app"]
    command += ["--app-dir", str(TESTS), "--port", str(port), "--workers", str(workers), "--no-access-log"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        service = Service(process, port, folder / "handled")
        try:
            deadline = time.monotonic() + 30
            while not service.listens():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                _, stderr = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    # With several workers, uvicorn never closes the listening socket, which causes a ResourceWarning. The
    # receiver logs meetings that are late on a slow machine.
    expected = re.compile(rf"INFO|meeting mee_|.*laddr=\('127.0.0.1', {port}\)")
    assert [] == [line for line in stderr.splitlines() if not expected.match(line)]


def test_two_workers_handle_meetings_once(tmp_path: Path) -> None:
    """A repeated delivery that reaches the other worker is not handled again."""
    with Sandbox().serve() as sandbox, running(sandbox, tmp_path, workers=2) as service:
        booked = [sandbox.book()["_id"] for _ in range(8)]
        with ThreadPoolExecutor(24) as senders:
            list(senders.map(service.deliver_until_handled, booked * 3))
        for meeting_id in booked[:2]:
            processes: set[str] = set()
            for _ in range(100):
                processes.add(service.deliver_until_handled(meeting_id))
                if len(processes) == 2:
                    break
            assert 2 == len(processes)
        assert dict.fromkeys(booked, 1) == service.counts()


@pytest.fixture
def redis() -> Iterator[str]:
    """Run a real Redis, and return its URL."""
    with RedisServer() as server:
        yield server.url


@pytest.mark.storm
def test_two_workers_share_the_limit(tmp_path: Path, redis: str) -> None:
    """Calls and deliveries together stay within the limit, and each meeting is still handled once."""
    with Sandbox().serve() as sandbox, running(sandbox, tmp_path, workers=2, REDIS=redis) as service:
        booked = [sandbox.book()["_id"] for _ in range(5)]

        def call(_: int) -> str:
            response = httpx.get(f"http://127.0.0.1:{service.port}/me", timeout=30)
            return response.raise_for_status().headers["x-process"]

        with ThreadPoolExecutor(60) as senders:
            calls = [senders.submit(call, number) for number in range(50)]
            deliveries = [senders.submit(service.deliver_until_handled, id_) for id_ in booked * 2]
            processes = {each.result() for each in calls}
            for each in deliveries:
                each.result()
        for number in range(50):  # one worker may have accepted all connections so far
            processes |= set() if len(processes) == 2 else {call(number)}
        assert 2 == len(processes)
        assert dict.fromkeys(booked, 1) == service.counts()
    seen = [request for request in sandbox.requests if request.status_code is not None]
    assert len(seen) > 50
    assert [] == [request.path for request in seen if request.status_code == 429]


@pytest.mark.storm
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_kill_during_burst(tmp_path: Path) -> None:
    """No meeting is lost, and none that got a 200 is handled again."""
    with Sandbox().serve() as sandbox:
        booked = [sandbox.book()["_id"] for _ in range(60)]
        with running(sandbox, tmp_path) as service, ThreadPoolExecutor(20) as senders:
            first = [senders.submit(service.deliver, meeting_id) for meeting_id in booked]
            while sum(service.counts().values()) < 10:
                time.sleep(0.002)
            service.process.kill()
            responses = dict(zip(booked, [each.result()[0] for each in first], strict=True))
        lost = [meeting_id for meeting_id, status in responses.items() if status != 200]
        assert lost
        with running(sandbox, tmp_path) as service, ThreadPoolExecutor(20) as senders:
            list(senders.map(service.deliver_until_handled, booked))
            counts = service.counts()
    assert set(booked) == set(counts)
    # Only meetings without a response before the kill may be handled twice (at least once).
    assert {meeting_id for meeting_id, count in counts.items() if count > 1} <= set(lost)
    assert max(counts.values()) <= 2
