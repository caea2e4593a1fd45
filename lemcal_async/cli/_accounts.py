"""The accounts file: which accounts there are, and where the key of each one is.

Knows the TOML and everything that can be wrong with it; the forms of a key are ``_auth``'s business.
Nothing is sent, and the file is only read. What comes out of the file is a ``Secret`` from the start.
"""

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeGuard, cast

import attrs

from lemcal_async._auth import CredentialSource, Secret
from lemcal_async.errors import ConfigurationError

_KEYS: Final = ("name", "user_id", "api_key", "api_key_env")
_HAS_MODES: Final = os.name == "posix"  # elsewhere the mode bits say nothing about who can read
_PLACE = re.compile(r"\(at ([^()]*)\)\Z")


@attrs.frozen
class Account:
    """One account of the file: its label, its user id, and its key in any form that the client takes."""

    name: str
    user_id: str
    api_key: Secret[str]


_Table: TypeAlias = Secret[dict[str, Any]]


def read_accounts(path: Path) -> list[Account]:
    """Return the accounts of a file, in its order; there is at least one.

    The file holds a table per account. ``user_id`` may be left out when the key holds it
    (``usr_x:secret``, or its base64)::

        [[account]]
        name = "sales"
        user_id = "usr_..."
        api_key_env = "SALES_LEMCAL_KEY"   # or api_key = "...", in a file that only its owner can read

    Raises ConfigurationError, with the file, the table and what to do.
    """
    try:
        return _accounts(_read(path))
    except ConfigurationError as error:
        problem = str(error)
    raise ConfigurationError(f"{path}: {problem}")


def find_user_id(path: Path, name: str) -> str:
    """Return the user id of the account with that name; its key is not needed if the file has the id."""
    try:
        tables = _read(path)
        for table in tables:
            if table.reveal().get("name") == name:
                user_id = table.reveal().get("user_id")
                return user_id if isinstance(user_id, str) else _account(table).user_id
        names = ", ".join(str(table.reveal().get("name")) for table in tables)
        problem = f"there is no account {name!r} in it; the names are: {names}"
    except ConfigurationError as error:
        problem = str(error)
    raise ConfigurationError(f"{path}: {problem}")


def _read(path: Path) -> list[_Table]:
    """Return the account tables of the file."""
    try:
        with path.open("rb") as file:
            others_can_read = _HAS_MODES and os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            content = Secret(file.read())
    except OSError as error:
        problem = f"the accounts file cannot be read: {error.strerror}"
        raise ConfigurationError(problem) from None
    tables = _tables(Secret(_parse(content)))
    if others_can_read and any("api_key" in table.reveal() for table in tables):
        raise ConfigurationError(f"others can read this file, and it holds API keys; run: chmod 600 {path}")
    return tables


def _parse(content: Secret[bytes]) -> dict[str, Any]:
    try:
        return tomllib.loads(content.reveal().decode("utf-8-sig"))
    except UnicodeDecodeError:
        problem = "the accounts file is not UTF-8, as TOML must be; save it as that"
    except tomllib.TOMLDecodeError as error:
        # Only the place: the rest of the message may quote the line.
        place = _PLACE.search(str(error))
        problem = f"the accounts file is not TOML; look at {place[1] if place else 'its quotes and brackets'}"
    raise ConfigurationError(problem)


def _tables(data: _Table) -> list[_Table]:
    if unknown := [key for key in data.reveal() if key != "account"]:
        raise ConfigurationError(
            f"unknown key {unknown[0]!r}; the file holds [[account]] tables and nothing else"
        )
    tables: Secret[object] = Secret(data.reveal().get("account", []))
    if not _is_tables(tables.reveal()):
        raise ConfigurationError("'account' must be written as [[account]] tables, with double brackets")
    if not tables.reveal():
        raise ConfigurationError(
            "there is no account in it; add an [[account]] table with name, user_id and api_key_env"
        )
    return [Secret(table) for table in cast("list[dict[str, Any]]", tables.reveal())]


def _is_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)  # pyright: ignore[reportUnknownVariableType]  # its items are what is being found out


def _accounts(tables: list[_Table]) -> list[Account]:
    accounts: list[Account] = []
    names: dict[str, str] = {}
    user_ids: dict[str, str] = {}
    for number, table in enumerate(tables, 1):
        name = table.reveal().get("name")
        where = f"account {number} ({name!r})" if isinstance(name, str) and name else f"account {number}"
        try:
            account = _account(table)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None
        if account.name in names:
            raise ConfigurationError(
                f"{where} has the name of {names[account.name]}; give each a name of its own"
            )
        if account.user_id in user_ids:
            raise ConfigurationError(
                f"{where} has the user id of {user_ids[account.user_id]}; leave one of them out"
            )
        names[account.name] = user_ids[account.user_id] = where
        accounts.append(account)
    return accounts


def _account(table: _Table) -> Account:
    if unknown := [key for key in table.reveal() if key not in _KEYS]:
        raise ConfigurationError(f"unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    for key in table.reveal():
        if not isinstance(table.reveal()[key], str):
            kind = type(table.reveal()[key]).__name__
            raise ConfigurationError(f"{key} must be a string in quotes, not {kind}")
    name: str = table.reveal().get("name", "")
    if not name.strip():
        raise ConfigurationError("it has no name; add name")
    api_key = _api_key(table)
    source = CredentialSource(Secret((table.reveal().get("user_id"), api_key.reveal())))
    return Account(name, source.current().user_id, api_key)


def _api_key(table: _Table) -> Secret[str]:
    if {"api_key", "api_key_env"} <= set(table.reveal()):
        raise ConfigurationError("it has api_key and api_key_env; leave one of them out")
    if "api_key" in table.reveal():
        return Secret(table.reveal()["api_key"].strip())
    if "api_key_env" not in table.reveal():
        raise ConfigurationError(
            "it has no key; add api_key_env, the name of an environment variable, or api_key"
        )
    # The name is not quoted: some will have put the key itself there.
    key = Secret(os.environ.get(table.reveal()["api_key_env"], "").strip())
    if not key.reveal():
        raise ConfigurationError(
            "the environment variable that api_key_env names is not set, or empty; set it"
        )
    return key
