"""``lemcal worker`` and ``lemcal fleet``: run and manage a fleet that a module of the user creates."""

import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import anyio
import attrs
import typer

from lemcal_async.cli._output import emit, print_fields, print_json, spinner
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.fleet import Fleet

fleet_app = typer.Typer(help="Show a fleet's status and manage its accounts.")

FleetName: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODULE:NAME", help="The Fleet object, such as app:fleet.")
]
UserIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="USER_ID", help="The accounts.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def worker(
    fleet: FleetName,
    *,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, help="Accounts to synchronize concurrently.")
    ] = 16,
    backend: Annotated[
        Literal["asyncio", "trio"],
        typer.Option("--backend", metavar="asyncio|trio", help="The event loop to run on."),
    ] = "asyncio",
) -> None:
    """Run a fleet worker until SIGTERM or Ctrl-C.

    It finishes the running turns before it exits, and logs to standard error.
    """
    loaded = _load(fleet)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("streaq").setLevel(logging.WARNING)
    logging.getLogger("coredis").setLevel(logging.WARNING)

    async def work() -> None:
        logging.getLogger("lemcal_async.fleet").info(
            "worker started, up to %d concurrent accounts", concurrency
        )
        await loaded.run(concurrency)

    anyio.run(work, backend=backend)


@fleet_app.command("status")
def status(fleet: FleetName, *, json: AsJson = False) -> None:
    """Show the fleet's accounts, queue and workers."""
    values = attrs.asdict(_run("Reading the fleet's status", _load(fleet).status))
    if json:
        print_json(values)
        return
    fields = [(title, values[name], unit) for name, title, unit in _STATUS_FIELDS]
    print_fields([(title, _format_value(value, unit)) for title, value, unit in fields])


_STATUS_FIELDS: Final = (
    ("accounts", "Accounts", ""),
    ("due", "Due", ""),
    ("oldest_due", "Oldest due", " s"),
    ("queued", "Queued", ""),
    ("running", "Running", ""),
    ("failing", "Failing", ""),
    ("paused", "Paused", ""),
    ("undelivered", "Undelivered changes", ""),
    ("oldest_undelivered", "Oldest undelivered", " s"),
    ("parked", "Parked changes", ""),
    ("workers", "Workers", ""),
)


def _format_value(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}"


@fleet_app.command("add")
def add(
    fleet: FleetName,
    user_ids: UserIds,
    *,
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval", metavar="SECONDS", min=1, help="Synchronization interval. Defaults to the fleet's."
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Add accounts, or change their synchronization interval."""
    loaded = _load(fleet)
    _print_count(_run("Adding", lambda: loaded.add(user_ids, interval=interval)), "added", json=json)


@fleet_app.command("pause")
def pause(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Stop synchronizing accounts until they are resumed."""
    loaded = _load(fleet)
    _print_count(_run("Pausing", lambda: loaded.pause(user_ids)), "paused", json=json)


@fleet_app.command("resume")
def resume(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Resume paused accounts."""
    loaded = _load(fleet)
    _print_count(_run("Resuming", lambda: loaded.resume(user_ids)), "resumed", json=json)


@fleet_app.command("remove")
def remove(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Remove accounts from the fleet. Their data stays (see 'lemcal forget')."""
    loaded = _load(fleet)
    _print_count(_run("Removing", lambda: loaded.remove(user_ids)), "removed", json=json)


@fleet_app.command("wake")
def wake(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Synchronize accounts now."""
    loaded = _load(fleet)
    _print_count(_run("Waking", lambda: loaded.wake(user_ids)), "woken", json=json)


def _print_count(count: int, done: str, *, json: bool) -> None:
    if json:
        print_json({done: count})
    else:
        emit(f"{count} account{'' if count == 1 else 's'} {done}\n")


def _run(text: str, call: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await call()

    with spinner(text):
        return anyio.run(run)


def _load(name: str) -> "Fleet":
    """Import the fleet from a module of the user, given as ``MODULE:NAME`` as for uvicorn."""
    try:
        from lemcal_async.fleet import Fleet  # noqa: PLC0415  # requires an extra
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise ConfigurationError(str(error)) from None

    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ConfigurationError(f"{name!r} does not name a fleet; pass MODULE:NAME, such as app:fleet")
    if os.getcwd() not in sys.path:  # noqa: PTH109  # sys.path contains strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(
            f"there is no module {module_name!r} in the current directory or on Python's path"
        ) from None
    if not hasattr(module, attribute):
        raise ConfigurationError(f"{name!r}: the module {module_name!r} has no attribute {attribute!r}")
    loaded = getattr(module, attribute)
    if not isinstance(loaded, Fleet):
        raise ConfigurationError(f"{name!r} is of type {type(loaded).__name__}, not Fleet")
    return loaded
