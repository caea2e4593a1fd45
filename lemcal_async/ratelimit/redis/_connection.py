"""The connection to Redis: coredis, which runs on asyncio and trio, and all that is to know of it.

It runs the script, and says in one way that Redis does not answer. When to try again is for others.
"""

import contextlib
from typing import Any, Self
from urllib.parse import urlsplit

from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

try:
    from coredis import Redis
    from coredis.exceptions import AuthenticationError, NoScriptError, RedisError
    from coredis.pool import ConnectionPool
    from coredis.retry import NoRetryPolicy
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "coredis":
        raise
    raise ImportError("RedisRateLimiter needs its extra: pip install 'lemcal-async[redis]'") from None

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit.redis._script import SCRIPT, SHA1

_CONNECTIONS = 8  # commands share them; more are open only while several keys wait for a new one


class Unreachable(Exception):  # noqa: N818 - a state, handled where it is met
    """Redis did not answer in time, or not with an answer; the message says why, without secrets."""


class RedisConnection:
    """A pool of connections, open inside ``async with``; ``timeout`` seconds for each step of a call."""

    def __init__(self, url: Secret[str], timeout: float) -> None:
        if problem := _problem_of(url.reveal()):
            raise ConfigurationError(problem)
        self._url = url
        self._timeout = timeout
        self._client: Redis[bytes] | None = None

    async def __aenter__(self) -> Self:
        """Open; at the top of a task, as coredis needs. Raises ConfigurationError if it is refused.

        That Redis is away is no error yet: whoever calls finds out.
        """
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
        await client.__aenter__()
        refused = None
        try:
            await client.script_load(SCRIPT)
        except AuthenticationError as error:
            refused = str(error)
        except (RedisError, OSError, TimeoutError):
            pass
        except BaseException:
            await client.__aexit__(None, None, None)
            raise
        if refused is not None:
            await client.__aexit__(None, None, None)
            raise ConfigurationError(f"Redis refuses the user or the password of the URL: {refused}")
        self._client = client
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close. What the body raised is not passed on: coredis would wrap it in a group."""
        client, self._client = self._client, None
        if client is not None:  # pragma: no branch - entered
            await client.__aexit__(None, None, None)

    async def run(self, keys: list[str], argument: str) -> str | bytes:
        """Run the script, and load it where Redis does not have it (any more). Raises Unreachable.

        Cancelled, the script may still run. The connection is not harmed: an answer that nobody waits
        for is dropped when it comes, because coredis keeps the order of its questions.
        """
        client = self._client
        if client is None:
            raise Unreachable("the connection was closed")
        said: object
        try:
            with contextlib.suppress(NoScriptError):
                return _text(await client.evalsha(SHA1, keys=keys, args=[argument]))
            return _text(await client.eval(SCRIPT, keys=keys, args=[argument]))
        except (RedisError, OSError, TimeoutError) as error:
            said = f"{type(error).__name__}: {error}"
            # It may wait for an answer that comes late or never: no other call is to stand behind it.
            client.connection_pool.disconnect()
        raise Unreachable(said)


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


def _text(said: object) -> str | bytes:
    if isinstance(said, str | bytes):
        return said
    raise RedisError(f"the script returned {type(said).__name__}")  # pragma: no cover - it does not


def _problem_of(url: str) -> str | None:
    """Say what is wrong with a URL, without any of it."""
    try:
        parts = urlsplit(url)
        whole = bool(parts.path if parts.scheme == "unix" else parts.hostname)
        _ = parts.port
    except ValueError:
        whole, parts = False, urlsplit("")
    if whole and parts.scheme in {"redis", "rediss", "unix"}:
        return None
    return "the URL of Redis is redis://host:6379/0, rediss://... or unix:///path/to/socket"
