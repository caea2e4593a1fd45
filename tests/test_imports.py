"""What an import brings along: only what is used is loaded, and no extra is needed."""

import builtins
import importlib
import subprocess
import sys
from typing import Any

import pytest

# Of the modules behind the extras, rich is not here: httpx imports it for a command line of its own, where
# it is installed.
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
    """Return the top-level modules that are loaded when a program ends."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_package_alone() -> None:
    """The name costs nothing: not even the dependencies are loaded."""
    loaded = loaded_by("import lemcal_async; lemcal_async.__version__")
    assert set() == loaded & (NEVER | DEPENDENCIES | {"asyncio"})


def test_the_client() -> None:
    """The required dependencies, and none of the extras."""
    loaded = loaded_by("from lemcal_async import *")
    assert set() == loaded & NEVER
    assert {"anyio", "attrs", "httpx"} <= loaded


def test_a_client() -> None:
    """Made outside of an event loop, it loads what its calls need, which is what one of httpx loads, too."""
    loaded = loaded_by("from lemcal_async import *\nAsyncLemcal('usr_1', 'k1')")
    assert "httpcore" in loaded
    assert set() == loaded & NEVER - loaded_by("import httpx\nhttpx.AsyncClient()")


def test_a_client_in_an_event_loop() -> None:
    """There it holds nothing up: the rest is loaded in a thread, with the first call."""
    program = (
        "import asyncio\nfrom lemcal_async import AsyncLemcal\n"
        "async def main(): AsyncLemcal('usr_1', 'k1')\nasyncio.run(main())"
    )
    assert "httpcore" not in loaded_by(program)


def test_the_errors() -> None:
    """Who unpickles an error needs no HTTP library."""
    loaded = loaded_by("from lemcal_async import errors; errors.ServerError")
    assert set() == loaded & (NEVER | {"anyio", "httpx"})


def test_the_models() -> None:
    """Nor does who reads meetings from a file."""
    loaded = loaded_by("from lemcal_async import Meeting, from_wire; from_wire({'_id': 'mee_1'}, Meeting)")
    assert set() == loaded & (NEVER | {"anyio", "httpx", "tenacity"})


def test_the_webhook_receiver() -> None:
    """It is an ASGI app without a framework, and without the sandbox's server."""
    loaded = loaded_by("from lemcal_async.webhooks import WebhookReceiver")
    assert set() == loaded & NEVER


def test_the_pytest_plugin() -> None:
    """It is imported in every run of pytest on a machine that has the package."""
    loaded = loaded_by("import lemcal_async.pytest_plugin")
    assert set() == loaded & (NEVER - {"pytest"} | DEPENDENCIES)


def test_a_call() -> None:
    """It loads no more than the client did, but for httpcore, which looks for trio."""
    program = (
        "import anyio\n"
        "from lemcal_async import AsyncLemcal, RetryPolicy, errors\n"
        "async def main():\n"
        "    retry = RetryPolicy(attempts=1)\n"
        "    async with AsyncLemcal('usr_1', 'k1', base_url='http://127.0.0.1:9', retry=retry) as lemcal:\n"
        "        try:\n"
        "            await lemcal.me()\n"
        "        except errors.APIConnectionError:\n"
        "            print('no_answer')\n"
        "anyio.run(main)\n"
    )
    loaded = loaded_by(program)
    assert set() == loaded & (NEVER - {"trio"})
    assert {"no_answer", "httpcore"} <= loaded


def test_the_limiters() -> None:
    """The one that needs an extra is loaded when it is asked for."""
    loaded = loaded_by("from lemcal_async import ratelimit; ratelimit.LocalRateLimiter()")
    assert set() == loaded & NEVER
    assert "coredis" in loaded_by("from lemcal_async.ratelimit import RedisRateLimiter")


def test_the_redis_limiter_names_its_extra() -> None:
    """Where it is not installed; any other name is an AttributeError as of any module."""
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


def test_the_synchronization() -> None:
    """A database is loaded only by who uses one."""
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
def test_a_module_names_its_extra(module: str, missing: str, extra: str) -> None:
    """Where it is not installed."""
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


@pytest.mark.parametrize(("missing", "message"), [("httpcore2", "its extra"), ("h11", "^$")])
def test_a_wire_that_cannot_be_imported(missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the extra would bring is blamed on it."""
    original = builtins.__import__

    def failing(name: str, *arguments: Any) -> Any:
        if name == "httpcore2":
            raise ModuleNotFoundError(name=missing)
        return original(name, *arguments)

    monkeypatch.delitem(sys.modules, "lemcal_async.transport.httpx2", raising=False)
    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("lemcal_async.transport.httpx2")
