"""``lemcal worker`` and ``lemcal fleet``: a fleet that a module of the user's makes, and its figures."""

import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import anyio
import attrs
import typer

from lemcal_async.cli._output import emit, print_facts, print_json, waiting
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.fleet import Fleet

fleet_app = typer.Typer(help="Manage a fleet: see what is due, and add, pause or remove accounts.")

FleetName: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODULE:NAME", help="Where the Fleet is, as in app:fleet.")
]
UserIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="USER_ID...", help="The accounts.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def worker(
    fleet: FleetName,
    *,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, help="How many accounts at once.")
    ] = 16,
    backend: Annotated[
        Literal["asyncio", "trio"], typer.Option("--backend", help="Which event loop to run on.")
    ] = "asyncio",
) -> None:
    """Run a worker of a fleet until SIGTERM or Ctrl-C. It finishes the turns under way first.

    What happens is logged to standard error.
    """
    made = _load(fleet)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("streaq").setLevel(logging.WARNING)
    logging.getLogger("coredis").setLevel(logging.WARNING)

    async def work() -> None:
        logging.getLogger("lemcal_async.fleet").info("working, %d accounts at once", concurrency)
        await made.run(concurrency)

    anyio.run(work, backend=backend)


@fleet_app.command("status")
def status(fleet: FleetName, *, json: AsJson = False) -> None:
    """Show what is due, and how late it is."""
    known = attrs.asdict(_run("Looking at the fleet", _load(fleet).status))
    if json:
        print_json(known)
        return
    facts = [(title, known[name], unit) for name, title, unit in _FACTS]
    print_facts([(title, _shown(value, unit)) for title, value, unit in facts])


_FACTS: Final = (
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


def _shown(value: Any, unit: str) -> str:
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
        typer.Option("--interval", metavar="SECONDS", min=1, help="How often; default: the fleet's own."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Add accounts, or change how often they are synchronized."""
    made = _load(fleet)
    _print(_run("Adding", lambda: made.add(user_ids, interval=interval)), "added", json=json)


@fleet_app.command("pause")
def pause(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Stop synchronizing accounts until they are resumed."""
    made = _load(fleet)
    _print(_run("Pausing", lambda: made.pause(user_ids)), "paused", json=json)


@fleet_app.command("resume")
def resume(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Resume paused accounts."""
    made = _load(fleet)
    _print(_run("Resuming", lambda: made.resume(user_ids)), "resumed", json=json)


@fleet_app.command("remove")
def remove(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Take accounts out of the fleet; their data stays (see 'lemcal forget')."""
    made = _load(fleet)
    _print(_run("Removing", lambda: made.remove(user_ids)), "removed", json=json)


@fleet_app.command("wake")
def wake(fleet: FleetName, user_ids: UserIds, *, json: AsJson = False) -> None:
    """Synchronize accounts now."""
    made = _load(fleet)
    _print(_run("Waking", lambda: made.wake(user_ids)), "woken", json=json)


def _print(count: int, done: str, *, json: bool) -> None:
    if json:
        print_json({done: count})
    else:
        emit(f"{count} account{'' if count == 1 else 's'} {done}\n")


def _run(text: str, call: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await call()

    with waiting(text):
        return anyio.run(run)


def _load(name: str) -> "Fleet":
    """Return the fleet that a module of the user's makes, as uvicorn finds its apps."""
    try:
        from lemcal_async.fleet import Fleet  # noqa: PLC0415  # it needs an extra
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise ConfigurationError(str(error)) from None

    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ConfigurationError(f"{name!r}: say which fleet, as MODULE:NAME, such as app:fleet")
    if os.getcwd() not in sys.path:  # noqa: PTH109  # as text, for sys.path
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"there is no module {module_name!r} here or on Python's path") from None
    if not hasattr(module, attribute):
        raise ConfigurationError(f"{name!r}: there is no {attribute!r} in the module {module_name!r}")
    made = getattr(module, attribute)
    if not isinstance(made, Fleet):
        raise ConfigurationError(f"{name!r} is not a Fleet, but {type(made).__name__}")
    return made
