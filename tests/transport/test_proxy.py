"""The environment's proxies, on every wire."""

import asyncio
import contextlib
import ssl
import traceback
from collections.abc import Iterator

import anyio
import httpx
import pytest
import trustme

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import APIConnectionError, ConfigurationError
from lemcal_async.transport import _environment
from lemcal_async.transport._pooled import BasePooledTransport

from .conftest import MakeWire
from .loopback import Loopback, ReceivedRequest, first_of

PASSWORD = "s3cret"  # made up
BASIC = "Basic bGVtY2FsOnMzY3JldA=="  # lemcal:s3cret


class Proxy(Loopback):
    """A forward proxy: it forwards plain requests, and opens tunnels for https."""

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Connect to the target, and relay all data."""
        url = httpx.URL(f"//{request.target}" if request.method == "CONNECT" else request.target)
        try:
            from_target, to_target = await _connect(url)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        try:
            if request.method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                to_target.write(f"{request.method} {url.path} HTTP/1.1\r\n\r\n".encode())
            await first_of(_pipe(reader, to_target), _pipe(from_target, writer))
            raise ConnectionAbortedError
        finally:
            to_target.close()
            with contextlib.suppress(OSError):
                await to_target.wait_closed()


async def _connect(url: httpx.URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if url.host.endswith(".example"):
        raise OSError("there is no such host")  # a name server could be slow
    return await asyncio.open_connection(url.host, url.port)


async def _pipe(incoming: asyncio.StreamReader, outgoing: asyncio.StreamWriter) -> None:
    while data := await incoming.read(65536):
        outgoing.write(data)
        await outgoing.drain()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the machine's own proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return a server's TLS context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS context of a client that trusts the server."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Start a proxy."""
    with Proxy() as proxy:
        yield proxy


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


@pytest.fixture
def secure(server_tls: ssl.SSLContext) -> Iterator[Loopback]:
    """Serve HTTPS."""
    with Loopback(server_tls) as server:
        yield server


async def get(transport: BasePooledTransport, url: str) -> int:
    """Send a GET, and return the response's status code."""
    async with httpx.AsyncClient(transport=transport, timeout=5) as client:
        return (await client.get(url)).status_code


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.anyio
async def test_http_through_a_proxy(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The proxy receives the full URL."""
    monkeypatch.setenv(name, proxy.url)
    assert 200 == await get(make_wire(), f"{server.url}/through")
    assert [("GET", f"{server.url}/through")] == [
        (request.method, request.target) for request in proxy.requests
    ]
    assert ["/through"] == [request.target for request in server.requests]


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.anyio
async def test_https_through_a_proxy(
    *,
    make_wire: MakeWire,
    secure: Loopback,
    proxy: Proxy,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The proxy learns only the host and port; the tunnel is reused."""
    monkeypatch.setenv(name, proxy.url)
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for _ in range(2):
            assert 200 == (await client.get(f"{secure.url}/secret")).status_code
    assert [("CONNECT", f"127.0.0.1:{secure.port}")] == [
        (request.method, request.target) for request in proxy.requests
    ]
    assert [1, 1] == secure.connections


@pytest.mark.anyio
async def test_https_proxy(
    *,
    make_wire: MakeWire,
    secure: Loopback,
    server: Loopback,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same TLS context is used for the proxy and the service."""
    with Proxy(server_tls) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert 200 == await get(make_wire(ssl_context=client_tls), secure.url)
        assert 200 == await get(make_wire(ssl_context=client_tls), server.url)
    assert ["CONNECT", "GET"] == [request.method for request in proxy.requests]


@pytest.mark.anyio
async def test_proxy_for_the_other_scheme(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy for https is not used for http."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    assert 200 == await get(make_wire(), server.url)
    assert [] == proxy.requests


@pytest.mark.anyio
async def test_proxy_without_a_scheme(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``host:port`` means http."""
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert 200 == await get(make_wire(), server.url)
    assert 1 == len(proxy.requests)


@pytest.mark.anyio
async def test_proxy_credentials(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent only to the proxy."""
    monkeypatch.setenv("HTTP_PROXY", f"http://lemcal:{PASSWORD}@127.0.0.1:{proxy.port}")
    assert 200 == await get(make_wire(), server.url)
    assert [BASIC] == [request.headers["proxy-authorization"] for request in proxy.requests]
    assert "proxy-authorization" not in server.requests[0].headers


@pytest.mark.parametrize("value", ["127.0.0.1", "example.com, 127.0.0.1", "*", "127.0.0.1:{port}"])
@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.anyio
async def test_no_proxy(
    *,
    make_wire: MakeWire,
    server: Loopback,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    """The hosts in NO_PROXY are connected to directly, with or without a port."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    monkeypatch.setenv(name, value.format(port=server.port))
    assert 200 == await get(make_wire(), server.url)
    assert [] == proxy.requests


@pytest.mark.parametrize("value", ["example.com", "127.0.0.1:1", ""])
@pytest.mark.anyio
async def test_no_proxy_for_other_hosts(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Other hosts in NO_PROXY have no effect."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", value)
    assert 200 == await get(make_wire(), server.url)
    assert 1 == len(proxy.requests)


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("api.lemcal.com:443", "https://api.lemcal.com"),
        ("lemcal.com:80", "http://api.lemcal.com"),
        ("::1", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::1]:80", "http://[::1]"),
    ],
)
def test_no_proxy_for_a_port(monkeypatch: pytest.MonkeyPatch, value: str, url: str) -> None:
    """The port may be the scheme's default; IPv6 addresses may have brackets."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example")
    target = httpx.URL(url)
    origin = target.scheme, target.host, target.port
    assert _environment.Proxies(trust_env=True).get(*origin) is not None
    monkeypatch.setenv("NO_PROXY", value)
    assert _environment.Proxies(trust_env=True).get(*origin) is None


@pytest.mark.anyio
async def test_empty_proxy_variable(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty value means no proxy."""
    monkeypatch.setenv("HTTP_PROXY", "")
    assert 200 == await get(make_wire(), server.url)


@pytest.mark.anyio
async def test_no_proxies_without_trust_env(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's proxies are ignored."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    assert 200 == await get(make_wire(trust_env=False), server.url)
    assert [] == proxy.requests


@pytest.mark.anyio
async def test_proxy_that_cannot_reach_the_target(
    make_wire: MakeWire, proxy: Proxy, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call raises a ProxyError."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with Loopback() as closed:
        pass
    with pytest.raises(httpx.ProxyError, match="502"):
        await get(make_wire(ssl_context=client_tls), f"https://127.0.0.1:{closed.port}")


@pytest.mark.parametrize(
    "value",
    [
        f"http://lemcal:{PASSWORD}@127.0.0.1:port",
        f"http://lemcal:{PASSWORD}@[::1",
        f"ftp://lemcal:{PASSWORD}@127.0.0.1:21",
        f"socks5://lemcal:{PASSWORD}@127.0.0.1:1080",  # socksio is not installed
        f"lemcal:{PASSWORD}@127.0.0.1:port",
        f"http://lemcal:{PASSWORD}@127.0.0.1\n:8080",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.anyio
async def test_invalid_proxy(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, value: str, scheme: str
) -> None:
    """Each request raises an error without the password, and no slot is lost."""
    monkeypatch.setenv("ALL_PROXY", value)
    transport = make_wire(max_connections=1)
    request = httpx.Request("GET", f"{scheme}://127.0.0.1:{server.port}")
    for _ in range(2):
        with pytest.raises(
            ConfigurationError, match=f"proxy that the environment sets for {scheme}"
        ) as caught:
            with anyio.fail_after(5):
                await transport.handle_async_request(request)
        error = caught.value
        assert (None, None) == (error.__cause__, error.__context__)
        assert PASSWORD not in "".join(traceback.format_exception(error))
    assert [] == server.requests


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
@pytest.mark.anyio
async def test_failing_proxy_is_named(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """The client's error names the proxy, without its credentials."""
    with Loopback() as closed:
        pass
    monkeypatch.setenv("HTTPS_PROXY", f"http://lemcal:{PASSWORD}@{host}:{closed.port}/")
    lemcal = AsyncLemcal("usr_1", "key-1", transport=make_wire(), retry=RetryPolicy(attempts=1))
    message = (
        rf"^GET /me: no response from api\.lemcal\.com: via the proxy {host}:{closed.port}: \S.*proxy, or try"
    )
    with pytest.raises(APIConnectionError, match=message) as caught:
        await lemcal.me()
    assert PASSWORD not in str(caught.value)
    assert not caught.value.maybe_processed
