"""A proxy for PostgreSQL's Unix socket that can be frozen: it then accepts data and sends nothing."""

import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAME = ".s.PGSQL.5432"


class Proxy:
    """Forwards bytes in both directions until ``freeze``; after ``thaw``, new connections work again."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.folder = folder
        self._target = str(target / NAME)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / NAME))
        self._listener.listen(100)
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.thaw()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, function: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments))
        self._threads[-1].start()

    def freeze(self) -> None:
        """Stop forwarding, like a suspended process."""
        self._open.clear()

    def thaw(self) -> None:
        """Resume forwarding, starting with the data received in the meantime."""
        self._open.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self._open.wait()
                server = socket.socket(socket.AF_UNIX)
                self._sockets.append(server)
                server.connect(self._target)
                self._start(self._forward, client, server)
                self._start(self._forward, server, client)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
