"""A typical program that uses the wheel without extras; run by ``clean_environments.py``."""

import asyncio
import os
import sys

from lemcal_async import AsyncLemcal, errors, from_wire, to_wire


async def main() -> None:
    """Read, write, and handle an error."""
    async with AsyncLemcal(base_url=os.environ["BASE_URL"]) as lemcal:
        user = await lemcal.me()
        meetings = await lemcal.meetings.list()
        assert meetings == [from_wire(to_wire(meeting), type(meeting)) for meeting in meetings]
        hook = await lemcal.hooks.create("https://you.example/hook", any_meeting_type=True)
        assert hook is not None
        await lemcal.hooks.delete(hook.id)
        try:
            await lemcal.meetings.get("mee_unknown")
        except errors.MeetingNotFoundError:
            sys.stdout.write(f"{user.email} has {len(meetings)} meetings\n")


asyncio.run(main())
