"""Imports load only the modules they need, and require no extras."""

import builtins
import importlib
import subprocess
import sys
from typing import Any

import pytest

# The modules of the extras, except rich: httpx imports it for its own command line, if
# rich is installed.
EXTRAS = {
    "coredis",
    "fastapi",
    "httpcore2",
    "httpx2",
    "opentelemetry",
    "orjson",
    "psycopg",
    "pydantic",
    "redis",
    "sqlalchemy",
    "starlette",
    "typer",
}
NEVER = EXTRAS | {"pytest", "trio", "uvicorn"}
DEPENDENCIES = {"anyio", "attrs", "cattrs", "httpcore", "httpx", "tenacity"}


def loaded_by(program: str) -> set[str]:
    """Return the top-level modules that a program has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_package() -> None:
    """Importing the package loads nothing else, not even the dependencies."""
    loaded = loaded_by("import lemcal_async; lemcal_async.__version__")
    assert set() == loaded & (NEVER | DEPENDENCIES | {"asyncio"})


def test_star_import() -> None:
    """Importing all names loads the required dependencies, and no extras."""
    loaded = loaded_by("from lemcal_async import *")
    assert set() == loaded & NEVER
    assert {"anyio", "attrs", "httpx"} <= loaded


def test_create_a_client() -> None:
    """Outside an event loop, a client loads everything its calls need, but no more than httpx.AsyncClient."""
    loaded = loaded_by("from lemcal_async import *\nAsyncLemcal('usr_1', 'k1')")
    assert "httpcore" in loaded
    assert set() == loaded & NEVER - loaded_by("import httpx\nhttpx.AsyncClient()")


def test_create_a_client_in_an_event_loop() -> None:
    """Inside an event loop, the first call loads the HTTP modules in a thread, to avoid blocking."""
    program = (
        "import asyncio\nfrom lemcal_async import AsyncLemcal\n"
        "async def main(): AsyncLemcal('usr_1', 'k1')\nasyncio.run(main())"
    )
    assert "httpcore" not in loaded_by(program)


def test_errors() -> None:
    """Unpickling an error loads no HTTP library."""
    loaded = loaded_by("from lemcal_async import errors; errors.ServerError")
    assert set() == loaded & (NEVER | {"anyio", "httpx"})


def test_models() -> None:
    """Reading meetings from a file loads no HTTP library."""
    loaded = loaded_by("from lemcal_async import Meeting, from_wire; from_wire({'_id': 'mee_1'}, Meeting)")
    assert set() == loaded & (NEVER | {"anyio", "httpx", "tenacity"})


def test_webhook_receiver() -> None:
    """The receiver loads neither a web framework nor the sandbox's server."""
    loaded = loaded_by("from lemcal_async.webhooks import WebhookReceiver")
    assert set() == loaded & NEVER


def test_pytest_plugin() -> None:
    """The plugin, which every pytest run imports, loads none of the dependencies."""
    loaded = loaded_by("import lemcal_async.pytest_plugin")
    assert set() == loaded & (NEVER - {"pytest"} | DEPENDENCIES)


def test_call() -> None:
    """A call loads no extras; httpcore may load trio."""
    program = (
        "import anyio\n"
        "from lemcal_async import AsyncLemcal, RetryPolicy, errors\n"
        "async def main():\n"
        "    retry = RetryPolicy(attempts=1)\n"
        "    async with AsyncLemcal('usr_1', 'k1', base_url='http://127.0.0.1:9', retry=retry) as lemcal:\n"
        "        try:\n"
        "            await lemcal.me()\n"
        "        except errors.APIConnectionError:\n"
        "            print('no_response')\n"
        "anyio.run(main)\n"
    )
    loaded = loaded_by(program)
    assert set() == loaded & (NEVER - {"trio"})
    assert {"no_response", "httpcore"} <= loaded


def test_rate_limiters() -> None:
    """The limiter that requires an extra is loaded only on use."""
    loaded = loaded_by("from lemcal_async import ratelimit; ratelimit.LocalRateLimiter()")
    assert set() == loaded & NEVER
    assert "coredis" in loaded_by("from lemcal_async.ratelimit import RedisRateLimiter")


def test_redis_limiter_without_its_extra() -> None:
    """The ImportError names the extra; an unknown name is an AttributeError."""
    program = (
        "import sys; sys.modules['coredis'] = None\n"
        "from lemcal_async import ratelimit\n"
        "assert not hasattr(ratelimit, 'MemcachedRateLimiter')\n"
        "try:\n"
        "    ratelimit.RedisRateLimiter\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'lemcal-async[redis]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    assert "lemcal_async" in loaded_by(program)


def test_sync() -> None:
    """SQLAlchemy is loaded only with SQLStore."""
    loaded = loaded_by("from lemcal_async.sync import MemoryStore, sync_meetings, watch")
    assert set() == loaded & NEVER
    assert "sqlalchemy" in loaded_by("from lemcal_async.sync import SQLStore")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("sandbox", "starlette", "sandbox"),
        ("sandbox", "uvicorn", "sandbox"),
        ("transport.aiohttp", "aiohttp", "aiohttp"),
        ("fleet", "sqlalchemy", "fleet"),
        ("fleet._streaq", "streaq", "fleet"),
        ("transport.httpx2", "httpx2", "httpx2"),
        ("transport.httpx2", "httpcore2", "httpx2"),
    ],
)
def test_module_without_its_extra(module: str, missing: str, extra: str) -> None:
    """The ImportError names the extra to install."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n"
        f"    import lemcal_async.{module}\n"
        "except ImportError as error:\n"
        f"    assert \"pip install 'lemcal-async[{extra}]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    assert "lemcal_async" in loaded_by(program)


@pytest.mark.parametrize(("missing", "message"), [("httpcore2", "the extra httpx2"), ("h11", "^$")])
def test_import_error_of_another_module(missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra only if a module of the extra is missing."""
    original = builtins.__import__

    def failing(name: str, *arguments: Any) -> Any:
        if name == "httpcore2":
            raise ModuleNotFoundError(name=missing)
        return original(name, *arguments)

    monkeypatch.delitem(sys.modules, "lemcal_async.transport.httpx2", raising=False)
    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("lemcal_async.transport.httpx2")
