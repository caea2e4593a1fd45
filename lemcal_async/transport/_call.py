"""The state of one call that the layers share, over all of its attempts.

It travels in ``request.extensions``. The client makes one for each call; a request from any other
HTTP client gets one when it enters the first layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import anyio
import attrs
import httpx

from lemcal_async._headers import Quota
from lemcal_async._retry import RetryPolicy
from lemcal_async.errors import CallInfo
from lemcal_async.ratelimit import Key, Permit, Priority

_EXTENSION = "lemcal_async"


@attrs.define(eq=False)
class CallState:
    """One call: whose it is, how much time it has, and how its attempts ended so far."""

    method: str
    route: str  # the path without its ids
    key: Key | None = None
    priority: Priority = "interactive"
    retry: RetryPolicy | None = None  # instead of the transport's own
    host: str = "the server"  # as an error names it
    timeout: Mapping[str, float | None] = attrs.field(factory=dict[str, float | None])
    redact: Callable[[str], str] | None = None  # without one, the server's words are not quoted
    deadline: float | None = None  # on the event loop's clock, anyio.current_time()

    attempts: int = 0
    waited: float = 0.0  # seconds, for the limiter and between attempts
    sent: bool = False  # whether the server may have carried out the current attempt
    maybe_processed: bool = False  # whether it may have carried out an earlier one
    last: httpx.Response | httpx.RequestError | None = attrs.field(default=None, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)  # of the last answer, if it could be read
    quota: Quota | None = None  # what the headers of the last answer say
    held: float = 0.0  # seconds for which the limiter pauses the key after the last answer
    refused: Permit | None = None  # of the last attempt, if a 429 refused it or it ran out unsent
    tracer: "SendTracer | None" = None  # of the current attempt

    def __str__(self) -> str:
        return f"{self.method} {self.route}"

    @property
    def is_ours(self) -> bool:
        """Whether it is a call of ``AsyncLemcal``, and not of another client with these layers."""
        return self.redact is not None

    def begin_attempt(self) -> None:
        """Note that another attempt begins."""
        self.attempts += 1
        self.maybe_processed, self.sent = self.maybe_processed or self.sent, False
        self.quota = None
        self.held = 0.0

    def time_left(self) -> float | None:
        """Return the seconds until the deadline, None without one."""
        return None if self.deadline is None else self.deadline - anyio.current_time()

    def info(self) -> CallInfo:
        """Return what an error tells about the call."""
        return CallInfo(self.method, self.route, self.attempts, round(self.waited, 3))


class SendTracer:
    """Learns from the wire whether one attempt was sent, by httpcore's ``trace`` extension.

    That an error names a failure to connect proves nothing: some wires report a connection that was
    reset after the request as one. Only a wire that reports what it does can be believed: by an event
    of this attempt, or by its attribute ``reports_sending``, which promises that the event
    ``send_request_headers.started`` always comes before the first byte leaves.
    """

    def __init__(self, request: httpx.Request) -> None:
        self._request = request
        self._passed_on = request.extensions.get("trace")  # the callback of whoever made the request
        self._reported = False
        self.permit: Permit | None = None
        self.entered = True  # whether the wire was asked to send
        self.sent = False
        self.lapsed = False  # whether the permit had run out when the request was about to leave
        request.extensions["trace"] = self

    def proves_unsent(self) -> bool:
        """Whether the request certainly did not leave."""
        return not self.entered or (self._reported and not self.sent)

    def enter(self, wire: httpx.AsyncBaseTransport) -> None:
        """Note that this wire, or the layer above it, is now asked to send."""
        self.entered = True
        self._reported = bool(getattr(wire, "reports_sending", False))

    def remove(self) -> None:
        """Leave the request as it was."""
        self._request.extensions.pop("trace", None)
        if self._passed_on is not None:
            self._request.extensions["trace"] = self._passed_on

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        """Take note of an event, such as ``http11.send_request_headers.started``."""
        self._reported = True
        # A CONNECT to a proxy is not yet the request.
        if name.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            if self.permit is not None and self.permit.sent() is False:
                self.lapsed = True
                raise httpx.TransportError("the request was not sent: its permit had run out")
            self.sent = True
            if self._passed_on is None:
                # There is no more to learn, and the other events cost as much as the rest of this layer.
                info["request"].extensions.pop("trace", None)
        if self._passed_on is not None:
            await self._passed_on(name, info)


def call_of(request: httpx.Request) -> CallState:
    """Return the call that ``request`` belongs to."""
    call = request.extensions.get(_EXTENSION)
    return call if isinstance(call, CallState) else _new_call(request)


def account_of(request: httpx.Request) -> Key | None:
    """Return whose budget ``request`` draws on, if that is known."""
    call = request.extensions.get(_EXTENSION)
    return call.key if isinstance(call, CallState) else None


def begin_call(request: httpx.Request) -> CallState:
    """Return the call that begins with ``request``. Sending a request once more begins another."""
    call = call_of(request)
    return call if call.attempts == 0 else _new_call(request)


def extension(call: CallState) -> dict[str, CallState]:
    """Return the extension that ties a request to ``call``."""
    return {_EXTENSION: call}


def _new_call(request: httpx.Request) -> CallState:
    call = CallState(request.method, request.url.path, host=request.url.netloc.decode("ascii"))
    request.extensions = {**request.extensions, **extension(call)}
    return call
