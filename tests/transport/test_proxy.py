"""The proxies that the environment sets, as the default wire honors them."""

import asyncio
import contextlib
import ssl
import traceback
from collections.abc import Iterator

import anyio
import httpx
import pytest
import trustme

from lemcal_async.errors import ConfigurationError
from lemcal_async.transport import _environment
from lemcal_async.transport._pooled import BasePooledTransport

from .conftest import MakeWire
from .loopback import Loopback, Seen, first_of

PASSWORD = "s3cret"  # invented, to be looked for
BASIC = "Basic bGVtY2FsOnMzY3JldA=="  # lemcal:s3cret


class Proxy(Loopback):
    """A forward proxy: it passes plain requests on, and opens tunnels for the others."""

    async def answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect to the target, and pass everything between it and the client."""
        url = httpx.URL(f"//{seen.target}" if seen.method == "CONNECT" else seen.target)
        try:
            from_target, to_target = await _connect(url)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        try:
            if seen.method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                to_target.write(f"{seen.method} {url.path} HTTP/1.1\r\n\r\n".encode())
            await first_of(_pipe(reader, to_target), _pipe(from_target, writer))
            raise ConnectionAbortedError
        finally:
            to_target.close()
            with contextlib.suppress(OSError):
                await to_target.wait_closed()


async def _connect(url: httpx.URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if url.host.endswith(".example"):
        raise OSError("there is no such host")  # without asking a name server, which may take its time
    return await asyncio.open_connection(url.host, url.port)


async def _pipe(incoming: asyncio.StreamReader, outgoing: asyncio.StreamWriter) -> None:
    while data := await incoming.read(65536):
        outgoing.write(data)
        await outgoing.drain()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the proxies of the machine out of the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS of a server here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS of a client that trusts it."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Serve a proxy."""
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
    """Return the status of the answer to a GET."""
    async with httpx.AsyncClient(transport=transport, timeout=5) as client:
        return (await client.get(url)).status_code


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.anyio
async def test_http(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The proxy is given the whole URL."""
    monkeypatch.setenv(name, proxy.url)
    assert 200 == await get(make_wire(), f"{server.url}/through")
    assert [("GET", f"{server.url}/through")] == [(seen.method, seen.target) for seen in proxy.seen]
    assert ["/through"] == [seen.target for seen in server.seen]


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.anyio
async def test_https(
    *,
    make_wire: MakeWire,
    secure: Loopback,
    proxy: Proxy,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The proxy learns the host and nothing else; the tunnel is used again."""
    monkeypatch.setenv(name, proxy.url)
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for _ in range(2):
            assert 200 == (await client.get(f"{secure.url}/secret")).status_code
    assert [("CONNECT", f"127.0.0.1:{secure.port}")] == [(seen.method, seen.target) for seen in proxy.seen]
    assert [1, 1] == secure.connections


@pytest.mark.anyio
async def test_a_proxy_that_speaks_tls(
    *,
    make_wire: MakeWire,
    secure: Loopback,
    server: Loopback,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is trusted by the same context as the service."""
    with Proxy(server_tls) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert 200 == await get(make_wire(ssl_context=client_tls), secure.url)
        assert 200 == await get(make_wire(ssl_context=client_tls), server.url)
    assert ["CONNECT", "GET"] == [seen.method for seen in proxy.seen]


@pytest.mark.anyio
async def test_for_the_other_scheme(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy for https says nothing about http."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    assert 200 == await get(make_wire(), server.url)
    assert [] == proxy.seen


@pytest.mark.anyio
async def test_a_setting_without_a_scheme(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host and port are common, and mean http."""
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert 200 == await get(make_wire(), server.url)
    assert 1 == len(proxy.seen)


@pytest.mark.anyio
async def test_credentials(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to the proxy, and no further."""
    monkeypatch.setenv("HTTP_PROXY", f"http://lemcal:{PASSWORD}@127.0.0.1:{proxy.port}")
    assert 200 == await get(make_wire(), server.url)
    assert [BASIC] == [seen.headers["proxy-authorization"] for seen in proxy.seen]
    assert "proxy-authorization" not in server.seen[0].headers


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
    """Hosts that are reached directly, with a port or without."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    monkeypatch.setenv(name, value.format(port=server.port))
    assert 200 == await get(make_wire(), server.url)
    assert [] == proxy.seen


@pytest.mark.parametrize("value", ["example.com", "127.0.0.1:1", ""])
@pytest.mark.anyio
async def test_no_proxy_for_others(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """They make no difference here."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", value)
    assert 200 == await get(make_wire(), server.url)
    assert 1 == len(proxy.seen)


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
    """It may be the scheme's own, which the URL does not say; IPv6 addresses are in brackets or not."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example")
    target = httpx.URL(url)
    asked = target.scheme, target.host, target.port
    assert _environment.Proxies(trust_env=True).get(*asked) is not None
    monkeypatch.setenv("NO_PROXY", value)
    assert _environment.Proxies(trust_env=True).get(*asked) is None


@pytest.mark.anyio
async def test_a_setting_that_is_empty(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It means no proxy."""
    monkeypatch.setenv("HTTP_PROXY", "")
    assert 200 == await get(make_wire(), server.url)


@pytest.mark.anyio
async def test_the_environment_is_not_trusted(
    make_wire: MakeWire, server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it sets no proxy."""
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    assert 200 == await get(make_wire(trust_env=False), server.url)
    assert [] == proxy.seen


@pytest.mark.anyio
async def test_a_target_that_the_proxy_cannot_reach(
    make_wire: MakeWire, proxy: Proxy, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as the proxy's error: nothing was passed on."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with Loopback() as gone:
        pass
    with pytest.raises(httpx.ProxyError, match="502"):
        await get(make_wire(ssl_context=client_tls), f"https://127.0.0.1:{gone.port}")


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
async def test_a_setting_that_cannot_work(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, value: str, scheme: str
) -> None:
    """It is refused when it would be used, without the password; and no slot is lost."""
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
    assert [] == server.seen
