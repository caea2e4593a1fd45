"""The rate-limit layer: asks the limiter before each request, and reports what became of it.

Which budget a request draws on is taken from the request, so one stack serves every account.
"""

from typing import Any

import anyio
import httpx

from lemcal_async._headers import parse_quota
from lemcal_async.errors import DeadlineExceededError, LemcalError, RateLimitError
from lemcal_async.ratelimit import Key, Permit, RateLimiter, WouldWait, default_limiter
from lemcal_async.ratelimit._base import key_of
from lemcal_async.transport._call import CallState, call_of

_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


class RateLimitTransport(httpx.AsyncBaseTransport):
    """Limits the requests through any other transport, in any ``httpx.AsyncClient``.

    ``limiter`` is the process-wide one unless given. The layer never retries: below a
    ``RetryTransport``, a refused request keeps its place in the queue.

    Raises DeadlineExceededError when the wait is known to be longer than the call's deadline, and
    RateLimitError while the server refuses the key for longer than a minute. Cancelled before the
    request has left, it gives its slot back; cancelled later, the slot counts as used.
    """

    def __init__(self, wire: httpx.AsyncBaseTransport, limiter: RateLimiter | None = None) -> None:
        self._wire = wire
        self._limiter = limiter
        self._wire_tells = False  # whether the wire has ever told when a request left

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limiter or default_limiter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Wait for the request's turn, send it, and report its end."""
        call = call_of(request)
        key = call.key or key_of(str(request.url), request.headers.get("authorization", ""))
        left = call.time_left()
        asked = anyio.current_time()
        permit: Permit | WouldWait
        try:
            permit = await self.limiter.acquire(key, priority=call.priority, timeout=left, again=call.refused)
        except WouldWait as reason:
            permit = reason
        finally:
            call.waited += anyio.current_time() - asked
        if isinstance(permit, WouldWait):
            raise self._refusal(call, key, permit, left or 0.0)
        departure = _SendTracer(permit, request.extensions.get("trace"))
        request.extensions["trace"] = departure
        call.refused = None
        call.sent = True  # until the wire says otherwise
        try:
            response = await self._wire.handle_async_request(request)
        except BaseException as error:
            # Nothing in here waits, so it holds under cancellation too.
            if departure.sent or not (isinstance(error, _NEVER_SENT) or self._wire_tells):
                call.maybe_processed = True
                permit.unknown()
            else:
                permit.unsent()
                call.sent = False
            raise
        finally:
            self._wire_tells = self._wire_tells or departure.sent
            request.extensions.pop("trace", None)
            if departure.passed_on is not None:
                request.extensions["trace"] = departure.passed_on
        call.sent = False
        if response.status_code not in (401, 429, 503):  # anything but a refusal
            call.maybe_processed = True
        # As a dict, because httpx's headers look through all of them for each.
        quota = parse_quota(dict(response.headers.items()))
        call.held = permit.answered(response.status_code, quota)
        if response.status_code == 429:
            call.refused = permit
        return response

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._wire.aclose()

    def _refusal(self, call: CallState, key: Key, wait: WouldWait, left: float) -> LemcalError:
        if wait.refused:
            return RateLimitError(
                f"{call}: the server refuses this key for another {wait.seconds:.0f} s (429); "
                "do not call before that, and see who else uses the key",
                call=call.info(),
                retry_after=wait.seconds,
                limit=self.limiter.snapshot(key).limit,
                remaining=0,
            )
        return DeadlineExceededError(
            f"{call}: the rate limit's queue is {wait.seconds:.3g} s long, and only {max(0.0, left):.3g} s "
            "are left of the deadline; allow more, or send fewer calls at once",
            call=call.info(),
            retry_after=wait.seconds,
        )


class _SendTracer:
    """Learns from the wire when the request leaves: httpcore's ``trace`` extension.

    The grant is not that moment: the pool's gate, DNS, TCP and TLS lie between.
    """

    def __init__(self, permit: Permit, passed_on: Any) -> None:
        self._permit = permit
        self.passed_on = passed_on  # the callback of whoever made the request
        self.sent = False

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        # A CONNECT to a proxy is not yet the request.
        if name.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            self.sent = True
            self._permit.sent()
            if self.passed_on is None:
                # All that there was to learn: the events that follow cost as much as the rest of this layer.
                info["request"].extensions.pop("trace", None)
        if self.passed_on is not None:
            await self.passed_on(name, info)
