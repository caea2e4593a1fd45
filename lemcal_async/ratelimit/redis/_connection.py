"""The connection to Redis, and what holds while it is away.

coredis, which runs on asyncio and trio, stays in here: others learn in one way that the script did not run.
"""

import hashlib
import logging
import math
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
    raise ImportError("RedisRateLimiter needs its extra: pip install 'lemcal-async[redis]'") from None

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError

# Read when this module is imported, so that no call waits for the disk.
SCRIPT = Path(__file__).with_name("script.lua").read_text(encoding="utf-8")
SHA1 = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # its name in Redis

WhenDown = Literal["share", "raise", "open"]
"""What holds while Redis is away."""

FALLBACK_POLICIES: dict[WhenDown, str] = {
    "share": "this process keeps to its share of the limit",
    "raise": "calls fail",
    "open": "nothing is limited",
}
FIRST_DELAY = 0.25  # seconds until the first new attempt
LAST_DELAY = 1.0  # all processes notice within so many seconds that Redis is back
UNKNOWN_SHARE = 0.25  # of the limit, for a process that does not know how many there are
REMEMBERED = 60.0  # seconds for which another process counts as running

_CONNECTIONS = 8  # commands share them; more are open only while several keys wait for a new one
_RIGHTS = "let its user run EVAL, EVALSHA, GET, SET and TIME on names that begin with the prefix in braces"
_CLUSTER = "this is a node of a cluster: use a Redis that is none, or has one shard"
_PERMANENT: dict[type[exceptions.RedisError], str] = {  # what does not heal by itself, and what to do
    exceptions.AuthenticationError: "see that the URL has the right user and password",
    exceptions.AuthorizationError: _RIGHTS,
    exceptions.ReadOnlyError: "this is a replica: use the address of the primary",
    exceptions.AskError: _CLUSTER,
    exceptions.ClusterCrossSlotError: _CLUSTER,
    exceptions.UnknownCommandError: "use a Redis that runs Lua scripts",
}


class Unreachable(Exception):  # noqa: N818 - a state, handled where it is met
    """Redis did not run the script. The message says why, and ``advice`` what to do if that is permanent."""

    def __init__(self, reason: str, advice: str | None = None) -> None:
        super().__init__(reason)
        self.advice = advice


class RedisConnection:
    """A pool of connections, open inside ``async with``; ``timeout`` seconds for each step of a call.

    While ``is_away`` says so, coredis does not log each attempt to connect: the first is enough.
    """

    def __init__(self, url: Secret[str], timeout: float, is_away: Callable[[], bool]) -> None:
        if problem := _wrong_kind(url) or _problem_of(url):
            raise ConfigurationError(problem)
        self._url = url
        self._timeout = timeout
        self._client: Redis[bytes] | None = None
        self._is_away = is_away

    async def __aenter__(self) -> Self:
        """Open, at the top of a task, as coredis needs. It connects when it is first used."""
        pool = ConnectionPool.from_url(
            self._url.reveal(),
            decode_components=True,
            connect_timeout=self._timeout,
            stream_timeout=self._timeout,
            max_connections=_CONNECTIONS,
        )
        tidy: Any = type("Connection", (_Tidy, pool.connection_class), {})
        pool.connection_class = tidy
        client: Redis[bytes] = Redis(connection_pool=pool, retry_policy=NoRetryPolicy(), verify_version=False)
        self._client = await client.__aenter__()
        logging.getLogger("coredis").addFilter(self._quiet)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close. What the body raised is not passed on: coredis would wrap it in a group."""
        logging.getLogger("coredis").removeFilter(self._quiet)
        client, self._client = self._client, None
        if client is not None:  # pragma: no branch - entered
            await client.__aexit__(None, None, None)

    def _quiet(self, record: logging.LogRecord) -> bool:
        return not (self._is_away() and record.getMessage().startswith("Connection attempt failed"))

    async def run(self, keys: list[str], argument: str) -> str | bytes:
        """Run the script, and load it where Redis does not have it (any more). Raises Unreachable.

        Canceled, the script may still run. The connection is not harmed: an answer that nobody waits for
        is dropped when it comes, because coredis keeps the order of its questions.
        """
        client = self._client
        if client is None:
            raise Unreachable("the connection was closed")
        try:
            try:
                said = await client.evalsha(SHA1, keys=keys, args=[argument])
            except exceptions.NoScriptError:
                said = await client.eval(SCRIPT, keys=keys, args=[argument])
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
            advice = next((what for kind, what in _PERMANENT.items() if isinstance(error, kind)), None)
            if "ACL failure" in reason:  # in the middle of the script
                advice = _RIGHTS
            if not isinstance(error, exceptions.ResponseError):
                # A late answer may still come, or never: no other call is to stand behind it.
                client.connection_pool.disconnect()
        else:
            if isinstance(said, str | bytes):
                return said
            reason, advice = "the script returned nothing", None
        raise Unreachable(reason, advice)


class _Tidy:
    """What coredis leaves out: a connection that cannot be made closes its queues too.

    Each attempt would leave a ResourceWarning otherwise, every second while Redis is away.
    """

    async def run(self, **options: Any) -> None:
        try:
            await super().run(**options)  # type: ignore[misc]
        finally:
            for queue in vars(self).values():
                if isinstance(queue, MemoryObjectSendStream | MemoryObjectReceiveStream):
                    queue.close()


def _wrong_kind(url: Secret[object]) -> str | None:
    if isinstance(url.reveal(), str):
        return None
    kind = type(url.reveal()).__name__
    return f"RedisRateLimiter takes the URL of Redis, such as 'redis://localhost:6379/0', not a {kind}"


def _problem_of(url: Secret[str]) -> str | None:
    """Say what is wrong with a URL, without any of it."""
    try:
        parts = urlsplit(url.reveal())
        whole = bool(parts.path if parts.scheme == "unix" else parts.hostname) and parts.port != 0
    except ValueError:
        parts, whole = urlsplit(""), False
    # With an @ or a / in the password, a piece of it would be taken for the host, and shown in errors.
    whole = whole and url.reveal().count("@") == parts.netloc.count("@") <= 1
    if whole and parts.scheme in {"redis", "rediss", "unix"}:
        return None
    return (
        "the URL of Redis is redis://host:6379/0, rediss://... or unix:///path/to/socket; percent-encode its "
        "user and password (%40 for @, %2F for /)"
    )


class CircuitBreaker:
    """Closed while Redis answers. Open ``since`` then, only one task tries again, every ``delay`` seconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY
        self.since = -math.inf
        self.reason = ""

    def failed(self, reason: str, now: float) -> bool:
        """Note a failure; return whether it is the first."""
        if self.is_open:
            self.delay = min(2 * self.delay, LAST_DELAY)
            return False
        self.is_open, self.delay, self.since, self.reason = True, FIRST_DELAY, now, reason
        return True


class FallbackPolicy:
    """What to send without Redis. A ``share`` of None divides the limit by the processes seen lately."""

    def __init__(self, limit: int, share: float | None) -> None:
        self._limit = limit
        self._share = share
        self._processes = 0
        self._seen_at = -math.inf

    def see(self, processes: int, now: float) -> None:
        """Note how many processes there are."""
        if processes >= self._processes or now - self._seen_at > REMEMBERED:
            self._processes, self._seen_at = processes, now

    @property
    def own_limit(self) -> int:
        """How many requests of a period this process may send alone."""
        share = self._share or (1 / self._processes if self._processes else UNKNOWN_SHARE)
        return max(1, int(self._limit * share + 1e-9))
