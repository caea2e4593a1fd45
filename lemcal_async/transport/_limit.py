"""The rate-limit layer: asks the limiter before each request, and reports how the request ended.

The request says whose budget it draws on, so one stack serves every account.
"""

import anyio
import httpx

from lemcal_async._headers import parse_raw_quota
from lemcal_async.errors import LemcalError, RateLimitError
from lemcal_async.ratelimit import Key, Permit, RateLimiter, WouldWait, default_limiter
from lemcal_async.ratelimit._base import key_of
from lemcal_async.transport._call import CallState, SendTracer, call_of
from lemcal_async.transport._errors import deadline_error, guard
from lemcal_async.transport._interop import Layer, Wire, answer_httpx2


class RateLimitTransport(Layer):
    """Limits the requests through any other transport, in any ``httpx.AsyncClient``.

    ``limiter`` is the process-wide one unless given. The layer never retries: below a
    ``RetryTransport``, a refused request keeps its place in the queue.

    Raises DeadlineExceededError if the wait is known to be longer than the call's deadline, and
    RateLimitError while the server refuses the key for longer than a minute. Canceled before the
    request has left, it gives its slot back; canceled later, the slot counts as used.
    """

    def __init__(self, wire: Wire, limiter: RateLimiter | None = None) -> None:
        super().__init__(wire)
        self._limiter = limiter

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limiter or default_limiter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Wait for the request's turn, send it, and report how it ended."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await answer_httpx2(self, request)
        call = call_of(request)
        while True:
            response = await self._attempt(call, request)
            if response is not None:
                return response

    async def _attempt(self, call: CallState, request: httpx.Request) -> httpx.Response | None:
        """Return None if the permit ran out before the request left, because this process stood still."""
        tracer = call.tracer or SendTracer(request)
        tracer.entered = tracer.lapsed = False
        permit = await self._acquire(call, request)
        tracer.permit = permit
        tracer.enter(self._wire)
        call.refused = None
        try:
            response = await guard(call, self._wire.handle_async_request(request))
        except BaseException as error:
            # Nothing in here waits, so it holds under cancellation too.
            if tracer.proves_unsent():
                permit.unsent()
            else:
                permit.unknown()
            if tracer.lapsed and isinstance(error, Exception):
                call.refused = permit  # the next attempt goes first
                return None
            raise
        finally:
            if call.tracer is None:
                tracer.remove()
        call.quota = parse_raw_quota(response.headers.raw)
        call.held = permit.answered(response.status_code, call.quota)
        if response.status_code == 429:
            call.refused = permit
        return response

    async def _acquire(self, call: CallState, request: httpx.Request) -> Permit:
        key = call.key or key_of(str(request.url), request.headers.get("authorization", ""))
        asked = anyio.current_time()
        try:
            return await self.limiter.acquire(
                key, priority=call.priority, timeout=call.time_left(), again=call.refused
            )
        except WouldWait as reason:
            wait = reason
        finally:
            call.waited += anyio.current_time() - asked
        raise self._refusal(call, key, wait)

    def _refusal(self, call: CallState, key: Key, wait: WouldWait) -> LemcalError:
        if not wait.refused:
            left = max(0.0, call.time_left() or 0.0)
            return deadline_error(
                call,
                f"the rate limit's queue is {wait.seconds:.3g} s long, and only {left:.3g} s are left "
                "of the deadline",
                "allow more, or send fewer calls at once",
                retry_after=wait.seconds,
            )
        return RateLimitError(
            f"{call}: the server refuses this key for another {wait.seconds:.0f} s (429); "
            "do not call before that, and find out who else uses the key",
            call=call.info(),
            retry_after=wait.seconds,
            limit=self.limiter.snapshot(key).limit,
            remaining=0,
        )
