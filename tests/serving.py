"""Real servers for ASGI apps, in the event loop of the test: uvicorn on asyncio, hypercorn on trio."""

import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import attrs

from lemcal_async.webhooks._http import Receive, Scope, Send

App = Callable[[Scope, Receive, Send], Awaitable[None]]


@attrs.frozen
class Server:
    """A server that listens on ``port``; ``stop`` starts its graceful shutdown."""

    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(app: App, *, grace: int = 30) -> AsyncIterator[Server]:
    """Serve while the context is open; at shutdown, requests have ``grace`` seconds to finish."""
    serve = _uvicorn if anyio.get_cancelled_exc_class().__module__.startswith("asyncio") else _hypercorn
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with anyio.create_task_group() as tasks:
            server = await tasks.start(functools.partial(serve, app, listener, grace))
            yield server
            server.stop()


async def _uvicorn(app: App, listener: socket.socket, grace: int, *, task_status: Any) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, lifespan="on", timeout_graceful_shutdown=grace, timeout_keep_alive=5
    )
    stopping = anyio.Event()

    class AnnouncedServer(uvicorn.Server):
        async def main_loop(self) -> None:
            await stopping.wait()  # uvicorn itself polls every 0.1 s

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            task_status.started(Server(listener.getsockname()[1], stopping.set))

    server = AnnouncedServer(config)
    await server._serve([listener])  # without uvicorn's signal handlers, which would interfere with pytest


async def _hypercorn(app: App, listener: socket.socket, grace: int, *, task_status: Any) -> None:
    import hypercorn.config
    import hypercorn.trio

    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = grace
    config.errorlog = None
    stopping = anyio.Event()

    class Status:
        def started(self, binds: Any = None) -> None:
            task_status.started(Server(int(binds[0].rpartition(":")[2]), stopping.set))

    await hypercorn.trio.serve(
        cast("Any", app), config, shutdown_trigger=stopping.wait, task_status=Status(), mode="asgi"
    )
