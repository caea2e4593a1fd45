"""From many accounts to a CRM: contacts are found by the guest's e-mail, and each change is applied once.

Run it with ``python examples/sync_crm.py``. The CRM is simulated, and fails now and then. Each run
redelivers, in order, the changes that it did not accept, until the CRM has all of them.
"""

import logging
import tempfile
from pathlib import Path

import anyio

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, SQLStore, sync_meetings


class Crm:
    """A CRM that stores meetings by the contact's e-mail address."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, str]] = {}
        self._applied: set[int] = set()
        self._calls = 0

    async def apply(self, change: Change) -> None:
        """Apply a change. A change may be delivered twice: its ``seq`` shows whether it is new."""
        self._calls += 1
        if self._calls % 7 == 0:
            raise ConnectionError("the CRM does not respond")
        if change.seq in self._applied:
            return
        guest = change.meeting.guest  # not "the first attendee", who is often the host
        if guest is not None and guest.email is not None:
            gone = change.kind in ("canceled", "disappeared") or change.meeting.is_canceled
            stages = self.stages.setdefault(guest.email, {})
            stages[change.meeting_id] = "lost" if gone else "meeting booked"
        self._applied.add(change.seq)


async def main() -> None:
    """Synchronize until the CRM has every change."""
    logging.getLogger("lemcal_async.sync").setLevel(logging.CRITICAL)  # the failures are printed below
    crm = Crm()
    with Sandbox(accounts=3).serve() as sandbox, tempfile.TemporaryDirectory() as folder:
        async with sandbox.client() as lemcal, SQLStore(f"sqlite:///{Path(folder) / 'lemcal.db'}") as store:
            accounts = [lemcal.for_account(account.user_id, account.api_key) for account in sandbox.accounts]
            while True:
                report = await sync_meetings(accounts, store, on_change=crm.apply)
                print(f"{report.delivered} changes were delivered, {report.failed} accounts have more")
                for failure in report.failures:
                    print(f"  {failure}")
                if not report.failed:
                    break
    meetings = [stage for stages in crm.stages.values() for stage in stages.values()]
    booked, lost = meetings.count("meeting booked"), meetings.count("lost")
    print(f"{len(crm.stages)} contacts: {booked} booked, {lost} lost")


if __name__ == "__main__":
    anyio.run(main)
