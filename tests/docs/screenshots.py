"""Takes the screenshots for the documentation: ``python tests/docs/screenshots.py``.

They show the page of a busy sandbox in light and dark. Requires Chromium with its driver, and Selenium.
"""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import chromium, resize, use_colors

from lemcal_async.sandbox import Sandbox, faults

FOLDER = Path(__file__).parents[2] / "docs" / "img"
WIDTH, HEIGHT = 1280, 900


class Receiver(BaseHTTPRequestHandler):
    """Receives the sandbox's deliveries."""

    def do_POST(self) -> None:
        """Receive a delivery."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def use(sandbox: Sandbox) -> None:
    """Send the requests of a busy client within the rate limit, and of another client that exceeds it."""
    known, other = (
        httpx.Client(base_url=sandbox.base_url, auth=(account.user_id, account.api_key), trust_env=False)
        for account in sandbox.accounts
    )
    for _ in range(2):
        for _ in range(19):
            known.get("/me")
            time.sleep(0.06)
        time.sleep(1)
    for _ in range(26):
        other.get("/meetings")
    sandbox.inject(faults.status(503), path="/meetingTypes")
    known.get("/meetingTypes")
    known.get("/meetings")
    sandbox.book(guest="Ada Lovelace <ada@example.org>")
    sandbox.wait_for_deliveries(len(sandbox.deliveries) + 1, timeout=30)


def take(browser: Any, sandbox: Sandbox, scheme: str) -> None:
    """Take a screenshot in one color scheme."""
    resize(browser, WIDTH, HEIGHT)
    use_colors(browser, scheme)
    browser.get(sandbox.url)
    use(sandbox)
    time.sleep(0.5)  # wait for the last rows and for the rate limit chart
    browser.save_screenshot(str(FOLDER / f"sandbox-{scheme}.png"))


def main() -> None:
    """Take all screenshots."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver,
        Sandbox(accounts=2).serve() as sandbox,
        chromium(width=WIDTH, height=HEIGHT) as browser,
    ):
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        for account in range(2):
            sandbox.book(account, guest="Léa Sample <lea.sample@example.org>")
        sandbox.add_hook(f"http://127.0.0.1:{receiver.server_port}/webhooks/lemcal?token=secret")
        for scheme in ("light", "dark"):
            take(browser, sandbox, scheme)
        receiver.shutdown()


if __name__ == "__main__":
    main()
