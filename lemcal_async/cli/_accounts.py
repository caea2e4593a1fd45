"""The accounts file: which accounts there are, and where the key of each one is.

Knows the TOML and everything that can be wrong with it; the forms of a key are ``credentials.py``'s
business. Nothing is sent, and the file is only read. A key shows in no message, repr or pickle, and in no
traceback that is rendered with local variables: what handles keys does not raise.
"""

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

import attrs

from lemcal_async._auth import Credentials, CredentialSource
from lemcal_async.errors import ConfigurationError

_KEYS: Final = ("name", "user_id", "api_key", "api_key_env")
_HAS_MODES: Final = os.name == "posix"  # elsewhere the mode bits say nothing about who can read
_PLACE = re.compile(r"\(at ([^()]*)\)\Z")


@attrs.frozen
class Account:
    """One account of the file: its label, its user id, and its key in any form that the client takes."""

    name: str
    user_id: str
    api_key: str = attrs.field(repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Account is not pickled: the API key would be written out with it")


def read_accounts(path: Path, environ: Mapping[str, str]) -> list[Account]:
    """Return the accounts of a file, in its order; there is at least one.

    The file holds a table per account. ``user_id`` may be left out when the key holds it
    (``usr_x:secret``, or its base64)::

        [[account]]
        name = "sales"
        user_id = "usr_..."
        api_key_env = "SALES_LEMCAL_KEY"   # or api_key = "...", in a file that only its owner can read

    ``environ`` is where the variables that ``api_key_env`` names are looked up; pass ``os.environ`` in
    place, as a local variable that holds it shows the keys. Raises ConfigurationError, with the file, the
    table and what to do.
    """
    outcome = _read(path, environ)
    del environ  # a traceback may show local variables
    if isinstance(outcome, str):
        raise ConfigurationError(f"{path}: {outcome}")
    return outcome


# From here on functions hold keys and raise nothing: a string they return says what is wrong.


def _read(path: Path, environ: Mapping[str, str]) -> list[Account] | str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read().decode("utf-8-sig")
        data = tomllib.loads(text)
    except OSError as error:
        return f"the accounts file cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        return "the accounts file is not UTF-8, as TOML must be; save it as that"
    except tomllib.TOMLDecodeError as error:
        # Only the place: the rest of the message may quote the line.
        place = _PLACE.search(str(error))
        return f"the accounts file is not TOML; look at {place[1] if place else 'its quotes and brackets'}"
    tables = _tables(data)
    if isinstance(tables, str):
        return tables
    if _HAS_MODES and mode & (stat.S_IRWXG | stat.S_IRWXO) and any("api_key" in table for table in tables):
        return f"others can read this file, and it holds API keys; run: chmod 600 {path}"
    return _accounts(tables, environ)


def _tables(data: dict[str, Any]) -> list[dict[str, Any]] | str:
    """Return the account tables."""
    if unknown := [key for key in data if key != "account"]:
        return f"unknown key {unknown[0]!r}; the file holds [[account]] tables and nothing else"
    tables = data.get("account", [])
    if not _is_tables(tables):
        return "'account' must be written as [[account]] tables, with double brackets"
    if not tables:
        return "there is no account in it; add an [[account]] table with name, user_id and api_key_env"
    return tables


def _is_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)  # pyright: ignore[reportUnknownVariableType]  # its items are what is being found out


def _accounts(tables: list[dict[str, Any]], environ: Mapping[str, str]) -> list[Account] | str:
    accounts: list[Account] = []
    names: dict[str, str] = {}
    user_ids: dict[str, str] = {}
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        where = f"account {number} ({name!r})" if isinstance(name, str) and name else f"account {number}"
        account = _account(table, environ)
        if isinstance(account, str):
            return f"{where}: {account}"
        if account.name in names:
            return f"{where} has the name of {names[account.name]}; give each a name of its own"
        if account.user_id in user_ids:
            return f"{where} has the user id of {user_ids[account.user_id]}; leave one of them out"
        names[account.name] = user_ids[account.user_id] = where
        accounts.append(account)
    return accounts


def _account(table: dict[str, Any], environ: Mapping[str, str]) -> Account | str:
    if unknown := [key for key in table if key not in _KEYS]:
        return f"unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}"
    for key, value in table.items():
        if not isinstance(value, str):
            return f"{key} must be a string in quotes, not {type(value).__name__}"
    name: str = table.get("name", "")
    if not name.strip():
        return "it has no name; add name"
    api_key = _api_key(table, environ)
    if isinstance(api_key, _Problem):
        return api_key.text
    credentials = _credentials(table.get("user_id"), api_key)
    return credentials if isinstance(credentials, str) else Account(name, credentials.user_id, api_key)


@attrs.frozen
class _Problem:
    text: str


def _api_key(table: dict[str, str], environ: Mapping[str, str]) -> str | _Problem:
    if "api_key" in table and "api_key_env" in table:
        return _Problem("it has api_key and api_key_env; leave one of them out")
    if "api_key" in table:
        return table["api_key"].strip()
    if "api_key_env" not in table:
        return _Problem("it has no key; add api_key_env, the name of an environment variable, or api_key")
    # The name is not quoted: some will have put the key itself there.
    key = environ.get(table["api_key_env"], "").strip()
    return key or _Problem("the environment variable that api_key_env names is not set, or empty; set it")


def _credentials(user_id: str | None, api_key: str) -> Credentials | str:
    try:
        return CredentialSource(user_id, api_key, None).current()
    except ConfigurationError as error:
        return str(error)
