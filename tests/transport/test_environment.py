"""Invalid settings in the environment, and host names that are not ASCII."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from lemcal_async import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.transport import _environment

from .conftest import MakeWire
from .loopback import Loopback
from .test_proxy import Proxy

VARIABLES = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "SSLKEYLOGFILE",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without settings, and without TLS contexts from earlier tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(_environment, "_contexts", {})


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


@pytest.fixture
def garbage(tmp_path: Path) -> Path:
    """Return a file without a valid certificate."""
    path = tmp_path / "garbage.pem"
    path.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    return path


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SSL_CERT_FILE", "{tmp}/missing.pem", "No such file"),
        ("SSL_CERT_FILE", "{tmp}/garbage.pem", r"\w"),
        ("SSL_CERT_FILE", "{tmp}", r"\w"),
        ("SSL_CERT_DIR", "{tmp}/missing", "not a directory"),
        ("SSLKEYLOGFILE", "{tmp}/missing/keys", "No such file"),
    ],
)
@pytest.mark.anyio
async def test_unusable_files(
    *,
    make_wire: MakeWire,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    garbage: Path,
    name: str,
    value: str,
    reason: str,
) -> None:
    """Each call raises one line that names the variable and the path; no slot is lost."""
    path = value.format(tmp=tmp_path)
    monkeypatch.setenv(name, path)
    if name == "SSLKEYLOGFILE" and make_wire.__name__ == "HTTPX2Transport":
        monkeypatch.setenv("SSL_CERT_FILE", str(_certifi()))  # otherwise httpx2 ignores SSLKEYLOGFILE
    async with make_wire(max_connections=1) as transport:
        lemcal = AsyncLemcal("usr_x", "secret", base_url="https://127.0.0.1:1", transport=transport)
        for _ in range(2):
            with pytest.raises(
                ConfigurationError, match=f"{name}={path} cannot be used: .*{reason}"
            ) as caught:
                await lemcal.me()
            assert (None, None) == (caught.value.__cause__, caught.value.__context__)
            assert "\n" not in str(caught.value)
        monkeypatch.delenv(name)
        with pytest.raises(httpx.ConnectError):  # after the correction
            await transport.handle_async_request(httpx.Request("GET", "https://127.0.0.1:1"))


def _certifi() -> str:
    import certifi

    return certifi.where()


@pytest.mark.anyio
async def test_environment_is_ignored_without_trust_env(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An invalid setting does not matter."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    async with make_wire(trust_env=False) as transport:
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(httpx.Request("GET", "https://127.0.0.1:1"))


@pytest.mark.anyio
async def test_plain_http_needs_no_certificates(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An invalid certificate file does not matter."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    async with httpx.AsyncClient(transport=make_wire()) as client:
        assert 200 == (await client.get(server.url)).status_code


@contextmanager
def resolver(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, Any]) -> Iterator[list[str]]:
    """Resolve every host name to these addresses; yield the list of requested names."""
    names: list[str] = []

    def getaddrinfo(name: str | bytes, *_: object, **__: object) -> list[tuple[Any, ...]]:
        names.append(name if isinstance(name, str) else name.decode())
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(
            self, host: str | bytes | None, *_: object, **__: object
        ) -> list[tuple[Any, ...]]:
            assert host is not None
            return getaddrinfo(host)

        async def getnameinfo(self, *_: object) -> Any:
            raise NotImplementedError

    with monkeypatch.context() as patch:
        try:
            trio.socket.set_custom_hostname_resolver(Resolver())
        except RuntimeError:  # on asyncio
            patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield names


HOSTS = [
    ("bücher.example", "xn--bcher-kva.example"),
    ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("BÜCHER.example", "xn--bcher-kva.example"),
    ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
]


@pytest.mark.parametrize(("host", "sent"), HOSTS)
@pytest.mark.anyio
async def test_international_host_names(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, host: str, sent: str
) -> None:
    """The ASCII form is resolved, and sent as the Host header."""
    with resolver(monkeypatch, (socket.AF_INET, ("127.0.0.1", server.port))) as names:
        async with make_wire() as transport:
            lemcal = AsyncLemcal(
                "usr_x",
                "secret",
                base_url=f"http://{host}:{server.port}",
                transport=transport,
                allow_insecure_http=True,
            )
            assert {} == (await lemcal.request("GET", "/")).data
    assert [sent] == names
    assert [f"{sent}:{server.port}"] == [request.headers["host"] for request in server.requests]


@pytest.mark.parametrize("host", ["a..example", f"{'a' * 64}.example"])
@pytest.mark.anyio
async def test_invalid_host_names(make_wire: MakeWire, host: str) -> None:
    """They raise a ConnectError, as nonexistent hosts do."""
    async with httpx.AsyncClient(transport=make_wire()) as client:
        with pytest.raises(httpx.ConnectError, match="label"):
            await client.get(f"http://{host}/")


@pytest.mark.anyio
async def test_machine_without_ipv6(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPv6 addresses from the resolver are skipped."""

    class NoIPv6(socket.socket):
        def __init__(self, family: int = -1, *arguments: Any, **options: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *arguments, **options)

    addresses = (
        (socket.AF_INET6, ("::1", server.port, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", server.port)),
    )
    with resolver(monkeypatch, *addresses):
        async with httpx.AsyncClient(transport=make_wire()) as client:
            monkeypatch.setattr(socket, "socket", NoIPv6)
            assert 200 == (await client.get(f"http://lemcal.example:{server.port}/")).status_code
            monkeypatch.undo()


@pytest.mark.anyio
async def test_several_unreachable_addresses(make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error does not mention only the first address."""
    with Loopback() as closed:
        pass
    addresses = (
        (socket.AF_INET6, ("::1", closed.port, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", closed.port)),
    )
    with resolver(monkeypatch, *addresses):
        async with httpx.AsyncClient(transport=make_wire()) as client:
            with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1|all attempts"):
                await client.get(f"http://lemcal.example:{closed.port}/")


@pytest.mark.parametrize(("host", "sent"), HOSTS[:2])
@pytest.mark.anyio
async def test_international_host_names_through_a_proxy(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, host: str, sent: str
) -> None:
    """The proxy receives the ASCII form."""
    with Proxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
            await client.get(f"http://{host}/")
            with pytest.raises(httpx.ProxyError, match="502"):
                await client.get(f"https://{host}/")
    assert [f"http://{sent}/", f"{sent}:443"] == [request.target for request in proxy.requests]
