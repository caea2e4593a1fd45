"""The accounts file: the accounts and where to find their keys.

This module parses the TOML and validates its structure; ``_auth`` parses the keys. It sends no requests and
never writes to the file. Everything read from the file is wrapped in a ``Secret`` at once.
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
_HAS_MODES: Final = os.name == "posix"  # on other systems, mode bits do not show who can read a file
_POSITION = re.compile(r"\(at ([^()]*)\)\Z")


@attrs.frozen
class Account:
    """An account in the file: its label, its user id, and its key in any form that the client accepts."""

    name: str
    user_id: str
    api_key: Secret[str]


_Table: TypeAlias = Secret[dict[str, Any]]


def read_accounts(path: Path) -> list[Account]:
    """Return the accounts of a file, in file order. There is at least one.

    The file contains one table per account. ``user_id`` is optional if the key contains it
    (``usr_x:secret``, or its base64 encoding)::

        [[account]]
        name = "sales"
        user_id = "usr_..."
        api_key_env = "SALES_LEMCAL_KEY"   # or api_key = "...", in a file that only its owner can read

    Raises ConfigurationError, which names the file and the table and says what to do.
    """
    try:
        return _accounts(_read(path))
    except ConfigurationError as error:
        problem = str(error)
    raise ConfigurationError(f"{path}: {problem}")


def find_user_id(path: Path, name: str) -> str:
    """Return the user id of the account with that name, without its key if the file contains the id."""
    try:
        tables = _read(path)
        for table in tables:
            if table.reveal().get("name") == name:
                user_id = table.reveal().get("user_id")
                return user_id if isinstance(user_id, str) else _account(table).user_id
        names = ", ".join(str(table.reveal().get("name")) for table in tables)
        problem = f"no account is named {name!r}; the names are: {names}"
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
        raise ConfigurationError(f"other users can read the API keys in this file; run: chmod 600 {path}")
    return tables


def _parse(content: Secret[bytes]) -> dict[str, Any]:
    try:
        return tomllib.loads(content.reveal().decode("utf-8-sig"))
    except UnicodeDecodeError:
        problem = "the accounts file is not valid UTF-8; save it as UTF-8"
    except tomllib.TOMLDecodeError as error:
        # Only the position: the rest of the message may quote the line.
        found = _POSITION.search(str(error))
        position = found[1] if found else "its quotes and brackets"
        problem = f"the accounts file is not valid TOML; check {position}"
    raise ConfigurationError(problem)


def _tables(data: _Table) -> list[_Table]:
    if unknown := [key for key in data.reveal() if key != "account"]:
        raise ConfigurationError(f"unknown key {unknown[0]!r}; the file may contain only [[account]] tables")
    tables: Secret[object] = Secret(data.reveal().get("account", []))
    if not _is_tables(tables.reveal()):
        raise ConfigurationError("'account' must be written as [[account]] tables, with double brackets")
    if not tables.reveal():
        raise ConfigurationError(
            "the file contains no accounts; add an [[account]] table with name, user_id and api_key_env"
        )
    return [Secret(table) for table in cast("list[dict[str, Any]]", tables.reveal())]


def _is_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)  # pyright: ignore[reportUnknownVariableType]  # this function narrows the type


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
                f"{where} has the same name as {names[account.name]}; give each account a unique name"
            )
        if account.user_id in user_ids:
            raise ConfigurationError(
                f"{where} has the same user id as {user_ids[account.user_id]}; remove one of them"
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
        raise ConfigurationError("name is missing; add it")
    api_key = _api_key(table)
    source = CredentialSource(Secret((table.reveal().get("user_id"), api_key.reveal())))
    return Account(name, source.current().user_id, api_key)


def _api_key(table: _Table) -> Secret[str]:
    if {"api_key", "api_key_env"} <= set(table.reveal()):
        raise ConfigurationError("api_key and api_key_env are both present; remove one of them")
    if "api_key" in table.reveal():
        return Secret(table.reveal()["api_key"].strip())
    if "api_key_env" not in table.reveal():
        raise ConfigurationError(
            "the key is missing; add api_key_env, the name of an environment variable, or api_key"
        )
    # Do not quote the variable's name: it may be the key itself, put there by mistake.
    key = Secret(os.environ.get(table.reveal()["api_key_env"], "").strip())
    if not key.reveal():
        raise ConfigurationError("the environment variable named by api_key_env is unset or empty; set it")
    return key
