"""URLs and servers that cannot be used raise an error that says what to do, without secrets."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import ExitStack

import anyio
import pytest
from coredis import Redis
from redis_server import RedisServer, free_port

from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key, RedisRateLimiter

KEY = Key("https://api.example.com", "0f" * 16)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run on both event loops, in real time."""
    return str(request.param)


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "http://localhost",
        "redis://",
        "redis://:hunter2@host:port",
        "unix://",
        "redis://[",
        "redis://bob:hunter2@x/y@host/0",
        "redis://bob:hunter2@x@host/0",
        "redis://bob:hunter2/x@host/0",
        "redis://bob:1234/hunter2@host/0",
        "redis://bob:hunter2#x@host/0",
        "redis://bob:hunter2?x@host/0",
        "unix://bob:hunter2/x@/tmp/redis.sock",
    ],
)
def test_invalid_urls(url: str) -> None:
    """The error says what to do and does not quote the URL, which may contain a password."""
    with pytest.raises(ConfigurationError, match="%40 for @, %2F for /") as caught:
        RedisRateLimiter(url)
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "hunter" not in str(caught.value)
    assert "hunter" not in shown.partition("lemcal_async/ratelimit")[2]
    assert caught.value.__context__ is None


def test_a_client_instead_of_a_url() -> None:
    """The error is one line that says what to pass."""
    with pytest.raises(ConfigurationError, match="takes a Redis URL, such as") as caught:
        RedisRateLimiter(Redis(host="localhost"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.anyio
async def test_passwords(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A percent-encoded password works; a wrong one raises an error that does not quote it."""
    caplog.set_level(logging.DEBUG)
    redis.command("CONFIG", "SET", "requirepass", "hunter 2@/")
    try:
        right = RedisRateLimiter(redis.url.replace("unix://", "unix://:hunter%202%40%2F@"), timeout=5.0)
        assert "hunter" not in repr(right)
        async with right:
            (await right.acquire(KEY)).unsent()
        wrong = RedisRateLimiter(redis.url.replace("unix://", "unix://:hunter3@"), timeout=5.0)
        with pytest.raises(ConfigurationError, match="check the user and the password") as caught:
            await wrong.__aenter__()
        assert "hunter" not in str(caught.value)
        assert caught.value.__context__ is None
        assert "hunter" not in caplog.text
    finally:
        redis.command("CONFIG", "SET", "requirepass", "", password="hunter 2@/")


async def entering_error(url: str) -> str:
    """Return the error of entering a limiter, which must leave nothing behind."""
    limiter = RedisRateLimiter(url, timeout=5.0)
    with pytest.raises(ConfigurationError) as caught:
        await limiter.__aenter__()
    assert caught.value.__context__ is None
    with pytest.raises(ConfigurationError, match="only inside its `async with`"):
        await limiter.acquire(KEY)
    return str(caught.value)


@pytest.mark.anyio
@pytest.mark.parametrize("rights", ["-eval -evalsha", "-@scripting", "-set", "resetkeys ~cache:*"])
async def test_missing_permissions(redis: RedisServer, rights: str) -> None:
    """Missing permissions are an error, not an outage."""
    redis.command("ACL", "SETUSER", "ann", "on", ">secret", "~*", "+@all", *rights.split())
    try:
        error = await entering_error(redis.url.replace("unix://", "unix://ann:secret@"))
    finally:
        redis.command("ACL", "DELUSER", "ann")
    assert "allow its user EVAL, EVALSHA, GET, SET and TIME" in error
    assert "secret" not in error


@pytest.mark.anyio
async def test_a_replica() -> None:
    """A replica does not accept writes."""
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer(tcp=True))
        replica = stack.enter_context(RedisServer("--replicaof", f"127.0.0.1 {primary.port}"))
        assert "use the address of the primary" in await entering_error(replica.url)


@pytest.mark.anyio
async def test_a_missing_database(redis: RedisServer) -> None:
    """A database number that the server does not have will never work."""
    error = await entering_error(f"{redis.url}?db=99")
    assert "DB index is out of range" in error
    assert "use a database number that this Redis has" in error


@pytest.mark.anyio
async def test_tls_to_a_port_without_tls(caplog: pytest.LogCaptureFixture) -> None:
    """The log says that TLS failed, because such a server looks unreachable."""
    with RedisServer(tcp=True) as server:
        async with RedisRateLimiter(f"rediss://127.0.0.1:{server.port}", timeout=0.5):
            pass
    (warning,) = [each.getMessage() for each in caplog.records if each.name == "lemcal_async.ratelimit"]
    assert "the TLS handshake failed: no reply" in warning


@pytest.fixture
def cluster() -> Iterator[RedisServer]:
    """Return a cluster node that owns no hash slots."""
    with ExitStack() as stack:
        options = [("--cluster-enabled", "yes", "--cluster-port", str(free_port())) for _ in range(2)]
        nodes = [stack.enter_context(RedisServer(*each, tcp=True)) for each in options]
        nodes[1].command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(nodes[1].port), options[1][-1])
        yield nodes[0]


@pytest.mark.anyio
async def test_a_node_of_a_cluster(cluster: RedisServer) -> None:
    """It redirects to another node (MOVED), which the limiter does not follow."""
    with anyio.fail_after(20):
        while "cluster_state:ok" not in cluster.command("CLUSTER", "INFO"):  # noqa: ASYNC110
            await anyio.sleep(0.05)
    assert "this is a node of a cluster" in await entering_error(cluster.url)
