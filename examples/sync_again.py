"""The second half of a synchronization: things happen, ``lemcal sync`` runs again, and tells them apart.

Run it after ``lemcal sync --sandbox``, which has filled the database: with ``python examples/sync_again.py``
and the same ``LEMCAL_DB``. The sandbox invents the same account each time, so this is the same one later.
"""

import os
from datetime import UTC, datetime

import anyio

from lemcal_async.cli import main as lemcal
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import SQLStore


def live(sandbox: Sandbox) -> None:
    """Let things happen at the service; webhooks only announce the bookings."""
    first, second, third, *_ = (row["_id"] for row in sandbox.meetings() if "canceledAt" not in row)
    sandbox.book()
    sandbox.book(public=False)
    sandbox.edit(first, start="2026-03-02T09:00:00.000Z", end="2026-03-02T09:30:00.000Z")
    sandbox.cancel(second)
    sandbox.remove(third)


async def show(url: str, since: datetime) -> None:
    """Print the changes found since then."""
    async with SQLStore(url) as store:
        async for change in store.changes():
            if change.found_at >= since:
                guest, fields = change.meeting.guest, ", ".join(change.fields)
                print(f"  {change.kind:<12} {guest.email if guest else '':<30} {fields}")


def main() -> None:
    """Let things happen, synchronize, and print what changed."""
    url = os.environ.setdefault("LEMCAL_DB", "sqlite:///lemcal-sandbox.db")
    with Sandbox().serve() as sandbox:
        os.environ["LEMCAL_USER_ID"], os.environ["LEMCAL_API_KEY"] = sandbox.user_id, sandbox.api_key
        live(sandbox)
        print("Two bookings, one moved, one canceled, one gone. And again:", flush=True)
        since = datetime.now(UTC)
        if status := lemcal(["sync", "--base-url", sandbox.base_url]):
            raise SystemExit(status)
        anyio.run(show, url, since)


if __name__ == "__main__":
    main()
