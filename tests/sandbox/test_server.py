"""The real socket: it starts immediately and leaks nothing."""

import asyncio
import contextlib
import gc
import importlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest
import trio

from lemcal_async.sandbox import Sandbox, faults, run
from lemcal_async.sandbox._sandbox import PREFIX
from lemcal_async.sandbox._server import _SandboxProtocol, listening

from .conftest import Connect

FDS = Path("/dev/fd")


def count_open_files() -> int:
    """Return the number of files this process has open, or 0 if the system does not report it."""
    return len(list(FDS.iterdir())) if FDS.exists() else 0


def test_base_url(sandbox: Sandbox) -> None:
    """The base URL contains the chosen port and the prefix."""
    origin, _, port = sandbox.base_url.removesuffix("/api/lemcal").rpartition(":")
    assert "http://127.0.0.1" == origin
    assert 0 < int(port) < 65536


def test_no_base_url_without_a_server() -> None:
    """Before and after serving, the error says what to do."""
    sandbox = Sandbox()
    with pytest.raises(RuntimeError, match=r"with sandbox\.serve"):
        _ = sandbox.base_url
    with sandbox.serve():
        assert sandbox.base_url
    with pytest.raises(RuntimeError, match="served"):
        _ = sandbox.base_url


def test_explicit_port() -> None:
    """A port can be reused immediately; a port in use is an OSError."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    sandbox = Sandbox()
    for _ in range(2):
        with sandbox.serve(port=port) as served:
            assert sandbox is served
            assert f"http://127.0.0.1:{port}/api/lemcal" == sandbox.base_url
            with pytest.raises(OSError), Sandbox().serve(port=port):
                raise AssertionError
            assert 401 == httpx.get(f"{sandbox.base_url}/me", trust_env=False).status_code


def test_serve_twice_is_an_error(sandbox: Sandbox) -> None:
    """A second serve() is an error and does not affect the first."""
    with pytest.raises(RuntimeError, match="already"), sandbox.serve():
        raise AssertionError
    assert sandbox.base_url


def test_ipv6(connect: Connect) -> None:
    """An IPv6 host is in brackets in the URL."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with Sandbox().serve("::1") as sandbox:
        assert sandbox.base_url.startswith("http://[::1]:")
        assert 200 == connect(sandbox).get("/me").status_code


def test_serve_leaks_nothing(connect: Connect) -> None:
    """No threads, files or warnings remain, even with keep-alive connections open."""
    with Sandbox().serve() as warm:
        connect(warm).get("/me")
    gc.collect()
    threads, files = set(threading.enumerate()), count_open_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            with Sandbox().serve() as sandbox, httpx.Client(trust_env=False) as client:
                assert 401 == client.get(f"{sandbox.base_url}/me").status_code
        gc.collect()
    assert set(threading.enumerate()) <= threads  # a thread of an earlier test may have ended
    assert files == count_open_files()


def test_hanging_requests_are_aborted(caplog: pytest.LogCaptureFixture) -> None:
    """Shutdown does not wait for hanging requests; their clients get an error, and nothing is logged."""
    outcomes: list[str] = []

    def hang(sandbox: Sandbox) -> None:
        try:
            auth = (sandbox.user_id, sandbox.api_key)
            httpx.get(f"{sandbox.base_url}/me", auth=auth, trust_env=False, timeout=None)
        except httpx.TransportError as error:
            outcomes.append(type(error).__name__)

    with Sandbox().serve() as sandbox:
        sandbox.inject(faults.slow(600), times=5)  # longer than a test may take
        clients = [threading.Thread(target=hang, args=[sandbox]) for _ in range(5)]
        for thread in clients:
            thread.start()
        while len(sandbox.requests) < 5:
            time.sleep(0.001)
    for thread in clients:
        thread.join()
    assert 5 == len(outcomes)
    assert [] == [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_connections_during_shutdown_do_not_leak() -> None:
    """Connections accepted during shutdown do not leak."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            with contextlib.ExitStack() as connections, Sandbox(meetings=0).serve() as sandbox:
                port = int(sandbox.base_url.removesuffix(PREFIX).rpartition(":")[2])
                for _ in range(4):
                    connections.enter_context(socket.create_connection(("127.0.0.1", port)))
        gc.collect()
    assert [] == [str(warning.message) for warning in caught]


def test_shutdown_under_load(caplog: pytest.LogCaptureFixture) -> None:
    """Requests that arrive during shutdown are aborted, and no error is logged."""

    def send_requests(port: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
            response = b"."
            while response:
                connection.sendall(b"GET /api/lemcal/me HTTP/1.1\r\nHost: x\r\n\r\n")
                response = connection.recv(65_536)

    for _ in range(30):
        with Sandbox(meetings=0, limit=None).serve() as sandbox:
            port = int(sandbox.base_url.removesuffix(PREFIX).rpartition(":")[2])
            clients = [threading.Thread(target=send_requests, args=[port]) for _ in range(4)]
            for thread in clients:
                thread.start()
            time.sleep(0.01)
        for thread in clients:
            thread.join(5)
    assert [] == [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_bookings_during_shutdown() -> None:
    """A booking during shutdown leaves no delivery thread behind."""

    def book(url: str) -> None:
        with contextlib.suppress(httpx.TransportError), httpx.Client(trust_env=False) as client:
            while True:
                client.post(url)

    with socket.create_server(("127.0.0.1", 0)) as silent_receiver:
        target = f"http://127.0.0.1:{silent_receiver.getsockname()[1]}/"
        for _ in range(5):
            with Sandbox(limit=None).serve() as sandbox:
                hook = {"targetUrl": target, "anyMeetingType": True}
                auth = (sandbox.user_id, sandbox.api_key)
                httpx.post(f"{sandbox.base_url}/hooks", json=hook, auth=auth, trust_env=False)
                url = f"{sandbox.base_url.removesuffix(PREFIX)}/_sandbox/bookings"
                booker = threading.Thread(target=book, args=[url])
                booker.start()
                while len(sandbox.meetings()) < 20:  # until bookings are being made
                    time.sleep(0.001)
            left = [thread for thread in threading.enumerate() if thread.name == "lemcal-sandbox-hooks"]
            booker.join(5)
            assert [] == left


def test_other_servers_keep_their_access_log() -> None:
    """The sandbox does not change the process-wide logger."""
    logger, handler = logging.getLogger("uvicorn.access"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        with Sandbox().serve():
            pass
        assert (True, True) == (handler in logger.handlers, logger.propagate)
    finally:
        logger.removeHandler(handler)


def test_keep_alive(sandbox: Sandbox, client: httpx.Client) -> None:
    """Connections are reused."""
    ports = [
        client.get("/me").extensions["network_stream"].get_extra_info("client_addr")[1] for _ in range(5)
    ]
    assert 1 == len(set(ports))


def test_responses_are_sent_without_delay(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    """Accepted connections set TCP_NODELAY; otherwise a response takes 40 ms on loopback."""
    made: list[int] = []
    connection_made = _SandboxProtocol.connection_made

    def recorded(self: _SandboxProtocol, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        made.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(_SandboxProtocol, "connection_made", recorded)
    with Sandbox().serve() as sandbox:
        connect(sandbox).get("/me")
    assert [True] == list(map(bool, made))


def test_failure_to_start_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """serve() raises the error and leaks no thread."""

    async def fail(*_: object, **__: object) -> None:
        raise OSError("no more files")

    monkeypatch.setattr("uvicorn.Server.startup", fail)
    threads = set(threading.enumerate())
    with pytest.raises(OSError, match="no more files"), Sandbox().serve():
        raise AssertionError
    assert threads == set(threading.enumerate())


def test_later_failure_is_raised_on_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """serve() raises a later failure on exit."""
    now = threading.Event()

    async def fail(*_: object) -> None:
        await asyncio.to_thread(now.wait)
        raise RuntimeError("broken")

    def serve() -> None:
        with Sandbox().serve():
            now.set()
            while "lemcal-sandbox" in [thread.name for thread in threading.enumerate()]:
                time.sleep(0.001)

    monkeypatch.setattr("lemcal_async.sandbox._server._ThreadedServer.main_loop", fail)
    with pytest.raises(RuntimeError, match="broken"):
        serve()


def test_serve_in_a_running_event_loop() -> None:
    """serve() works in a running asyncio or trio loop, and responds to requests from that loop."""

    async def get_status() -> int:
        with Sandbox().serve() as sandbox:
            async with httpx.AsyncClient(trust_env=False) as client:
                auth = (sandbox.user_id, sandbox.api_key)
                return (await client.get(f"{sandbox.base_url}/me", auth=auth)).status_code

    assert [200, 200] == [asyncio.run(get_status()), trio.run(get_status)]


def test_listening_serves_any_app() -> None:
    """The server works with any app; an exception in the app is a 500."""

    async def app(scope: object, receive: object, send: object) -> None:
        raise ValueError("a bug")

    with listening(app, "127.0.0.1", 0) as origin:
        response = httpx.get(origin, trust_env=False)
    assert 500 == response.status_code


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to another process")
def test_run_until_interrupted() -> None:
    """run() serves until Ctrl-C, and returns without a traceback."""
    program = (
        "import sys; from lemcal_async.sandbox import Sandbox, run\n"
        "run(Sandbox(), '127.0.0.1', 0, lambda sandbox: print(sandbox.base_url, flush=True))\n"
        "print('bye')"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        base_url = process.stdout.readline().strip()
        assert 401 == httpx.get(f"{base_url}/me", trust_env=False).status_code
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (0, "bye\n", "") == (process.returncode, out, err)


def test_run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """on_ready is called once connections are accepted."""
    statuses: list[int] = []

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    run(
        Sandbox(),
        "127.0.0.1",
        0,
        lambda sandbox: statuses.append(httpx.get(f"{sandbox.base_url}/me", trust_env=False).status_code),
    )
    assert [401] == statuses


@pytest.fixture
def unimported_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the sandbox from the imported modules, so that it is imported again."""
    for name in [name for name in sys.modules if name.startswith("lemcal_async.sandbox")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("unimported_sandbox")
@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_missing_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """The error is a single line that says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("lemcal_async.sandbox")
    assert "the sandbox requires the extra sandbox: pip install 'lemcal-async[sandbox]'" == str(caught.value)


@pytest.mark.usefixtures("unimported_sandbox")
def test_other_missing_modules_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other missing modules are not reported as a missing extra."""
    monkeypatch.setitem(sys.modules, "anyio", None)
    with pytest.raises(ModuleNotFoundError, match="anyio"):
        importlib.import_module("lemcal_async.sandbox")
