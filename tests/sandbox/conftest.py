"""Fixtures: a served sandbox, plain httpx clients (not the SDK's client) and a hook receiver."""

import contextlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest

from lemcal_async.sandbox import Sandbox

Connect = Callable[..., httpx.Client]

# Shared and never used: creating an SSL context per client would take most of the time.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def no_blocking_calls() -> None:
    """Disable this check: the sandbox blocks on its own threads by design."""


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Serve a sandbox with the default options."""
    with Sandbox().serve() as sandbox:
        yield sandbox


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Return a function that creates a client with an account's credentials."""
    with contextlib.ExitStack() as stack:

        def connect(sandbox: Sandbox, account: int = 0) -> httpx.Client:
            credentials = sandbox.accounts[account]
            client = httpx.Client(
                base_url=sandbox.base_url,
                auth=(credentials.user_id, credentials.api_key),
                trust_env=False,
                verify=NO_TLS,
            )
            return stack.enter_context(client)

        yield connect


@pytest.fixture
def client(sandbox: Sandbox, connect: Connect) -> httpx.Client:
    """Return a client for the first account."""
    return connect(sandbox)


class Receiver(http.server.ThreadingHTTPServer):
    """Receives hook deliveries on a real socket; responds with ``status_code`` while it may respond."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status_code = 200
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.arrived = threading.Semaphore(0)
        self.may_respond = threading.Event()
        self.may_respond.set()

    def url(self, path: str = "/hook?token=s3cret") -> str:
        """Return a target URL for a hook."""
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, dict(self.headers), body))
        self.server.arrived.release()
        self.server.may_respond.wait(60)
        with contextlib.suppress(OSError):  # the sender may have disconnected
            self.send_response(self.server.status_code)
            self.send_header("content-length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Serve a hook receiver."""
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=[0.01])
        thread.start()
        try:
            yield receiver
        finally:
            receiver.may_respond.set()
            receiver.shutdown()
            thread.join()
