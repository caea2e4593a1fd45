"""A tour of the client on the sandbox: real HTTP on loopback, no account needed.

Run it with ``python examples/tour.py``; it takes about five seconds.
"""

import logging
import time

import anyio

from lemcal_async import AsyncLemcal, errors
from lemcal_async.sandbox import Sandbox, faults


async def read(lemcal: AsyncLemcal) -> None:
    """Read what there is, and tell guest from host."""
    user = await lemcal.me()
    meetings = await lemcal.meetings.list()
    print(
        f"{user.email} has {len(meetings)} meetings, {sum(m.is_canceled for m in meetings)} of them canceled"
    )
    for meeting in meetings[:3]:
        guest = meeting.guest.email if meeting.guest else "nobody"
        print(f"  {meeting.start:%Y-%m-%d %H:%M} UTC  {meeting.duration}  with {guest}")


async def burst(lemcal: AsyncLemcal, sandbox: Sandbox, calls: int) -> None:
    """Make far more calls at once than the service takes: the limiter spreads them."""
    before = len(sandbox.requests)
    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for _ in range(calls):
            tasks.start_soon(lemcal.me)
    seen = list(sandbox.requests)[before:]
    refused = sum(request.status == 429 for request in seen)
    print(f"{calls} calls at once took {time.monotonic() - started:.1f} s; {refused} were refused (429)")


async def trouble(lemcal: AsyncLemcal, sandbox: Sandbox) -> None:
    """Meet a server that has a bad day: some of it is retried, the rest says what is wrong."""
    sandbox.inject(faults.too_many_requests(retry_after="0.3"))
    await lemcal.me()
    sandbox.inject(faults.html_200())
    try:
        await lemcal.me()
    except errors.ResponseDecodeError as error:
        print(f"ResponseDecodeError: {error}")
    try:
        await lemcal.meetings.get("mee_unknown")
    except errors.MeetingNotFoundError as error:
        print(f"MeetingNotFoundError: {error}")


async def main() -> None:
    """Show it all."""
    with Sandbox().serve() as sandbox:
        print(f"The sandbox listens on {sandbox.base_url}")
        async with sandbox.client() as lemcal:
            await read(lemcal)
            await burst(lemcal, sandbox, calls=50)
            await trouble(lemcal, sandbox)
            print(lemcal.rate_limit)


if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("lemcal_async").setLevel(logging.INFO)
    anyio.run(main)
