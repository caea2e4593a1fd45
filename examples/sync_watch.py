"""Synchronize every hour, and immediately when a webhook arrives.

Run it with ``python examples/sync_watch.py``. A booking is found within moments, because its webhook wakes
the watch. The same run finds the cancellation, which lemcal never announces.
"""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import anyio

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, MemoryStore, SyncReport, Wake, watch


class Signal(BaseHTTPRequestHandler):
    """Treats a webhook as a signal: anybody could have sent it, so it only triggers a synchronization."""

    def __init__(self, wake: Wake, *connection: object) -> None:
        self._wake = wake
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_POST(self) -> None:  # http.server's name
        """Wake the watch, which runs in another thread, and respond."""
        self._wake.wake()
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
        """Log nothing."""


async def main() -> None:
    """Watch, change meetings, and print the changes."""
    wake = Wake()

    def on_change(change: Change) -> None:
        print(f"{change.kind} {change.meeting_id}")

    with (
        Sandbox(meetings=3).serve() as sandbox,
        HTTPServer(("127.0.0.1", 0), partial(Signal, wake)) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        async with sandbox.client() as lemcal, anyio.create_task_group() as tasks:
            await lemcal.hooks.create(f"http://127.0.0.1:{server.server_port}/", any_meeting_type=True)
            runs = 0

            async def on_report(report: SyncReport) -> None:
                nonlocal runs
                report.raise_for_failures()
                runs += 1
                if runs == 1:
                    sandbox.cancel(sandbox.meetings()[0]["_id"])
                    sandbox.book()
                else:
                    tasks.cancel_scope.cancel()

            await watch(
                [lemcal], MemoryStore(), interval=3600, wake=wake, on_change=on_change, on_report=on_report
            )
        server.shutdown()


if __name__ == "__main__":
    anyio.run(main)
