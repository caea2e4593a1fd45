"""Byte streams for connections, on asyncio and trio.

HTTP/1.1 matches responses to requests only by their order. If a gateway sent a response twice, every later
response on that connection would be off by one, and an account would receive another account's data. The
streams therefore detect unsolicited data: a connection that is readable before a request is sent is not used.

On asyncio, the stream is a plain asyncio protocol, which sees every byte as it arrives and costs half as much
as anyio's stream. On trio, it waits for the socket directly, and never reads ahead.
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
UNSOLICITED_DATA = "the server sent data before the request"
_NO_TLS = "the connection was closed before the TLS handshake"
_CONNECTION_ATTEMPT_DELAY = 0.25  # seconds
_HIGH_WATER = 2**18  # unread bytes at which reading from the socket pauses


class NetworkBackend:
    """Opens streams for connections of ``core``, which is httpcore or its fork."""

    def __init__(self, core: ModuleType) -> None:
        self._core = core

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,  # noqa: ARG002 - httpcore's interface
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002 - httpcore's interface
    ) -> Any:
        """Open a stream to ``host``."""
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
        except (OSError, UnicodeError) as error:  # UnicodeError: invalid host name
            raise core.ConnectError(str(error)) from error
        return AsyncioStream(protocol, core)

    async def _connect_on_trio(self, host: str, port: int, timeout: float | None) -> "TrioStream":  # noqa: ASYNC109
        import trio  # noqa: PLC0415 - already loaded

        try:
            with anyio.fail_after(timeout):
                stream = await trio.open_tcp_stream(host, port)
        except TimeoutError as error:
            raise self._core.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: invalid host name
            raise self._core.ConnectError(str(error)) from error
        opened = socket.socket(fileno=stream.socket.detach())
        opened.setblocking(False)  # noqa: FBT003 - its only argument
        return TrioStream(opened, self._core)

    async def sleep(self, seconds: float) -> None:
        """Sleep; part of httpcore's interface."""
        await anyio.sleep(seconds)


async def _open_socket(host: str, port: int) -> socket.socket:
    """Return a connected socket; cancellation leaks none.

    Addresses are tried in parallel, each 0.25 s after the one before (Happy Eyeballs, RFC 8305). The event
    loop's own ``create_connection`` can leak a socket if it is canceled meanwhile.
    """
    addresses = await _addresses(host, port)
    connected: list[socket.socket] = []
    errors: list[OSError] = []

    async def attempt(family: int, address: Any, ended: anyio.Event) -> None:
        opened: socket.socket | None = None
        try:
            opened = socket.socket(family, socket.SOCK_STREAM)  # fails for IPv6 if it is unavailable
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
                with anyio.move_on_after(_CONNECTION_ATTEMPT_DELAY):
                    await ended.wait()
    except BaseException:
        for each in connected:
            each.close()
        raise
    if connected:
        return connected[0]
    if len(errors) == 1:
        raise errors[0]
    raise OSError("; ".join(dict.fromkeys(map(str, errors))))  # the IPv6 error alone is often misleading


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Return families and addresses, alternating IPv6 and IPv4, otherwise in the resolver's order."""
    flags = socket.AI_NUMERICHOST if _is_address(host) else 0
    if flags:  # does not block, so no thread is needed
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    else:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families: dict[int, list[tuple[int, Any]]] = {}
    for family, *_, address in found:
        families.setdefault(family, []).append((family, address))
    interleaved = itertools.zip_longest(*families.values())
    return [each for group in interleaved for each in group if each is not None]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Protocol(asyncio.Protocol):
    """Buffers received data until it is read. Only one task may read or write at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = bytearray()
        self.ended = False  # whether the end of the stream was reached
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
        """Return the buffered data, at most ``max_bytes``."""
        data = bytes(self.received[:max_bytes])
        del self.received[:max_bytes]
        if not self._reading and len(self.received) <= _HIGH_WATER:
            self._reading = True
            self.transport.resume_reading()
        return data

    async def wait(self, timeout: float | None) -> bool:  # noqa: ASYNC109 - 10 times cheaper than a scope
        """Wait until the state changes; return False on timeout."""
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
        self._sending = False  # whether a request is being sent

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        """Return the next data, or nothing at the end; raise ReadTimeout or ReadError."""
        protocol = self._protocol
        self._sending = False
        if protocol.received:
            await asyncio.sleep(0)  # let other tasks run, however fast the server is
        while not protocol.received:
            if protocol.error is not None:
                raise self._core.ReadError(str(protocol.error))
            if protocol.ended:
                return b""
            if not await protocol.wait(timeout):
                raise self._core.ReadTimeout
        return protocol.take(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """Send data; raise WriteTimeout or WriteError, or RemoteProtocolError after unsolicited data."""
        protocol = self._protocol
        if not self._sending:
            if protocol.received:
                raise self._core.RemoteProtocolError(UNSOLICITED_DATA)
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
        """Close the stream without waiting for the server."""
        self._protocol.transport.abort()  # close() would flush, and wait for the TLS shutdown
        await asyncio.sleep(0)  # the event loop closes the socket in its next iteration

    async def start_tls(
        self,
        ssl_context: "ssl.SSLContext",
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> "AsyncioStream":
        """Return a TLS stream over this one; raise ConnectTimeout or ConnectError."""
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
            if isinstance(error, OSError):  # includes ssl.SSLError
                raise self._core.ConnectError(str(error) or _NO_TLS) from error
            raise
        if transport is None:
            raise self._core.ConnectError(_NO_TLS)
        protocol.connection_made(transport)
        return AsyncioStream(protocol, self._core)

    def get_extra_info(self, info: str) -> Any:
        """Return the value of a name that httpcore uses; None if unknown."""
        protocol = self._protocol
        if info == "is_readable":
            return bool(protocol.received) or protocol.ended or self._is_readable()
        if info == "server_addr":
            info = "peername"
        elif info == "client_addr":
            info = "sockname"
        return protocol.transport.get_extra_info(info)


def readable_check(opened: Any) -> "Callable[[], bool]":
    """Return a function that checks whether a socket has data that the event loop has not read yet."""
    if not hasattr(select, "poll"):  # Windows
        return lambda: bool(select.select([opened], [], [], 0)[0])
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    return lambda: bool(poll.poll(0))


class TrioStream:
    """A stream on a socket, or on trio's TLS over it, as httpcore's connections expect it.

    It waits for the socket directly: trio's own stream takes two more scheduler turns per request.
    """

    def __init__(self, opened: socket.socket, core: ModuleType, tls: Any = None) -> None:
        import trio  # noqa: PLC0415 - already loaded

        self._trio = trio
        # A socket that was closed, possibly by another task, raises ValueError.
        self._failures = (OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
        self._socket = opened
        self._is_readable = readable_check(opened)
        self._core = core
        self._tls = tls
        self._sending = False  # whether a request is being sent

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        """Return the next data, or nothing at the end; raise ReadTimeout or ReadError."""
        self._sending = False
        try:
            with self._trio.move_on_after(math.inf if timeout is None else timeout):
                return await self._receive(max_bytes)
        except self._failures as error:
            raise self._core.ReadError(str(error)) from error
        raise self._core.ReadTimeout

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """Send data; raise WriteTimeout or WriteError, or RemoteProtocolError after unsolicited data."""
        if not self._sending:
            # A TLS server may have sent session tickets, which are not unsolicited data.
            if self._is_readable() if self._tls is None else _has_unread(self._ssl_object):
                raise self._core.RemoteProtocolError(UNSOLICITED_DATA)
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
        """Send as much as the socket accepts now; return the rest."""
        try:
            return data[self._socket.send(data) :]
        except BlockingIOError:
            return data

    async def aclose(self) -> None:
        """Close the stream."""
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
        """Return a TLS stream over this one; raise ConnectTimeout or ConnectError."""
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
                reason = str(error) or str(error.__cause__ or "") or _NO_TLS  # trio's error has no message
                raise self._core.ConnectError(reason) from error
            raise
        return TrioStream(self._socket, self._core, tls)

    def get_extra_info(self, info: str) -> Any:
        """Return the value of a name that httpcore uses; None if unknown."""
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
        return None if self._tls is None else self._tls._ssl_object  # noqa: SLF001 - no public API


def _has_unread(tls: "ssl.SSLObject | None") -> bool:
    """Whether TLS has unread data or has ended. The check consumes data."""
    if tls is None:
        return False
    import ssl  # noqa: PLC0415 - already loaded

    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        pass
    return True
