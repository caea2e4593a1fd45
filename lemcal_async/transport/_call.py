"""What the layers know of the call that a request belongs to, over all of its attempts.

It travels in ``request.extensions``. The client makes one for each call; a request from any other
``httpx.AsyncClient`` gets one when it enters the first layer.
"""

import anyio
import attrs
import httpx

from lemcal_async._retry import RetryPolicy
from lemcal_async.errors import CallInfo
from lemcal_async.ratelimit import Key, Permit, Priority

_EXTENSION = "lemcal_async"


@attrs.define(eq=False)
class CallState:
    """One call: who asks, how much time it has, and what became of its attempts so far."""

    method: str
    route: str  # the path with its ids left out
    key: Key | None = None
    priority: Priority = "interactive"
    retry: RetryPolicy | None = None  # instead of the transport's own
    deadline: float | None = None  # on the event loop's clock, anyio.current_time()

    attempts: int = 0
    waited: float = 0.0  # seconds, for the limiter and between attempts
    sent: bool = False  # whether an attempt is under way that may have reached the server
    maybe_processed: bool = False  # whether an earlier one may have been carried out
    held: float = 0.0  # seconds for which the limiter holds the key after the last answer
    refused: Permit | None = None  # of the last attempt, if the server refused it with a 429

    def __str__(self) -> str:
        return f"{self.method} {self.route}"

    def time_left(self) -> float | None:
        """Return the seconds until the deadline, None without one."""
        return None if self.deadline is None else self.deadline - anyio.current_time()

    def info(self) -> CallInfo:
        """Return what an error may say of the call."""
        return CallInfo(self.method, self.route, self.attempts, round(self.waited, 3))


def call_of(request: httpx.Request) -> CallState:
    """Return the call that ``request`` belongs to."""
    call = request.extensions.get(_EXTENSION)
    return call if isinstance(call, CallState) else _new_call(request)


def account_of(request: httpx.Request) -> Key | None:
    """Return whose budget ``request`` draws on, if that is known."""
    call = request.extensions.get(_EXTENSION)
    return call.key if isinstance(call, CallState) else None


def begin_call(request: httpx.Request) -> CallState:
    """Return the call that begins with ``request``; one that is sent once more begins another."""
    call = call_of(request)
    return call if call.attempts == 0 else _new_call(request)


def _new_call(request: httpx.Request) -> CallState:
    call = CallState(request.method, request.url.path)
    request.extensions = {**request.extensions, **extension(call)}
    return call


def extension(call: CallState) -> dict[str, CallState]:
    """Return the extension that ties a request to ``call``."""
    return {_EXTENSION: call}
