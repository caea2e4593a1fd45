"""The connection to Redis, and the policies while it is unreachable.

Only this module uses coredis, which runs on asyncio and trio. Every failure to run the script is raised as
``RedisUnavailable``.
"""

import hashlib
import logging
import math
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

try:
    from coredis import Redis, exceptions
    from coredis.pool import ConnectionPool
    from coredis.retry import NoRetryPolicy
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "coredis":
        raise
    raise ImportError(
        "RedisRateLimiter requires the extra redis: pip install 'lemcal-async[redis]'"
    ) from None

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError

# Read at import time, so that no call waits for the disk.
SCRIPT = Path(__file__).with_name("script.lua").read_text(encoding="utf-8")
SHA1 = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # its name in Redis

WhenDown = Literal["share", "raise", "open"]
"""What a limiter does while Redis is unreachable."""

FALLBACK_POLICIES: dict[WhenDown, str] = {
    "share": "this process uses its share of the limit",
    "raise": "calls fail",
    "open": "requests are not limited",
}
FIRST_DELAY = 0.25  # seconds before the first attempt to reconnect
LAST_DELAY = 1.0  # maximum between attempts: all processes notice within this time that Redis is back
DEFAULT_SHARE = 0.25  # of the limit, for a process that does not know how many processes there are
PROCESS_TTL = 60.0  # seconds for which another process is assumed to be running

_CONNECTIONS = 8  # commands share them; more than one are open only while several keys wait to connect
_RIGHTS = "allow its user EVAL, EVALSHA, GET, SET and TIME on keys that begin with the prefix in braces"
_CLUSTER = "this is a node of a cluster: use a standalone Redis, or a cluster with one shard"
_PERMANENT: dict[type[exceptions.RedisError], str] = {  # what to do about errors that do not pass
    exceptions.AuthenticationError: "check the user and the password in the URL",
    exceptions.AuthorizationError: _RIGHTS,
    exceptions.ReadOnlyError: "this is a replica: use the address of the primary",
    exceptions.AskError: _CLUSTER,
    exceptions.ClusterCrossSlotError: _CLUSTER,
    exceptions.UnknownCommandError: "use a Redis that runs Lua scripts",
}
_NO_DATABASE = "use a database number that this Redis has, at the end of the URL; 0 always exists"


class RedisUnavailable(Exception):  # noqa: N818 - a state of Redis, which callers handle
    """Redis did not run the script; the message says why.

    Attributes:
        advice: What the user can do about it if the cause is permanent, else None.
    """

    def __init__(self, reason: str, advice: str | None = None) -> None:
        super().__init__(reason)
        self.advice = advice


class RedisConnection:
    """A connection pool, open inside ``async with``.

    Args:
        url: The URL of Redis.
        timeout: Seconds for each network operation.
        is_down: Whether Redis is known to be down. If so, failed attempts to connect are not logged again.
    """

    def __init__(self, url: Secret[str], timeout: float, is_down: Callable[[], bool]) -> None:
        if problem := _type_problem(url) or _url_problem(url):
            raise ConfigurationError(problem)
        self._url = url
        self._timeout = timeout
        self._client: Redis[bytes] | None = None
        self._is_down = is_down

    async def __aenter__(self) -> Self:
        """Open the pool, at the top of a task as coredis requires. It connects on first use."""
        pool = ConnectionPool.from_url(
            self._url.reveal(),
            decode_components=True,
            connect_timeout=self._timeout,
            stream_timeout=self._timeout,
            max_connections=_CONNECTIONS,
        )
        connection: Any = type("Connection", (_ClosesQueues, pool.connection_class), {})
        pool.connection_class = connection
        client: Redis[bytes] = Redis(connection_pool=pool, retry_policy=NoRetryPolicy(), verify_version=False)
        self._client = await client.__aenter__()
        logging.getLogger("coredis").addFilter(self._log_filter)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the pool. The body's exception is not passed on: coredis would wrap it in a group."""
        logging.getLogger("coredis").removeFilter(self._log_filter)
        client, self._client = self._client, None
        if client is not None:  # pragma: no branch - entered
            await client.__aexit__(None, None, None)

    def _log_filter(self, record: logging.LogRecord) -> bool:
        return not (self._is_down() and record.getMessage().startswith("Connection attempt failed"))

    async def run(self, keys: list[str], argument: str) -> str | bytes:
        """Run the script, loading it if Redis does not have it. Raises RedisUnavailable.

        If this is canceled, the script may still run. The connection stays usable: coredis matches replies to
        commands by order, and drops a reply that nobody waits for.
        """
        client = self._client
        if client is None:
            raise RedisUnavailable("the connection was closed")
        try:
            try:
                reply = await client.evalsha(SHA1, keys=keys, args=[argument])
            except exceptions.NoScriptError:
                reply = await client.eval(SCRIPT, keys=keys, args=[argument])
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            reason = _reason(error)
            advice = next((what for kind, what in _PERMANENT.items() if isinstance(error, kind)), None)
            if "ACL failure" in reason:  # raised inside the script
                advice = _RIGHTS
            elif "DB index is out of range" in reason:
                advice = _NO_DATABASE
            if not isinstance(error, exceptions.ResponseError):
                # The reply may come late or never, so no other command may queue behind it.
                client.connection_pool.disconnect()
        else:
            if isinstance(reply, str | bytes):
                return reply
            reason, advice = "the script returned nothing", None
        raise RedisUnavailable(reason, advice)


class _ClosesQueues:
    """A mixin for coredis connections that closes their queues if connecting fails.

    Otherwise each failed attempt emits a ResourceWarning, every second while Redis is unreachable.
    """

    async def run(self, **options: Any) -> None:
        try:
            await super().run(**options)  # type: ignore[misc]
        finally:
            for queue in vars(self).values():
                if isinstance(queue, MemoryObjectSendStream | MemoryObjectReceiveStream):
                    queue.close()


def _reason(error: Exception) -> str:
    """Return an error as text, including a failure of TLS, which coredis mentions only in the causes."""
    reason = f"{type(error).__name__}: {error}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return reason
    # A Redis without TLS does not reply to the handshake.
    problem = "no reply" if isinstance(cause, ssl.SSLWantReadError) else str(cause)
    return f"{reason}: the TLS handshake failed: {problem}"


def _type_problem(url: Secret[object]) -> str | None:
    if isinstance(url.reveal(), str):
        return None
    kind = type(url.reveal()).__name__
    return f"RedisRateLimiter takes a Redis URL, such as 'redis://localhost:6379/0', not a {kind}"


def _url_problem(url: Secret[str]) -> str | None:
    """Return what is wrong with a URL, without quoting it, or None."""
    try:
        parts = urlsplit(url.reveal())
        whole = bool(parts.path if parts.scheme == "unix" else parts.hostname) and parts.port != 0
    except ValueError:
        parts, whole = urlsplit(""), False
    # With a raw @ or / in the password, part of it would be parsed as the host and shown in errors.
    whole = whole and url.reveal().count("@") == parts.netloc.count("@") <= 1
    if whole and parts.scheme in {"redis", "rediss", "unix"}:
        return None
    return (
        "a Redis URL looks like redis://host:6379/0, rediss://... or unix:///path/to/socket; percent-encode "
        "the user and the password (%40 for @, %2F for /)"
    )


class CircuitBreaker:
    """Closed while Redis replies. While it is open, one task retries every ``delay`` seconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY
        self.since = -math.inf
        self.reason = ""

    def failed(self, reason: str, now: float) -> bool:
        """Record a failure; return whether it opened the breaker."""
        if self.is_open:
            self.delay = min(2 * self.delay, LAST_DELAY)
            return False
        self.is_open, self.delay, self.since, self.reason = True, FIRST_DELAY, now, reason
        return True


class FallbackPolicy:
    """The limit of one process while Redis is unreachable.

    A ``share`` of None divides the limit by the number of processes seen recently.
    """

    def __init__(self, limit: int, share: float | None) -> None:
        self._limit = limit
        self._share = share
        self._processes = 0
        self._seen_at = -math.inf

    def record(self, processes: int, now: float) -> None:
        """Record how many processes there are."""
        if processes >= self._processes or now - self._seen_at > PROCESS_TTL:
            self._processes, self._seen_at = processes, now

    @property
    def own_limit(self) -> int:
        """How many requests per period this process may send."""
        share = self._share or (1 / self._processes if self._processes else DEFAULT_SHARE)
        return max(1, int(self._limit * share + 1e-9))
