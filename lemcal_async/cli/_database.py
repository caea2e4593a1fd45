"""The database that the commands of a synchronization share: which one, and how they use it."""

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import anyio
import typer

from lemcal_async.cli._output import tell, waiting
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore

T = TypeVar("T")

DATABASE_VARIABLE: Final = "LEMCAL_DB"

Database: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        help=f"The database: sqlite:///FILE or postgresql://HOST/NAME; the default is {DATABASE_VARIABLE}, "
        "else sqlite:///lemcal.db (with --sandbox, sqlite:///lemcal-sandbox.db).",
    ),
]
OfSandbox: TypeAlias = Annotated[
    bool, typer.Option("--sandbox", help="Use the database that 'lemcal sync --sandbox' has filled.")
]


def open_store(argument: str | None, *, sandbox: bool = False, create: bool = True) -> "SQLStore":
    """Return the store; ConfigurationError if the URL cannot be used, or the extra ``sql`` is missing."""
    if argument and _has_password(argument):
        tell(
            "warning: other users of this machine can see command-line arguments, and the database URL "
            f"contains a password; put it in {DATABASE_VARIABLE}"
        )
    try:
        from lemcal_async.sync import SQLStore  # noqa: PLC0415  # another extra, and slow to import
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # names the extra
        problem = str(error)
    else:
        default = "sqlite:///lemcal-sandbox.db" if sandbox else "sqlite:///lemcal.db"
        url = os.environ.get(DATABASE_VARIABLE) or default if argument is None else argument
        return SQLStore(url, create=create)
    raise ConfigurationError(problem)


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False


def with_store(store: "SQLStore", text: str, function: Callable[["SQLStore"], Awaitable[T]]) -> T:
    """Run an async function with the store open; ``text`` is shown if it takes long."""

    async def main() -> T:
        async with store:
            return await function(store)

    with waiting(text):
        return anyio.run(main)
