"""The options that commands share, and the clients and stores created from them.

Credentials come from the environment or from a file, never from an argument, which other users of the
machine could see in the process list.
"""

import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeAlias, TypeVar
from urllib.parse import urlsplit

import anyio
import attrs
import typer

from lemcal_async._auth import API_KEY_VARIABLE, USER_ID_VARIABLE, Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._urls import BASE_URL_VARIABLE, DEFAULT_BASE_URL, check_base_url, is_loopback
from lemcal_async.cli._accounts import Account, read_accounts
from lemcal_async.cli._output import print_message, spinner
from lemcal_async.errors import BadRow, ConfigurationError, ResponseDecodeError
from lemcal_async.transport import PooledTransport

if TYPE_CHECKING:
    from lemcal_async.sandbox import Sandbox
    from lemcal_async.sync import SQLStore

T = TypeVar("T")

BaseUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        help=f"Base URL of the API. Defaults to {BASE_URL_VARIABLE}, then to the service.",
    ),
]
UseSandbox: TypeAlias = Annotated[
    bool, typer.Option("--sandbox", help="Use demo data; needs no account and no network.")
]
AccountsFile: TypeAlias = Annotated[
    Path | None, typer.Option("--accounts", metavar="FILE", help="Read the credentials from this TOML file.")
]
AccountName: TypeAlias = Annotated[
    str | None,
    typer.Option("--account", metavar="NAME", help="The account to use, if the file has several."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON in the service's format.")]

DATABASE_VARIABLE: Final = "LEMCAL_DB"

Database: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        help=f"The database: sqlite:///FILE or postgresql://HOST/NAME. Defaults to {DATABASE_VARIABLE}, "
        "then to sqlite:///lemcal.db (with --sandbox, sqlite:///lemcal-sandbox.db).",
    ),
]
SandboxDatabase: TypeAlias = Annotated[
    bool, typer.Option("--sandbox", help="Use the database of 'lemcal sync --sandbox'.")
]


@attrs.frozen
class Service:
    """The values of the shared options."""

    base_url: str | None
    sandbox: bool
    accounts: Path | None
    account: str | None

    def __attrs_post_init__(self) -> None:
        options = {"--base-url": self.base_url, "--accounts": self.accounts, "--account": self.account}
        given = [name for name, value in options.items() if value is not None]
        if self.sandbox and given:
            raise ConfigurationError(
                f"--sandbox provides its own service and account; omit {' and '.join(given)}"
            )
        if self.account is not None and self.accounts is None:
            raise ConfigurationError("--account requires a file; add --accounts FILE")


@attrs.frozen
class Target:
    """The service's base URL and the account to use. None means the credentials of the environment."""

    base_url: str
    account: Account | None
    in_process: bool = False


def call(service: Service, text: str, function: Callable[[AsyncLemcal], Awaitable[T]]) -> T:
    """Run an async function with a client for the service; show ``text`` if it takes long."""

    async def main() -> T:
        async with connect(target) as lemcal:
            return await function(lemcal)

    # Reads files and starts the sandbox outside the event loop, which they would block.
    with spinner(text), find_target(service) as target:
        return anyio.run(main)


@contextlib.contextmanager
def find_target(service: Service) -> Generator[Target]:
    """Yield the service and the account of a single-account command; ConfigurationError if there is none."""
    if service.sandbox:
        with load_sandbox()().serve() as sandbox:
            account = Account("sandbox", sandbox.user_id, Secret(sandbox.api_key))
            yield Target(sandbox.base_url, account, in_process=True)
        return
    base_url = resolve_base_url(service)
    if service.accounts is not None:
        accounts = read_accounts(service.accounts)
        yield Target(base_url, choose_account(accounts, service.account, service.accounts))
        return
    _check_environment()
    yield Target(base_url, None)


def _check_environment() -> None:
    if os.environ.get(API_KEY_VARIABLE, "").strip():
        return  # the client validates it
    if os.environ.get(USER_ID_VARIABLE, "").strip():
        raise ConfigurationError(f"{USER_ID_VARIABLE} is set, but {API_KEY_VARIABLE} is missing; set it too")
    raise ConfigurationError(
        f"no credentials: set {USER_ID_VARIABLE} and {API_KEY_VARIABLE}, pass a file with --accounts, "
        "or try --sandbox"
    )


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncGenerator[AsyncLemcal]:
    """Yield a client for the target."""
    account = target.account
    user_id, api_key = (account.user_id, account.api_key.reveal) if account else (None, None)
    # Do not use a proxy for a server in this process.
    wire = PooledTransport(trust_env=not target.in_process)
    async with wire, AsyncLemcal(user_id, api_key, base_url=target.base_url, transport=wire) as lemcal:
        yield lemcal


def load_sandbox() -> "type[Sandbox]":
    """Import and return the class; ConfigurationError if the extra ``sandbox`` is missing."""
    sandbox: type[Sandbox] = _import_from_extra("lemcal_async.sandbox", "Sandbox")
    return sandbox


def _import_from_extra(module: str, name: str) -> Any:
    """Import a name that requires another extra and is slow to import; ConfigurationError names the extra."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        problem = str(error)
    raise ConfigurationError(problem)


def choose_account(accounts: Sequence[Account], name: str | None, path: Path) -> Account:
    """Return the account with that name, or the only account; a ConfigurationError lists the names."""
    chosen = [account for account in accounts if name in (None, account.name)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(account.name for account in accounts)
    if name is None:
        raise ConfigurationError(f"{path} has several accounts; select one with --account: {names}")
    raise ConfigurationError(f"{path} has no account {name!r}; select one with --account: {names}")


def resolve_base_url(service: Service) -> str:
    """Return the base URL, validated as by the client but with messages for command-line users."""
    url, name = service.base_url, "--base-url"
    if url is None:
        url, name = os.environ.get(BASE_URL_VARIABLE, "").strip() or DEFAULT_BASE_URL, BASE_URL_VARIABLE
    base_url = check_base_url(Secret(url), name, allow_insecure_http=True)
    if base_url.startswith("http:") and not is_loopback(urlsplit(base_url).hostname or ""):
        raise ConfigurationError(
            "the base URL is plain http, which would send the API key unencrypted; use https"
        )
    return base_url


@attrs.frozen
class Rows(Generic[T]):
    """A list from the service: the readable rows and the unreadable ones."""

    good: list[T]
    bad: list[BadRow]


async def all_rows(listing: Awaitable[list[T]]) -> Rows[T]:
    """Await a list; if some rows cannot be read, return them beside the readable ones."""
    try:
        return Rows(await listing, [])
    except ResponseDecodeError as error:
        if not error.bad_rows:
            raise
        return Rows(error.rows, error.bad_rows)


def open_store(argument: str | None, *, sandbox: bool = False, create: bool = True) -> "SQLStore":
    """Return the store; ConfigurationError if the URL is invalid or the extra ``sql`` is missing."""
    if argument and _has_password(argument):
        print_message(
            "warning: other users of this machine can see command-line arguments, and the database URL "
            f"contains a password; put it in {DATABASE_VARIABLE}"
        )
    default = "sqlite:///lemcal-sandbox.db" if sandbox else "sqlite:///lemcal.db"
    url = os.environ.get(DATABASE_VARIABLE) or default if argument is None else argument
    store: SQLStore = _import_from_extra("lemcal_async.sync", "SQLStore")(url, create=create)
    return store


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False


def with_store(store: "SQLStore", text: str, function: Callable[["SQLStore"], Awaitable[T]]) -> T:
    """Run an async function with the store open; show ``text`` if it takes long."""

    async def main() -> T:
        async with store:
            return await function(store)

    with spinner(text):
        return anyio.run(main)
