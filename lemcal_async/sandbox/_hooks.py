"""Webhook delivery: an HTTP POST of the meeting's JSON to each target, in the background.

As on the service (observed), the body is the meeting at the top level, without a signature. Deliveries are
never retried; whether the service retries is unknown. ``_state.py`` decides which hooks fire.
"""

import asyncio
import contextlib
import functools
import ssl
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import attrs
import httpx

from lemcal_async._urls import without_secrets
from lemcal_async.sandbox._log import Journal, body_text

WORKERS: Final = 8
TIMEOUT: Final = 5.0
"""The time limit for a whole delivery, in seconds."""

MAX_DELIVERIES: Final = 10_000
"""The number of deliveries that are kept, with their bodies so that they can be repeated."""

_MAX_RESPONSE_BYTES: Final = 65_536  # the sender reads no more of a receiver's response


@attrs.frozen
class Delivery:
    """A finished hook delivery.

    Attributes:
        at: The time on the sandbox's clock when the delivery finished.
        hook_id: The hook's id (``hoo_…``).
        meeting_id: The meeting's id (``mee_…``).
        status_code: The response's status code; None if there was no response.
        error: The exception's type name, if there was no response.
        target: The target URL without query, fragment and user info, which may contain a token.
        response: The response's body.
        seconds: The duration of the delivery.
        repeats: The number of the delivery that this one repeats, if any.
        time: The wall-clock time when the delivery finished.
        number: The delivery's number, counting from 1.
    """

    at: float
    hook_id: str
    meeting_id: str
    status_code: int | None
    error: str | None
    target: str = ""
    response: str = attrs.field(default="", repr=False)
    seconds: float = 0.0
    repeats: int | None = None
    time: datetime | None = None
    number: int = 0


@attrs.frozen
class _Job:
    hook_id: str
    target_url: str = attrs.field(repr=False)
    meeting_id: str
    body: bytes = attrs.field(repr=False)
    repeats: int | None = None


@attrs.frozen
class _Outcome:
    status_code: int | None
    error: str | None
    response: str = ""


class HookSender:
    """Sends deliveries in a few worker threads, which end when the queue is empty."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # guards the attributes below
        self._jobs: deque[_Job] = deque()
        self._finished_jobs: dict[int, _Job] = {}  # by delivery number
        self._threads: set[threading.Thread] = set()
        self._running: dict[asyncio.Future[_Outcome], asyncio.AbstractEventLoop] = {}
        self._finished_count = 0
        self._closing = False
        self.deliveries = Journal[Delivery](MAX_DELIVERIES)

    def send(self, hook: dict[str, Any], meeting_id: str, body: bytes) -> None:
        """Queue ``body`` for the hook's target, and return immediately."""
        self._enqueue(_Job(hook["_id"], hook["targetUrl"], meeting_id, body))

    def send_again(self, number: int) -> None:
        """Queue a delivery again. Raises LookupError if no delivery has this number."""
        with self._changed:
            job = self._finished_jobs.get(number)
        if job is None:
            raise LookupError(f"there is no delivery {number}")
        self._enqueue(attrs.evolve(job, repeats=number))

    def _enqueue(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            if len(self._threads) < WORKERS:  # a thread that finds no job ends immediately
                thread = threading.Thread(target=self._work, name="lemcal-sandbox-hooks", daemon=True)
                self._threads.add(thread)
                thread.start()

    def wait_for(self, count: int, timeout: float) -> list[Delivery]:
        """Wait until ``count`` deliveries have finished. Raises TimeoutError after ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished_count >= count, timeout):
                finished = self._finished_count
                raise TimeoutError(f"{finished} of {count} hook deliveries finished within {timeout} s")
        return self.deliveries.snapshot()

    def close(self) -> None:
        """Discard queued deliveries, abort running ones, and join the threads."""
        with self._changed:
            self._closing = True
            self._jobs.clear()
            for post, loop in self._running.items():
                loop.call_soon_threadsafe(post.cancel)
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
            with contextlib.suppress(asyncio.CancelledError):  # aborted by close()
                asyncio.run(self._deliver(job))

    async def _deliver(self, job: _Job) -> None:
        started = self._clock()
        post = asyncio.ensure_future(_post(job))
        with self._changed:
            if self._closing:
                post.cancel()
            self._running[post] = asyncio.get_running_loop()
        try:
            outcome = await post
        finally:
            with self._changed:
                del self._running[post]
        ended = self._clock()
        delivery = Delivery(
            ended,
            job.hook_id,
            job.meeting_id,
            outcome.status_code,
            outcome.error,
            target=without_secrets(job.target_url),
            response=outcome.response,
            seconds=ended - started,
            repeats=job.repeats,
            time=datetime.now(UTC),
        )
        with self._changed:
            number = self.deliveries.add(lambda number: attrs.evolve(delivery, number=number)).number
            self._finished_jobs[number] = job
            self._finished_jobs.pop(number - MAX_DELIVERIES, None)
            self._finished_count += 1
            self._changed.notify_all()


async def _post(job: _Job) -> _Outcome:
    # Use the bare transport: a client would log the target, including its token.
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
            body = b""
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) >= _MAX_RESPONSE_BYTES:
                    break
            await response.aclose()
    except Exception as error:  # noqa: BLE001  # any error is the delivery's outcome
        return _Outcome(None, type(error).__name__)
    return _Outcome(response.status_code, None, body_text(body))


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # takes about 20 ms
