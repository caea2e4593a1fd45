"""From a request to the meeting it names, and from an outcome to the answer; ASGI at the end of the file.

Knows what a delivery must look like and how a token is compared. Whether anything in it is true is not
decided here: the body gives an id to look for, and a hint where, and nothing else of it is used.
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
    """Log what somebody else's code raised, with its traceback.

    The words of an error may quote a booking, and a database's its password; those of this package do not.
    """
    if isinstance(error, LemcalError):
        logger.error(f"{message}: %s", *arguments, error)  # noqa: G004 - the messages are this package's own
        return
    masked = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
    logger.error(message, *arguments, exc_info=(masked, masked(), error.__traceback__))


MAX_BODY_BYTES: Final = 2**20
"""The largest body that is read, in bytes. A meeting takes about 600."""

_MOST: Final = str(MAX_BODY_BYTES).encode()
_MAX_DEPTH: Final = 64
_MAX_FIELDS: Final = 100  # of the query
# Prefix and 17 characters, of which only the alphabet is relied on: an id is logged and stored as it is.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

Headers: TypeAlias = list[tuple[bytes, bytes]]


@attrs.frozen
class Reject:
    """Answer with ``status_code``; ``reason`` is for whoever sets the hook up, and quotes nothing."""

    status_code: int
    reason: str


@attrs.frozen
class Verify:
    """Look for this meeting; ``meeting_type_id`` narrows the first look, and may be a lie."""

    meeting_id: str
    meeting_type_id: str | None = None


UNAUTHORIZED: Final = Reject(401, "the token is missing or wrong")
TOO_LARGE: Final = Reject(413, f"the body is over {MAX_BODY_BYTES} bytes")
TOO_SLOW: Final = Reject(408, "the body took too long")

# --------------------------------------------------------------------------- tokens

# Tokens are kept and compared as digests under a key that only this process has. A digest cannot be
# guessed piece by piece, so looking one up takes a time that says nothing, however many there are.
_KEY: Final = secrets.token_bytes(32)
_PLAIN: Final = re.compile(r"[A-Za-z0-9._~/=+-]+")


def digest_of(token: str | bytes) -> bytes:
    """Return what a token is known by in this process."""
    encoded = token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, key=_KEY, digest_size=32).digest()


def hook_url(url: str, token: str) -> str:
    """Return the URL to register as a hook, with the token in its query, quoted as it must be.

    ``await lemcal.hooks.create(hook_url("https://you.example/hooks/lemcal", token), …)``. A token that is put
    into an f-string instead loses its ``& % #`` on the way.

    Args:
        url: The service's own address for webhooks.
        token: The token.

    Raises:
        ConfigurationError: If the token is empty, or if the URL has a token or a fragment already.
    """
    if not token:
        raise ConfigurationError("hook_url(): the token must not be empty")
    parts = urlsplit(url)
    if parts.fragment or any(name == "token" for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ConfigurationError("hook_url() takes a URL without a fragment and without a token of its own")
    return f"{url.rstrip('?')}{'&' if parts.query else '?'}token={quote(token, safe='')}"


def needs_quoting(token: str) -> bool:
    """Whether a token arrives as another one if it is put into a URL as it is."""
    return _PLAIN.fullmatch(token) is None


def tokens_in(query: bytes, headers: Headers) -> tuple[bytes, ...]:
    """Return the digests of what a request presents as its token; none if that is not exactly one.

    The token stands in the query, or is the password of Basic credentials. A ``+`` in a query can mean a
    space or itself: both are looked at. A token given twice is none: what a proxy looked at need not be
    what we do.
    """
    fields = query.split(b"&", _MAX_FIELDS)
    values = [value for name, _, value in (each.partition(b"=") for each in fields) if _is_token(name)]
    if len(values) > 1 or len(fields) > _MAX_FIELDS:
        return ()
    if values:
        readings = {unquote_to_bytes(values[0]), unquote_to_bytes(values[0].replace(b"+", b" "))}
        return tuple(digest_of(reading) for reading in readings if reading)
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
    return (digest_of(password),) if password else ()


# --------------------------------------------------------------------------- requests


def check_method(method: str) -> Reject | None:
    """Return why a request with this method is refused, None if it is not."""
    return None if method == "POST" else Reject(405, "deliveries come by POST")


def headers_of(headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> Headers:
    """Return headers, of text or bytes, as ASGI has them: pairs of bytes with names in lower case."""
    given: Any = headers.items() if isinstance(headers, Mapping) else headers  # pyright: ignore[reportUnknownVariableType]
    pairs: Iterable[tuple[object, object]] = given
    return [(_bytes(name).lower(), _bytes(value)) for name, value in pairs]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


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


# --------------------------------------------------------------------------- answers

RETRY_AFTER: Final = 5.0
"""Seconds, where nothing better is known."""
_MAX_RETRY_AFTER: Final = 300.0


@attrs.frozen
class Reply:
    """An answer; ``outcome`` is the ``status`` in its JSON, ``retry_after`` is in seconds.

    ``unread`` says that the body was not read to its end, so that the connection is of no more use.
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
        """Return the headers, with names in lower case."""
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            seconds = math.ceil(min(max(self.retry_after, 1.0), _MAX_RETRY_AFTER))
            headers["retry-after"] = str(seconds)
        if self.status_code == 405:
            headers["allow"] = "POST"
        return headers


def rejected(reject: Reject) -> Reply:
    """Return the answer to a delivery that is not even looked into."""
    return Reply(reject.status_code, "rejected", reject.reason, unread=reject.status_code != 400)


def come_again(outcome: str, retry_after: float | None = None) -> Reply:
    """Return the answer to a delivery that could not be dealt with now."""
    return Reply(503, outcome, retry_after=RETRY_AFTER if retry_after is None else retry_after)


# --------------------------------------------------------------------------- ASGI

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_HIDDEN: Final = b"token=hidden"


def hide_query(scope: Scope) -> bytes:
    """Return the query, and take it out of the scope: access logs show it, and tracebacks the scope."""
    query: bytes = scope.get("query_string", b"")
    if query:
        scope["query_string"] = _HIDDEN
    return query


class Responder:
    """Sends one answer, the first that it is given."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._is_head = scope["method"] == "HEAD"
        self._closes = scope.get("http_version", "1.1").startswith("1")  # the header is of HTTP/1 alone
        self.sent: Reply | None = None

    async def __call__(self, reply: Reply) -> None:
        """Send it, unless one was sent. Nobody may be there any more: that is no error."""
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
            self.sent = reply  # not before: who is canceled till then may still send another
            await self._send({"type": "http.response.body", "body": b"" if self._is_head else body})
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


async def serve_lifespan(receive: Receive, send: Send) -> None:
    """Take part in the server's start and end: there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
