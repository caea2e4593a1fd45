"""What the environment may get wrong, and host names that are not ASCII."""

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
    """Start without settings, and without contexts that were made from others."""
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
    """Return a file that holds no certificate."""
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
async def test_a_file_that_cannot_be_used(
    *,
    make_wire: MakeWire,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    garbage: Path,
    name: str,
    value: str,
    reason: str,
) -> None:
    """One line that names the variable and the path, at each call; and no slot is lost."""
    path = value.format(tmp=tmp_path)
    monkeypatch.setenv(name, path)
    if name == "SSLKEYLOGFILE" and make_wire.__name__ == "HTTPX2Transport":
        monkeypatch.setenv("SSL_CERT_FILE", str(_certifi()))  # httpx2 looks at the other only then
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
        with pytest.raises(httpx.ConnectError):  # as soon as it is corrected
            await transport.handle_async_request(httpx.Request("GET", "https://127.0.0.1:1"))


def _certifi() -> str:
    import certifi

    return certifi.where()


@pytest.mark.anyio
async def test_it_is_not_trusted(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then it is not looked at."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    async with make_wire(trust_env=False) as transport:
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(httpx.Request("GET", "https://127.0.0.1:1"))


@pytest.mark.anyio
async def test_plain_http_needs_none(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes on."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    async with httpx.AsyncClient(transport=make_wire()) as client:
        assert 200 == (await client.get(server.url)).status_code


@contextmanager
def resolver(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, Any]) -> Iterator[list[str]]:
    """Have every host name mean these addresses; provide the names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(name: str | bytes, *_: object, **__: object) -> list[tuple[Any, ...]]:
        asked.append(name if isinstance(name, str) else name.decode())
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
        yield asked


HOSTS = [
    ("bücher.example", "xn--bcher-kva.example"),
    ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("BÜCHER.example", "xn--bcher-kva.example"),
    ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
]


@pytest.mark.parametrize(("host", "sent"), HOSTS)
@pytest.mark.anyio
async def test_a_host_that_is_not_ascii(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch, host: str, sent: str
) -> None:
    """It is looked up, and sent, in its ASCII form."""
    with resolver(monkeypatch, (socket.AF_INET, ("127.0.0.1", server.port))) as asked:
        async with make_wire() as transport:
            lemcal = AsyncLemcal(
                "usr_x",
                "secret",
                base_url=f"http://{host}:{server.port}",
                transport=transport,
                allow_insecure_http=True,
            )
            assert {} == (await lemcal.request("GET", "/")).data
    assert [sent] == asked
    assert [f"{sent}:{server.port}"] == [seen.headers["host"] for seen in server.seen]


@pytest.mark.parametrize("host", ["a..example", f"{'a' * 64}.example"])
@pytest.mark.anyio
async def test_a_host_that_cannot_be(make_wire: MakeWire, host: str) -> None:
    """It is not found, as any other that does not exist."""
    async with httpx.AsyncClient(transport=make_wire()) as client:
        with pytest.raises(httpx.ConnectError, match="label"):
            await client.get(f"http://{host}/")


@pytest.mark.anyio
async def test_a_machine_without_ipv6(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its resolver may name IPv6 addresses all the same, and they are passed over."""

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
async def test_several_addresses_that_refuse(make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error does not speak of the first one alone."""
    with Loopback() as gone:
        pass
    addresses = (
        (socket.AF_INET6, ("::1", gone.port, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", gone.port)),
    )
    with resolver(monkeypatch, *addresses):
        async with httpx.AsyncClient(transport=make_wire()) as client:
            with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1|all attempts"):
                await client.get(f"http://lemcal.example:{gone.port}/")


@pytest.mark.parametrize(("host", "sent"), HOSTS[:2])
@pytest.mark.anyio
async def test_such_a_host_behind_a_proxy(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, host: str, sent: str
) -> None:
    """The proxy is told the ASCII form, too."""
    with Proxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
            await client.get(f"http://{host}/")
            with pytest.raises(httpx.ProxyError, match="502"):
                await client.get(f"https://{host}/")
    assert [f"http://{sent}/", f"{sent}:443"] == [seen.target for seen in proxy.seen]
