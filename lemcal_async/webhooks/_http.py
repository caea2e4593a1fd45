"""Parses deliveries and builds responses; the ASGI part is at the end of the file.

This module validates requests and compares tokens, but does not verify meetings. Of the body, only the
meeting id and, as a hint, the meeting type id are used.
"""

import base64
import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias, cast
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

import anyio
import attrs

from lemcal_async.errors import ConfigurationError, LemcalError

logger = logging.getLogger("lemcal_async.webhooks")


def log_error(error: BaseException, message: str, *arguments: object) -> None:
    """Log an exception of a callback with its traceback, but without its message.

    The message may quote a booking or a database password. Errors of this package are logged in full.
    """
    if isinstance(error, LemcalError):
        logger.error(f"{message}: %s", *arguments, error)  # noqa: G004 - the message is a constant of this package
        return
    masked = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
    logger.error(message, *arguments, exc_info=(masked, masked(), error.__traceback__))


MAX_BODY_BYTES: Final = 2**20
"""The largest accepted body, in bytes. A meeting takes about 600."""

_MAX_BODY_DIGITS: Final = str(MAX_BODY_BYTES).encode()
_MAX_DEPTH: Final = 64
_MAX_FIELDS: Final = 100  # of the query
# Ids are a prefix and 17 characters (documented by example). Only the alphabet matters: they are logged and
# stored unescaped.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

Headers: TypeAlias = list[tuple[bytes, bytes]]


@attrs.frozen
class Rejection:
    """Respond with ``status_code``. ``reason`` helps to set up the hook, and never quotes the request."""

    status_code: int
    reason: str


@attrs.frozen
class MeetingRef:
    """The meeting to verify. ``meeting_type_id`` narrows the first lookup, and may be forged."""

    meeting_id: str
    meeting_type_id: str | None = None


UNAUTHORIZED: Final = Rejection(401, "the token is missing, wrong or repeated")
TOO_LARGE: Final = Rejection(413, f"the body is over {MAX_BODY_BYTES} bytes")
TOO_SLOW: Final = Rejection(408, "the body took too long")

# --------------------------------------------------------------------------- tokens

# Tokens are stored and compared as digests, keyed with a secret of this process. A digest cannot be guessed
# byte by byte, so the time of a lookup reveals nothing, however many tokens there are.
_KEY: Final = secrets.token_bytes(32)
_PLAIN: Final = re.compile(r"[A-Za-z0-9._~/=+-]+")


def token_digest(token: str | bytes) -> bytes:
    """Return the keyed digest that stands for a token in this process."""
    encoded = token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, key=_KEY, digest_size=32).digest()


def hook_url(url: str, token: str) -> str:
    """Return the URL to register as a hook, with the quoted token in its query.

    ``await lemcal.hooks.create(hook_url("https://you.example/hooks/lemcal", token), …)``. An f-string would
    not quote ``& % #`` and would corrupt the token.

    Args:
        url: The service's own address for webhooks.
        token: The token.

    Raises:
        ConfigurationError: If the token is empty, or if the URL already has a token or a fragment.
    """
    if not token:
        raise ConfigurationError("hook_url(): the token must not be empty")
    parts = urlsplit(url)
    if parts.fragment or any(name == "token" for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ConfigurationError("hook_url(): the URL must have no fragment and no token parameter")
    return f"{url.rstrip('?')}{'&' if parts.query else '?'}token={quote(token, safe='')}"


def needs_quoting(token: str) -> bool:
    """Whether a URL would change the token unless it is quoted."""
    return _PLAIN.fullmatch(token) is None


def tokens_in(query: bytes, headers: Headers) -> tuple[bytes, ...]:
    """Return the digests of the token that a request presents; empty unless it presents exactly one.

    The token is in the query, or is the password of Basic credentials. A ``+`` in a query may stand for a
    space or for itself, so both readings are returned. A repeated token is rejected, because a proxy may have
    checked the other one.
    """
    fields = query.split(b"&", _MAX_FIELDS)
    values = [value for name, _, value in (each.partition(b"=") for each in fields) if _is_token(name)]
    if len(values) > 1 or len(fields) > _MAX_FIELDS:
        return ()
    if values:
        readings = {unquote_to_bytes(values[0]), unquote_to_bytes(values[0].replace(b"+", b" "))}
        return tuple(token_digest(reading) for reading in readings if reading)
    return _basic_password(headers)


def _is_token(name: bytes) -> bool:
    return unquote_to_bytes(name.replace(b"+", b" ")) == b"token"


def _basic_password(headers: Headers) -> tuple[bytes, ...]:
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return ()
    scheme, _, credentials = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        return ()
    try:
        password = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return ()
    return (token_digest(password),) if password else ()


# --------------------------------------------------------------------------- requests


def check_method(method: str) -> Rejection | None:
    """Return why a request with this method is rejected, or None."""
    return None if method == "POST" else Rejection(405, "deliveries use POST")


def headers_of(headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> Headers:
    """Return headers, given as text or bytes, in ASGI form: pairs of bytes with lowercase names."""
    given: Any = headers.items() if isinstance(headers, Mapping) else headers  # pyright: ignore[reportUnknownVariableType]
    pairs: Iterable[tuple[object, object]] = given
    return [(_bytes(name).lower(), _bytes(value)) for name, value in pairs]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


def check_headers(headers: Headers) -> Rejection | None:
    """Return why the body is rejected before it is read, or None."""
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            # Trusted only if it is too large; the body is counted as it is read. Compared as text,
            # because int() rejects thousands of digits.
            digits = value.lstrip(b"0")
            if (len(digits), digits) > (len(_MAX_BODY_DIGITS), _MAX_BODY_DIGITS):
                return TOO_LARGE
    return None


def parse_body(body: bytes) -> Rejection | MeetingRef:
    """Return the meeting that a body names."""
    if len(body) > MAX_BODY_BYTES:
        return TOO_LARGE
    try:
        data: Any = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, or too many digits
        return Rejection(400, "the body is not UTF-8 JSON")
    if not isinstance(data, dict):
        return Rejection(400, "the body is not a JSON object")
    if _is_deep(data):
        return Rejection(400, f"the body is nested more than {_MAX_DEPTH} levels deep")
    fields = cast("dict[str, object]", data)
    return _parse_ids(fields.get("_id"), fields.get("meetingTypeId"))


def _parse_ids(meeting_id: object, meeting_type_id: object) -> Rejection | MeetingRef:
    if not isinstance(meeting_id, str) or not _ID.fullmatch(meeting_id):
        return Rejection(400, "the body has no valid _id")
    # An invalid hint is no reason to reject a booking.
    usable = isinstance(meeting_type_id, str) and _ID.fullmatch(meeting_type_id)
    return MeetingRef(meeting_id, str(meeting_type_id) if usable else None)


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


# --------------------------------------------------------------------------- responses

RETRY_AFTER: Final = 5.0
"""Default ``Retry-After``, in seconds."""
_MAX_RETRY_AFTER: Final = 300.0


@attrs.frozen
class Reply:
    """A response. ``outcome`` is the ``status`` in its JSON body, ``retry_after`` is in seconds.

    ``unread`` means that the request body was not read completely, so the connection cannot be reused.
    """

    status_code: int
    outcome: str
    reason: str | None = None
    retry_after: float | None = None
    unread: bool = False

    def content(self) -> bytes:
        """Return the body."""
        return json.dumps(
            {"status": self.outcome} | ({"reason": self.reason} if self.reason else {})
        ).encode()

    def headers(self) -> dict[str, str]:
        """Return the headers, with lowercase names."""
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            seconds = math.ceil(min(max(self.retry_after, 1.0), _MAX_RETRY_AFTER))
            headers["retry-after"] = str(seconds)
        if self.status_code == 405:
            headers["allow"] = "POST"
        return headers


def rejected(rejection: Rejection) -> Reply:
    """Return the response to a rejected request."""
    return Reply(rejection.status_code, "rejected", rejection.reason, unread=rejection.status_code != 400)


def retry_later(outcome: str, retry_after: float | None = None) -> Reply:
    """Return a 503 that asks the sender to retry the delivery."""
    return Reply(503, outcome, retry_after=RETRY_AFTER if retry_after is None else retry_after)


# --------------------------------------------------------------------------- ASGI

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_HIDDEN: Final = b"token=hidden"


def hide_query(scope: Scope) -> bytes:
    """Return the query and remove it from the scope, which access logs and tracebacks show."""
    query: bytes = scope.get("query_string", b"")
    if query:
        scope["query_string"] = _HIDDEN
    return query


class Responder:
    """Sends the first response that it is given, and ignores any further one."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._is_head = scope["method"] == "HEAD"
        self._closes = scope.get("http_version", "1.1").startswith("1")  # only HTTP/1 has the header
        self.sent: Reply | None = None

    async def __call__(self, reply: Reply) -> None:
        """Send a response, unless one was sent. A disconnected client is not an error."""
        if self.sent is not None:
            return
        body = reply.content()
        headers = [(name.encode(), value.encode()) for name, value in reply.headers().items()]
        headers.append((b"content-length", str(len(body)).encode()))
        if reply.unread and self._closes:
            headers.append((b"connection", b"close"))
        status = reply.status_code
        try:
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            self.sent = reply  # only now, so that after a cancellation another response can be sent
            await self._send({"type": "http.response.body", "body": b"" if self._is_head else body})
        except OSError:
            self.sent = reply


async def receive_body(receive: Receive, until: float) -> bytes | Rejection | None:
    """Read a body until ``until`` on the event loop's clock; return None if the client disconnects.

    The size is checked as the body arrives, so a body that is too large is neither buffered nor awaited.
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


async def serve_lifespan(receive: Receive, send: Send) -> None:
    """Acknowledge the server's startup and shutdown; nothing else to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
