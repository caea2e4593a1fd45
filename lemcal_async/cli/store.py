"""The database that the commands of a synchronisation share: which one, and what is wrong with it."""

import os
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias
from urllib.parse import urlsplit

import typer

from lemcal_async.cli.exits import tell
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore

DATABASE_VARIABLE: Final = "LEMCAL_DB"

Database: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        help=f"The database: sqlite:///FILE or postgresql://HOST/NAME; else that of {DATABASE_VARIABLE}, "
        "else sqlite:///lemcal.db.",
    ),
]


def chosen_store(argument: str | None, *, sandbox: bool = False, create: bool = True) -> "SQLStore":
    """Return the store; ConfigurationError if the URL is none, or the extra ``sql`` is missing."""
    if argument and _has_password(argument):
        tell(
            "warning: other users of this machine can see arguments, and the database URL holds a password; "
            f"put it into {DATABASE_VARIABLE}"
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
