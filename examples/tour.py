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
    """Print a line at once, so that it stays in order with the log."""
    print(text, flush=True)


async def read(lemcal: AsyncLemcal) -> None:
    """Read what is booked, and tell the guest from the host."""
    say("1. Reading")
    user = await lemcal.me()
    meetings = await lemcal.meetings.list()
    canceled = sum(meeting.is_canceled for meeting in meetings)
    say(f"   {user.email} has {len(meetings)} meetings, {canceled} of them canceled. The first three:")
    for meeting in meetings[:3]:
        guest = meeting.guest.email if meeting.guest else "nobody"
        say(f"   {meeting.start:%Y-%m-%d %H:%M} UTC  {meeting.duration}  with {guest}")


async def burst(lemcal: AsyncLemcal, sandbox: Sandbox, calls: int) -> None:
    """Make far more calls at once than the service allows: the limiter spreads them out."""
    say(f"\n2. Rate limit: {calls} calls at once, where 20 per 2 seconds are allowed")
    before = len(sandbox.requests)
    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for _ in range(calls):
            tasks.start_soon(lemcal.me)
    seconds = time.monotonic() - started
    refused = sum(request.status_code == 429 for request in sandbox.requests[before:])
    say(f"   They took {seconds:.1f} s, and {refused} of them were refused (429).")
    budget = lemcal.rate_limit
    say(f"   Left now: {budget.remaining} of {budget.limit} requests, all again in {budget.resets_in:.1f} s.")


async def trouble(lemcal: AsyncLemcal, sandbox: Sandbox) -> None:
    """Meet a server that has a bad day: some errors are retried, the others say what is wrong."""
    say("\n3. Trouble: the sandbox refuses the next call, as if somebody else had used up the limit.")
    say("   In the log: the limiter did not expect this and becomes careful; it pauses; the call is retried.")
    sandbox.inject(faults.too_many_requests(retry_after="0.3"))
    user = await lemcal.me()
    say(f"   The call succeeded all the same: {user.email}.")

    say(
        "\n   Now a response that is not JSON, as from a wrong base URL. It is an error, not an empty result:"
    )
    sandbox.inject(faults.html_200())
    try:
        await lemcal.me()
    except errors.ResponseDecodeError as error:
        say(f"   {type(error).__name__}: {error}")

    say("\n   And a meeting that does not exist:")
    try:
        await lemcal.meetings.get("mee_unknown")
    except errors.MeetingNotFoundError as error:
        say(f"   {type(error).__name__}: {error}")


SUMMARY = """
What you have seen: typed models, a rate limiter that keeps within the quota, retries, and errors that say
what to do. None of it needed an account: the service was the sandbox that comes with the package.

Where to go next:
  docs/index.md           what there is, and the first lines of your own
  docs/sync.md            keep a database in sync, and act on each change
  docs/webhooks.md        receive bookings within a second
  docs/try-it.md          the sandbox's page: watch the requests, book, cancel, break things
"""


async def main() -> None:
    """Show it all."""
    with Sandbox().serve() as sandbox:
        say(f"A tour on the sandbox, which listens on {sandbox.base_url}\n")
        async with sandbox.client() as lemcal:
            await read(lemcal)
            await burst(lemcal, sandbox, calls=50)
            await trouble(lemcal, sandbox)
    say(SUMMARY)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="     log: %(message)s")
    logging.getLogger("lemcal_async").setLevel(logging.INFO)
    anyio.run(main)
