"""The steps of the page "Try it": a booking made with a button reaches the example service in both ways."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import chromium

from lemcal_async.sandbox import Sandbox

from .conftest import Spawn
from .test_sync import posix_only, wait_until

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_app.py"
TOKEN = "a-long-random-string"


@pytest.fixture
def service(sandbox: Sandbox) -> Iterator[str]:
    """Run the FastAPI example against the sandbox in its own process, and return its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "LEMCAL_BASE_URL": sandbox.base_url,
        "WEBHOOK_TOKEN": TOKEN,
        "PUBLIC_URL": url,
    }
    command = [sys.executable, str(EXAMPLE), "--port", str(port)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: bool(sandbox.hooks()) and is_up(url))
        yield url
        process.terminate()


def is_up(url: str) -> bool:
    """Whether the service responds."""
    try:
        return httpx.get(f"{url}/bookings", trust_env=False).is_success
    except httpx.TransportError:
        return False


def completed_list_requests(sandbox: Sandbox, seen: int) -> int:
    """Return the number of completed requests for meetings after the first ``seen`` requests."""
    return sum(entry.path == "/meetings" and bool(entry.seconds) for entry in sandbox.requests[seen:])


def click_book(browser: Any, guest: str) -> None:
    """Book a meeting with the page's button."""
    field = browser.find_element("css selector", "#book input[name=guest]")
    field.clear()
    field.send_keys(guest)
    browser.find_element("css selector", "#book button").click()


@posix_only
def test_booking_button_reaches_service(service: str, sandbox: Sandbox, spawn: Spawn) -> None:
    """A booking reaches the service through the sandbox's hook, or without one through ``lemcal listen``."""

    def guests() -> list[str]:
        rows = httpx.get(f"{service}/bookings", trust_env=False).json()
        return [row["providedInfos"]["email"] for row in rows]

    with chromium() as browser:
        browser.get(sandbox.url)
        click_book(browser, "hooked@example.org")
        wait_until(lambda: guests() == ["hooked@example.org"])

        for hook in sandbox.hooks():
            sandbox.delete_hook(hook["_id"])
        target = f"{service}/webhooks/lemcal?token={TOKEN}"
        listening = spawn(
            "listen", "--forward-to", target, "--interval", "0.2", "--base-url", sandbox.base_url
        )
        assert listening.stdout is not None
        assert "watching" in listening.stdout.readline()
        seen = len(sandbox.requests)
        wait_until(
            lambda: 4 <= completed_list_requests(sandbox, seen)
        )  # the service requests the list once or twice, too
        click_book(browser, "listened@example.org")
        assert " 200 " in listening.stdout.readline()
        assert ["hooked@example.org", "listened@example.org"] == guests()
