"""Serves the sandbox on a real socket: uvicorn in a thread, started and stopped without delay.

Uvicorn polls every 0.1 s for shutdown, and its shutdown waits for hanging requests. A sandbox often lives
for a single test, so this server stops immediately and aborts open connections.
"""

import asyncio
import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Generator, MutableMapping
from email.utils import formatdate
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lemcal_async.sandbox._app import CONNECTION

KEEP_ALIVE: Final = 75
"""Keep-alive timeout of an idle connection, in seconds: longer than any test, like the service's CDN."""

# Makes close() discard unsent data and send RST instead of FIN. The fields are shorter on Windows.
_NO_LINGER: Final = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


@contextlib.contextmanager
def listening(app: ASGIApp, host: str, port: int) -> Generator[str]:
    """Serve ``app`` while the context is open and yield its origin, such as ``http://127.0.0.1:49152``.

    Port 0 picks a free port. Raises OSError if the address cannot be bound. Exiting aborts open connections.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        server = _ThreadedServer(app, listener)
        server.start()
        try:
            url_host = f"[{host}]" if family == socket.AF_INET6 else host
            yield f"http://{url_host}:{listener.getsockname()[1]}"
        finally:
            server.stop()


class _ThreadedServer(uvicorn.Server):
    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http=_SandboxProtocol,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name="lemcal-sandbox", daemon=True)
        self._started_or_failed = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop_requested: asyncio.Event

    def start(self) -> None:
        """Return once connections are accepted, or raise the error that prevents it."""
        self._thread.start()
        self._started_or_failed.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self) -> None:
        """Stop the server, and return once its thread and sockets are closed."""
        with contextlib.suppress(RuntimeError):  # the loop has already ended with a failure, raised below
            self._loop.call_soon_threadsafe(self._stop_requested.set)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            # Ignore the event loop policy: not every loop supports SO_LINGER and remove_reader.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self.serve(sockets=[self._listener]))
        except BaseException as error:  # noqa: BLE001  # raised by start() or stop()
            self._failure = error
        finally:
            self._started_or_failed.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and notify start()."""
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        self._stop_requested = asyncio.Event()
        self._started_or_failed.set()

    async def main_loop(self) -> None:
        """Serve until stop()."""
        await self._stop_requested.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Abort every connection and cancel its requests."""
        # asyncio registers an accepted connection three loop iterations later; if the server is closed
        # before that, the socket leaks. So stop accepting first, and close the server afterward.
        self._loop.remove_reader(self._listener)
        for _ in range(3):
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # let each request notice that its connection is gone
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        # A task canceled before its first step raises CancelledError.
        await asyncio.gather(*tasks, return_exceptions=True)


class _SandboxProtocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        # uvicorn's own option would remove the handlers of the process-wide logger.
        self.access_log = False
        # Headers and body are two writes, so without TCP_NODELAY each response takes 40 ms on loopback.
        # asyncio sets the option only on sockets with a protocol number, which sockets accepted here lack.
        _socket(transport).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app = _ConnectionApp(self.app, transport)


class _ConnectionApp:
    """Wraps the app for one connection: lets it break the connection, and adds a Date header to responses."""

    def __init__(self, app: Any, transport: asyncio.Transport) -> None:
        self._app = app
        self._transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_date(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = (b"date", formatdate(usegmt=True).encode())
                message = {**message, "headers": [date, *message["headers"]]}
            await send(message)

        extensions: MutableMapping[str, Any] = {**scope.get("extensions", {}), CONNECTION: self}
        with contextlib.suppress(asyncio.CancelledError):  # from shutdown(); uvicorn would log it as an error
            await self._app({**scope, "extensions": extensions}, receive, send_with_date)

    def reset(self) -> None:
        _socket(self._transport).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()

    def close(self) -> None:
        self._transport.close()


def _socket(transport: asyncio.Transport) -> socket.socket:
    sock: socket.socket = transport.get_extra_info("socket")
    return sock
