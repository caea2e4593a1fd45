"""The receiver's end of ASGI: reading a body that may be huge or slow, sending one short answer."""

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import anyio
import attrs

from lemcal_async.webhooks.decision import MAX_BODY_BYTES, TOO_LARGE, TOO_SLOW, Reject

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

COME_AGAIN: Final = 5.0
"""Seconds, where nothing better is known."""
_LONGEST: Final = 300.0


@attrs.frozen
class Reply:
    """An answer; ``outcome`` is its ``status`` in JSON, ``retry_after`` is in seconds.

    ``unread`` says that the body was not read to its end, so that the connection is of no more use.
    """

    status: int
    outcome: str
    reason: str | None = None
    retry_after: float | None = None
    unread: bool = False


def rejected(reject: Reject) -> Reply:
    """Return the answer to a delivery that is not even looked into."""
    return Reply(reject.status, "rejected", reject.reason, unread=reject.status != 400)


def come_again(outcome: str, retry_after: float | None = None) -> Reply:
    """Return the answer to a delivery that could not be dealt with now."""
    return Reply(503, outcome, retry_after=COME_AGAIN if retry_after is None else retry_after)


class Responder:
    """Sends one answer, the first that it is given."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._closes = scope.get("http_version", "1.1").startswith("1")  # the header is of HTTP/1 alone
        self.sent: Reply | None = None

    async def __call__(self, reply: Reply) -> None:
        """Send it, unless one was sent. Nobody may be there any more: that is no error."""
        if self.sent is not None:
            return
        content = {"status": reply.outcome} | ({"reason": reply.reason} if reply.reason else {})
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if reply.retry_after is not None:
            seconds = math.ceil(min(max(reply.retry_after, 1.0), _LONGEST))
            headers.append((b"retry-after", str(seconds).encode()))
        if reply.unread and self._closes:
            headers.append((b"connection", b"close"))
        if reply.status == 405:
            headers.append((b"allow", b"POST"))
        try:
            await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
            self.sent = reply  # not before: who is cancelled till then may still send another
            await self._send({"type": "http.response.body", "body": body})
        except OSError:
            self.sent = reply


async def receive_body(receive: Receive, until: float) -> bytes | Reject | None:
    """Read a body, until a moment on the event loop's clock; None if the client has left.

    It is counted as it comes: what is too large is neither kept nor waited for.
    """
    parts: list[bytes] = []
    size = 0
    with anyio.move_on_after(until - anyio.current_time()):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > MAX_BODY_BYTES:
                return TOO_LARGE
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)
    return TOO_SLOW


async def live(receive: Receive, send: Send) -> None:
    """Take part in the server's start and end: there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
