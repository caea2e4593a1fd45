"""A tour of the client on the sandbox: real HTTP on loopback, no account needed.

Run it with ``python examples/tour.py``; it takes about five seconds.
"""

import logging
import sys
import time

import anyio

from lemcal_async import AsyncLemcal, errors
from lemcal_async.sandbox import Sandbox, faults


def say(text: str = "") -> None:
    """Print and flush a line, so that it stays in order with the log."""
    print(text, flush=True)


async def read(lemcal: AsyncLemcal) -> None:
    """List the meetings and their guests."""
    say("1. Reading")
    user = await lemcal.me()
    meetings = await lemcal.meetings.list()
    canceled = sum(meeting.is_canceled for meeting in meetings)
    say(f"   {user.email} has {len(meetings)} meetings, {canceled} of them canceled. The first three:")
    for meeting in meetings[:3]:
        guest = meeting.guest.email if meeting.guest else "nobody"
        say(f"   {meeting.start:%Y-%m-%d %H:%M} UTC  {meeting.duration}  with {guest}")


async def burst(lemcal: AsyncLemcal, sandbox: Sandbox, calls: int) -> None:
    """Make more concurrent calls than the service allows: the limiter spreads them out."""
    say(f"\n2. Rate limit: {calls} concurrent calls; the service allows 20 per 2 seconds")
    before = len(sandbox.requests)
    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for _ in range(calls):
            tasks.start_soon(lemcal.me)
    seconds = time.monotonic() - started
    refused = sum(request.status_code == 429 for request in sandbox.requests[before:])
    say(f"   The calls took {seconds:.1f} s, and {refused} of them were refused (429).")
    budget = lemcal.rate_limit
    say(f"   {budget.remaining} of {budget.limit} requests left, limit resets in {budget.resets_in:.1f} s.")


async def failures(lemcal: AsyncLemcal, sandbox: Sandbox) -> None:
    """Handle failures of the server: some are retried, the others raise errors that explain the problem."""
    say("\n3. Failures: the sandbox refuses the next call, as if another client had used up the limit.")
    say("   In the log: the limiter did not expect this, becomes careful, and pauses; the call is retried.")
    sandbox.inject(faults.too_many_requests(retry_after="0.3"))
    user = await lemcal.me()
    say(f"   The call still succeeded: {user.email}.")

    say("\n   Next, HTML instead of JSON, as from a wrong base URL. It is an error, not an empty result:")
    sandbox.inject(faults.html_200())
    try:
        await lemcal.me()
    except errors.ResponseDecodeError as error:
        say(f"   {type(error).__name__}: {error}")

    say("\n   Finally, a meeting that does not exist:")
    try:
        await lemcal.meetings.get("mee_unknown")
    except errors.MeetingNotFoundError as error:
        say(f"   {type(error).__name__}: {error}")


SUMMARY = """
You have seen typed models, a rate limiter that stays within the quota, retries, and errors that say what to
do. None of this needed an account: the service was the sandbox that comes with the package.

Where to go next:
  docs/index.md           an overview and a first program
  docs/sync.md            keep a database in sync, and act on each change
  docs/webhooks.md        receive bookings within a second
  docs/try-it.md          the sandbox's page: watch requests, book and cancel meetings, inject faults
"""


async def main() -> None:
    """Run the tour."""
    with Sandbox().serve() as sandbox:
        say(f"A tour of the client, on a sandbox at {sandbox.base_url}\n")
        async with sandbox.client() as lemcal:
            await read(lemcal)
            await burst(lemcal, sandbox, calls=50)
            await failures(lemcal, sandbox)
    say(SUMMARY)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="     log: %(message)s")
    logging.getLogger("lemcal_async").setLevel(logging.INFO)
    anyio.run(main)
