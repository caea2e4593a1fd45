"""Delivery of hooks: a real POST of the meeting's JSON to every target, in the background.

Like the service (observed): the meeting at top level, no signature. Nothing is tried twice; whether the
service does is unknown. Which hooks fire is the world's business.
"""

import asyncio
import contextlib
import functools
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import attrs
import httpx

WORKERS: Final = 8
TIMEOUT: Final = 5.0
"""Seconds for a whole delivery."""


@attrs.frozen
class Delivery:
    """How a delivery ended.

    ``at`` is the sandbox's clock at the end; ``status`` is what the receiver answered, None if it gave
    no answer, and then ``error`` is the kind of failure. The target is not here: it may hold a token.
    """

    at: float
    hook_id: str
    meeting_id: str
    status: int | None
    error: str | None


@attrs.frozen
class _Job:
    hook_id: str
    target_url: str = attrs.field(repr=False)
    meeting_id: str
    body: bytes = attrs.field(repr=False)


class HookSender:
    """Sends in a few threads, which end by themselves when there is nothing more to send."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # guards all that follows
        self._jobs: deque[_Job] = deque()
        self._threads: set[threading.Thread] = set()
        self._running: dict[asyncio.Future[tuple[int | None, str | None]], asyncio.AbstractEventLoop] = {}
        self._deliveries: list[Delivery] = []
        self._closing = False

    def send(self, hook: dict[str, Any], meeting_id: str, body: bytes) -> None:
        """Deliver ``body`` to the hook's target soon; returns at once."""
        with self._changed:
            self._jobs.append(_Job(hook["_id"], hook["targetUrl"], meeting_id, body))
            if len(self._threads) < WORKERS:  # one too many ends at once
                thread = threading.Thread(target=self._work, name="lemcal-sandbox-hooks", daemon=True)
                self._threads.add(thread)
                thread.start()

    def snapshot(self) -> list[Delivery]:
        """Return the deliveries that have ended, in the order of their ends."""
        with self._changed:
            return list(self._deliveries)

    def wait_for(self, count: int, timeout: float) -> list[Delivery]:
        """Wait until ``count`` deliveries have ended; TimeoutError after ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._deliveries) >= count, timeout):
                ended = len(self._deliveries)
                raise TimeoutError(f"{ended} of {count} hook deliveries ended within {timeout} s")
            return list(self._deliveries)

    def close(self) -> None:
        """Drop what has not been sent, break off what is being sent, and wait for the threads."""
        with self._changed:
            self._closing = True
            self._jobs.clear()
            for posting, loop in self._running.items():
                loop.call_soon_threadsafe(posting.cancel)
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        with self._changed:
            self._closing = False

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._threads.discard(threading.current_thread())
                    return
                job = self._jobs.popleft()
            with contextlib.suppress(asyncio.CancelledError):  # broken off by close()
                asyncio.run(self._deliver(job))

    async def _deliver(self, job: _Job) -> None:
        posting = asyncio.ensure_future(_post(job))
        with self._changed:
            if self._closing:
                posting.cancel()
            self._running[posting] = asyncio.get_running_loop()
        try:
            status, error = await posting
        finally:
            with self._changed:
                del self._running[posting]
        delivery = Delivery(self._clock(), job.hook_id, job.meeting_id, status, error)
        with self._changed:
            self._deliveries.append(delivery)
            self._changed.notify_all()


async def _post(job: _Job) -> tuple[int | None, str | None]:
    # The transport alone: a client would log the target, token and all.
    try:
        request = httpx.Request(
            "POST",
            job.target_url,
            content=job.body,
            headers={"Content-Type": "application/json", "User-Agent": "lemcal-sandbox"},
            extensions={"timeout": httpx.Timeout(TIMEOUT).as_dict()},
        )
        async with (
            asyncio.timeout(TIMEOUT),
            httpx.AsyncHTTPTransport(verify=_ssl_context(), trust_env=False) as transport,
        ):
            response = await transport.handle_async_request(request)
            await response.aclose()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is reported as the delivery's outcome
        return None, type(error).__name__
    return response.status_code, None


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # some 20 ms each
