"""Whether a delivery is worth verifying: from method, query, headers and body to a value. No I/O.

Knows what a delivery must look like and how a token is compared. That anything in it is true is not
decided here: the body gives an id to look for, and a hint where, and nothing else of it is used.

The receiver's end of ASGI: reading a body that may be huge or slow, sending one short answer."""

import hashlib
import json
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, TypeAlias, cast
from urllib.parse import parse_qsl

import anyio
import attrs

MAX_BODY_BYTES: Final = 2**20
"""A meeting takes about 600 bytes; what is larger than this is something else."""

_MOST: Final = str(MAX_BODY_BYTES).encode()
_MAX_DEPTH: Final = 64
_MAX_FIELDS: Final = 100  # of the query
# Prefix and 17 characters, of which only the alphabet is relied on: an id is logged and stored as it is.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]


@attrs.frozen
class Reject:
    """Answer with ``status``; ``reason`` is for whoever sets the hook up, and quotes nothing."""

    status: int
    reason: str


@attrs.frozen
class Verify:
    """Look for this meeting; ``meeting_type_id`` narrows the first look, and may be a lie."""

    meeting_id: str
    meeting_type_id: str | None = None


UNAUTHORIZED: Final = Reject(401, "the token is missing or wrong")
TOO_LARGE: Final = Reject(413, f"the body is over {MAX_BODY_BYTES} bytes")
TOO_SLOW: Final = Reject(408, "the body took too long")

# Tokens are kept and compared as digests under a key that only this process has. A digest cannot be
# guessed piece by piece, so looking one up takes a time that says nothing, however many there are.
_KEY: Final = secrets.token_bytes(32)


def digest_of(token: str) -> bytes:
    """Return what a token is known by in this process."""
    return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), key=_KEY, digest_size=32).digest()


_NO_TOKEN: Final = digest_of("")  # no valid token is empty


def token_in(query: bytes) -> bytes:
    """Return the digest of the one ``token`` of a query string; that of no valid token if it is not one.

    A token given twice is none: what a proxy looked at need not be what we do.
    """
    try:
        fields = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError:  # too many fields
        return _NO_TOKEN
    tokens = [value for name, value in fields if name == "token"]
    return digest_of(tokens[0]) if len(tokens) == 1 else _NO_TOKEN


def check_method(method: str) -> Reject | None:
    """Return why a request with this method is refused, None if it is not."""
    return None if method == "POST" else Reject(405, "deliveries come by POST")


def check_headers(headers: Headers) -> Reject | None:
    """Return why a body is refused before it is read, None if it is not."""
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            # Only believed when it is bad news, for the body is counted too. As text, because a header
            # of 6,000 digits is no int.
            digits = value.lstrip(b"0")
            if (len(digits), digits) > (len(_MOST), _MOST):
                return TOO_LARGE
    return None


def read_body(body: bytes) -> Reject | Verify:
    """Return which meeting a body speaks of."""
    if len(body) > MAX_BODY_BYTES:
        return TOO_LARGE
    try:
        data: Any = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a number of 5,000 digits
        return Reject(400, "the body is not JSON in UTF-8")
    if not isinstance(data, dict):
        return Reject(400, "the body is not a JSON object")
    if _is_deep(data):
        return Reject(400, f"the body is nested more than {_MAX_DEPTH} deep")
    fields = cast("dict[str, object]", data)
    return _verify(fields.get("_id"), fields.get("meetingTypeId"))


def _verify(meeting_id: object, meeting_type_id: object) -> Reject | Verify:
    if not isinstance(meeting_id, str) or not _ID.fullmatch(meeting_id):
        return Reject(400, "the body has no usable _id")
    # A hint that cannot be used is no reason to lose a booking.
    usable = isinstance(meeting_type_id, str) and _ID.fullmatch(meeting_type_id)
    return Verify(meeting_id, str(meeting_type_id) if usable else None)


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


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
