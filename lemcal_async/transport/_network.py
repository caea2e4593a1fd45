"""The byte streams below connections, on asyncio and on trio: how they are opened, read and written.

HTTP/1.1 pairs answers with requests by their order alone: a gateway that sends one answer twice shifts all
that follow, and one account would be given another's data. So the streams notice bytes that answer no
request, and a connection that has anything to read when a request is about to be sent is not used.

On asyncio the stream is a plain asyncio protocol: it sees every byte as it arrives, and costs half of what
anyio's does. On trio it waits for the socket itself, and reads no further than it is asked to.
"""

import asyncio
import ipaddress
import itertools
import math
import select
import socket
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable


DEFAULT_PORTS = {"http": 80, "https": 443}
UNASKED = "the server sent something before it was asked"
_NO_TLS = "the connection was closed before TLS began"
_NEXT_ADDRESS_AFTER = 0.25  # seconds
_HIGH_WATER = 2**18  # bytes received and not yet read at which the server has to wait


class NetworkBackend:
    """Opens streams for the connections of ``core``, which is httpcore or its fork."""

    def __init__(self, core: ModuleType) -> None:
        self._core = core

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,  # noqa: ARG002 - never given
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002 - never given
    ) -> Any:
        """Return a stream to ``host``."""
        core = self._core
        if not isinstance(current_token().native_token, asyncio.AbstractEventLoop):
            return await self._connect_on_trio(host, port, timeout)
        try:
            with anyio.fail_after(timeout):
                opened = await _open_socket(host, port)
                protocol = _Protocol()
                await asyncio.get_running_loop().create_connection(lambda: protocol, sock=opened)
        except TimeoutError as error:
            raise core.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # of a host name that cannot be
            raise core.ConnectError(str(error)) from error
        return AsyncioStream(protocol, core)

    async def _connect_on_trio(self, host: str, port: int, timeout: float | None) -> "TrioStream":  # noqa: ASYNC109
        import trio  # noqa: PLC0415 - whoever gets here runs it

        try:
            with anyio.fail_after(timeout):
                stream = await trio.open_tcp_stream(host, port)
        except TimeoutError as error:
            raise self._core.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # of a host name that cannot be
            raise self._core.ConnectError(str(error)) from error
        opened = socket.socket(fileno=stream.socket.detach())
        opened.setblocking(False)  # noqa: FBT003 - its only argument
        return TrioStream(opened, self._core)

    async def sleep(self, seconds: float) -> None:
        """Wait; part of httpcore's interface."""
        await anyio.sleep(seconds)


async def _open_socket(host: str, port: int) -> socket.socket:
    """Return a connected socket. Canceled at any moment, it leaves none behind.

    Of several addresses the next is tried after 0.25 s, beside those before it (RFC 8305). The event
    loop's own ``create_connection`` can lose a socket when it is canceled in the middle of that.
    """
    addresses = await _addresses(host, port)
    connected: list[socket.socket] = []
    errors: list[OSError] = []

    async def attempt(family: int, address: Any, ended: anyio.Event) -> None:
        opened: socket.socket | None = None
        try:
            opened = socket.socket(family, socket.SOCK_STREAM)  # fails where there is no IPv6
            opened.setblocking(False)  # noqa: FBT003 - its only argument
            await asyncio.get_running_loop().sock_connect(opened, address)
            connected.append(opened)
        except OSError as error:
            errors.append(error)
        finally:
            if opened is not None and opened not in connected[:1]:
                opened.close()
            ended.set()
            if connected:
                others.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as others:
            for family, address in addresses:
                ended = anyio.Event()
                others.start_soon(attempt, family, address, ended)
                with anyio.move_on_after(_NEXT_ADDRESS_AFTER):
                    await ended.wait()
    except BaseException:
        for each in connected:
            each.close()
        raise
    if connected:
        return connected[0]
    if len(errors) == 1:
        raise errors[0]
    raise OSError("; ".join(dict.fromkeys(map(str, errors))))  # that of IPv6 alone would often mislead


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Return families and addresses, IPv6 and IPv4 by turns, in the order that the resolver prefers."""
    flags = socket.AI_NUMERICHOST if _is_address(host) else 0
    if flags:  # needs no thread
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    else:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families: dict[int, list[tuple[int, Any]]] = {}
    for family, *_, address in found:
        families.setdefault(family, []).append((family, address))
    by_turns = itertools.zip_longest(*families.values())
    return [each for turn in by_turns for each in turn if each is not None]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Protocol(asyncio.Protocol):
    """Keeps what has arrived until it is read. One task reads or writes at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = bytearray()
        self.ended = False  # nothing more will arrive
        self.error: Exception | None = None  # why the connection was lost
        self._waiter: asyncio.Future[bool] | None = None
        self._reading = True
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.received += data
        if len(self.received) > _HIGH_WATER and self._reading:
            self._reading = False
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended, self.error = True, exc
        self.writable = True
        self._wake()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._wake()

    def take(self, max_bytes: int) -> bytes:
        """Return what has arrived, up to ``max_bytes``."""
        data = bytes(self.received[:max_bytes])
        del self.received[:max_bytes]
        if not self._reading and len(self.received) <= _HIGH_WATER:
            self._reading = True
            self.transport.resume_reading()
        return data

    async def wait(self, timeout: float | None) -> bool:  # noqa: ASYNC109 - a timer costs a tenth of a scope
        """Wait until something has changed; False if ``timeout`` came first."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiter = waiter
        timer = None if timeout is None else loop.call_later(timeout, _set, waiter, False)  # noqa: FBT003
        try:
            return await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None:
            _set(self._waiter, True)  # noqa: FBT003


def _set(waiter: "asyncio.Future[bool]", result: bool) -> None:  # noqa: FBT001 - called by a timer
    if not waiter.done():
        waiter.set_result(result)


class AsyncioStream:
    """A stream on an asyncio transport, as httpcore's connections expect it."""

    def __init__(self, protocol: _Protocol, core: ModuleType) -> None:
        self._protocol = protocol
        self._core = core
        self._is_readable = readable_check(protocol.transport.get_extra_info("socket"))
        self._sending = False  # whether a request is on its way out

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        """Return what arrives next, nothing at the end; raise ReadTimeout or ReadError."""
        protocol = self._protocol
        self._sending = False
        if protocol.received:
            await asyncio.sleep(0)  # other tasks run too, however fast the server is
        while not protocol.received:
            if protocol.error is not None:
                raise self._core.ReadError(str(protocol.error))
            if protocol.ended:
                return b""
            if not await protocol.wait(timeout):
                raise self._core.ReadTimeout
        return protocol.take(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """Send; raise WriteTimeout or WriteError, or RemoteProtocolError if an answer is there already."""
        protocol = self._protocol
        if not self._sending:
            if protocol.received:
                raise self._core.RemoteProtocolError(UNASKED)
            self._sending = True
        if not buffer:
            return
        if not protocol.transport.is_closing():
            protocol.transport.write(buffer)
        while not protocol.writable and not protocol.transport.is_closing():
            if not await protocol.wait(timeout):
                raise self._core.WriteTimeout
        if protocol.transport.is_closing():
            raise self._core.WriteError(str(protocol.error or "the connection is closed"))

    async def aclose(self) -> None:
        """Close, without waiting for the other side."""
        self._protocol.transport.abort()  # a close would flush, and wait for the goodbye of TLS
        await asyncio.sleep(0)  # for the socket is closed with the next turn of the event loop

    async def start_tls(
        self,
        ssl_context: "ssl.SSLContext",
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> "AsyncioStream":
        """Return the stream that speaks TLS over this one; raise ConnectTimeout or ConnectError."""
        inner = self._protocol.transport
        protocol = _Protocol()
        try:
            with anyio.fail_after(timeout):
                transport = await asyncio.get_running_loop().start_tls(
                    inner, protocol, ssl_context, server_hostname=server_hostname
                )
        except BaseException as error:
            inner.abort()
            if isinstance(error, TimeoutError):
                raise self._core.ConnectTimeout(str(error)) from error
            if isinstance(error, OSError):  # which those of TLS are
                raise self._core.ConnectError(str(error) or _NO_TLS) from error
            raise
        if transport is None:
            raise self._core.ConnectError(_NO_TLS)
        protocol.connection_made(transport)
        return AsyncioStream(protocol, self._core)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks for, None where that is unknown."""
        protocol = self._protocol
        if info == "is_readable":
            return bool(protocol.received) or protocol.ended or self._is_readable()
        if info == "server_addr":
            info = "peername"
        elif info == "client_addr":
            info = "sockname"
        return protocol.transport.get_extra_info(info)


def readable_check(opened: Any) -> "Callable[[], bool]":
    """Return what tells whether a socket has something that the event loop has not seen yet."""
    if not hasattr(select, "poll"):  # Windows
        return lambda: bool(select.select([opened], [], [], 0)[0])
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    return lambda: bool(poll.poll(0))


class TrioStream:
    """A stream on a socket, or on trio's TLS over it, as httpcore's connections expect it.

    It waits for the socket itself: trio's own stream goes through the scheduler twice more for each request.
    """

    def __init__(self, opened: socket.socket, core: ModuleType, tls: Any = None) -> None:
        import trio  # noqa: PLC0415 - whoever gets here runs it

        self._trio = trio
        # A socket that is closed, by another task perhaps, raises ValueError.
        self._failures = (OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
        self._socket = opened
        self._is_readable = readable_check(opened)
        self._core = core
        self._tls = tls
        self._sending = False  # whether a request is on its way out

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        """Return what arrives next, nothing at the end; raise ReadTimeout or ReadError."""
        self._sending = False
        try:
            with self._trio.move_on_after(math.inf if timeout is None else timeout):
                return await self._receive(max_bytes)
        except self._failures as error:
            raise self._core.ReadError(str(error)) from error
        raise self._core.ReadTimeout

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """Send; raise WriteTimeout or WriteError, or RemoteProtocolError if an answer is there already."""
        if not self._sending:
            # A TLS server may have sent session tickets, which are no answer.
            if self._is_readable() if self._tls is None else _has_unread(self._ssl_object):
                raise self._core.RemoteProtocolError(UNASKED)
            self._sending = True
        try:
            rest = memoryview(buffer) if self._tls is not None else self._send(memoryview(buffer))
            if not rest:
                return
            with self._trio.move_on_after(math.inf if timeout is None else timeout) as scope:
                await (self._send_all(rest) if self._tls is None else self._tls.send_all(rest))
        except self._failures as error:
            raise self._core.WriteError(str(error)) from error
        if scope.cancelled_caught:
            raise self._core.WriteTimeout

    async def _receive(self, max_bytes: int) -> bytes:
        if self._tls is not None:
            return bytes(await self._tls.receive_some(max_bytes))
        while True:
            await self._trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes)
            except BlockingIOError:
                continue

    async def _send_all(self, rest: memoryview) -> None:
        while rest:
            await self._trio.lowlevel.wait_writable(self._socket)
            rest = self._send(rest)

    def _send(self, data: memoryview) -> memoryview:
        """Send what the socket takes now; return the rest."""
        try:
            return data[self._socket.send(data) :]
        except BlockingIOError:
            return data

    async def aclose(self) -> None:
        """Close."""
        if self._tls is not None:
            await self._tls.aclose()
        elif self._socket.fileno() >= 0:
            self._trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def start_tls(
        self,
        ssl_context: "ssl.SSLContext",
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> "TrioStream":
        """Return the stream that speaks TLS over this one; raise ConnectTimeout or ConnectError."""
        trio = self._trio
        below = self._tls or trio.SocketStream(trio.socket.from_stdlib_socket(self._socket))
        tls = trio.SSLStream(below, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            with trio.fail_after(math.inf if timeout is None else timeout):
                await tls.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(tls)
            if isinstance(error, trio.TooSlowError):
                raise self._core.ConnectTimeout(str(error)) from error
            if isinstance(error, trio.BrokenResourceError | OSError):
                reason = str(error) or str(error.__cause__ or "") or _NO_TLS  # trio's own says nothing
                raise self._core.ConnectError(reason) from error
            raise
        return TrioStream(self._socket, self._core, tls)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks for, None where that is unknown."""
        if info == "is_readable":
            return _has_unread(self._ssl_object) or self._is_readable()
        if info == "ssl_object":
            return self._ssl_object
        if info == "socket":
            return self._socket
        if info == "server_addr":
            return self._socket.getpeername()
        return self._socket.getsockname() if info == "client_addr" else None

    @property
    def _ssl_object(self) -> "ssl.SSLObject | None":
        return None if self._tls is None else self._tls._ssl_object  # noqa: SLF001 - no public way


def _has_unread(tls: "ssl.SSLObject | None") -> bool:
    """Whether TLS holds back something that was not asked for, or an end. What it holds is lost."""
    if tls is None:
        return False
    import ssl  # noqa: PLC0415 - whoever has such an object has it

    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        pass
    return True
