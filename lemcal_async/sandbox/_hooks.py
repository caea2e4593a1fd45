"""Webhook delivery: a real POST of the meeting's JSON to each target, in the background.

Like the service (observed), it posts the meeting at top level, without a signature. It never retries;
whether the service does is unknown. Which hooks fire is decided in ``_state.py``.
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

KEPT: Final = 10_000
"""How many deliveries are kept, the newest; so are their bodies, to deliver them again."""

_RESPONSE_BYTES: Final = 65_536  # of a receiver's answer that are read


@attrs.frozen
class Delivery:
    """A finished delivery.

    Attributes:
        at: The sandbox's clock at the end.
        hook_id: Id of the hook (``hoo_…``).
        meeting_id: Id of the meeting (``mee_…``).
        status_code: The status of the receiver's answer; None if there was none.
        error: The kind of failure, if there was no answer.
        target: Where it went, without query, fragment and user info: those may hold a token.
        response: The body of the receiver's answer.
        seconds: How long the delivery took.
        repeats: The number of the delivery that this one repeats, if any.
        time: The time of day at the end.
        number: Counts deliveries from 1.
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
    """Delivers in a few threads, which end when there is nothing left to send."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # guards all that follows
        self._jobs: deque[_Job] = deque()
        self._done: dict[int, _Job] = {}  # the jobs of the deliveries, by their numbers
        self._threads: set[threading.Thread] = set()
        self._running: dict[asyncio.Future[_Outcome], asyncio.AbstractEventLoop] = {}
        self._finished = 0
        self._closing = False
        self.deliveries = Journal[Delivery](KEPT)

    def send(self, hook: dict[str, Any], meeting_id: str, body: bytes) -> None:
        """Queue ``body`` for the hook's target, and return at once."""
        self._queue(_Job(hook["_id"], hook["targetUrl"], meeting_id, body))

    def send_again(self, number: int) -> None:
        """Queue a delivery once more, to the same target; LookupError if it is not known."""
        with self._changed:
            job = self._done.get(number)
        if job is None:
            raise LookupError(f"there is no delivery {number}")
        self._queue(attrs.evolve(job, repeats=number))

    def _queue(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            if len(self._threads) < WORKERS:  # a superfluous one ends at once
                thread = threading.Thread(target=self._work, name="lemcal-sandbox-hooks", daemon=True)
                self._threads.add(thread)
                thread.start()

    def wait_for(self, count: int, timeout: float) -> list[Delivery]:
        """Wait until ``count`` deliveries have finished; TimeoutError after ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished >= count, timeout):
                finished = self._finished
                raise TimeoutError(f"{finished} of {count} hook deliveries finished within {timeout} s")
        return self.deliveries.snapshot()

    def close(self) -> None:
        """Drop queued deliveries, abort those under way, and wait for the threads to end."""
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
            with contextlib.suppress(asyncio.CancelledError):  # aborted by close()
                asyncio.run(self._deliver(job))

    async def _deliver(self, job: _Job) -> None:
        started = self._clock()
        posting = asyncio.ensure_future(_post(job))
        with self._changed:
            if self._closing:
                posting.cancel()
            self._running[posting] = asyncio.get_running_loop()
        try:
            outcome = await posting
        finally:
            with self._changed:
                del self._running[posting]
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
            self._done[number] = job
            self._done.pop(number - KEPT, None)
            self._finished += 1
            self._changed.notify_all()


async def _post(job: _Job) -> _Outcome:
    # Only the transport: a client would log the target, token included.
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
                if len(body) >= _RESPONSE_BYTES:
                    break
            await response.aclose()
    except Exception as error:  # noqa: BLE001  # whatever it is becomes the outcome of the delivery
        return _Outcome(None, type(error).__name__)
    return _Outcome(response.status_code, None, body_text(body))


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # some 20 ms each
