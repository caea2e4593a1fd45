"""Synchronize a second time: change meetings in the sandbox, run ``lemcal sync`` again, and list the changes.

Run ``lemcal sync --sandbox`` first to fill the database, then ``python examples/sync_again.py`` with the same
``LEMCAL_DB``. The sandbox creates the same account each time, so the second run continues with its data.
"""

import os
from datetime import UTC, datetime, timedelta

import anyio

from lemcal_async.cli import main as lemcal
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import SQLStore


def change_meetings(sandbox: Sandbox) -> None:
    """Book, move, cancel and remove meetings; the service announces only the bookings."""
    first, second, third, *_ = (row for row in sandbox.meetings() if "canceledAt" not in row)
    sandbox.book()
    sandbox.book(public=False)
    start = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
    sandbox.edit(first, start=start, end=start + timedelta(minutes=30))
    sandbox.cancel(second)
    sandbox.remove(third)


async def show(url: str, since: datetime) -> None:
    """Print the changes found since a time."""
    async with SQLStore(url) as store:
        async for change in store.changes():
            if change.found_at >= since:
                guest, fields = change.meeting.guest, ", ".join(change.fields)
                print(f"  {change.kind:<12} {guest.email if guest else '':<30} {fields}")


def main() -> None:
    """Change meetings, synchronize, and print the changes."""
    url = os.environ.setdefault("LEMCAL_DB", "sqlite:///lemcal-sandbox.db")
    with Sandbox().serve() as sandbox:
        os.environ["LEMCAL_USER_ID"], os.environ["LEMCAL_API_KEY"] = sandbox.user_id, sandbox.api_key
        change_meetings(sandbox)
        print("Since then: two bookings, one meeting moved, one canceled, one removed. Synchronizing again:")
        print(flush=True)
        since = datetime.now(UTC)
        if status := lemcal(["sync", "--base-url", sandbox.base_url]):
            raise SystemExit(status)
        print("\nThe changes found, with the guest and the changed fields:")
        anyio.run(show, url, since)


if __name__ == "__main__":
    main()
