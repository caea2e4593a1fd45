"""Whose account a delivery is for: by its token, or by its path and then its token.

A token that is unknown and an account that is unknown get the same answer after the same work. Tokens
are kept as digests only.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol, TypeAlias, cast

import attrs

from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks._http import Scope, digest_of

Token: TypeAlias = str | Iterable[str]
"""A token, or several that are valid at once, as while one is replaced by another."""


_NEEDED: Final = (
    "token= must be a string, or several, none of them empty; "
    'python -c "import secrets; print(secrets.token_urlsafe(32))" makes a good one'
)


def digests_of(token: Token) -> frozenset[bytes]:
    """Return the digests of one token or several; ConfigurationError if there is none, or an empty one."""
    digests = _digests_of(token)
    del token  # a traceback may show local variables
    if not digests:
        raise ConfigurationError(_NEEDED)
    return digests


def _digests_of(token: object) -> frozenset[bytes]:
    """Return the digests, none if there is anything wrong; holds tokens, and raises nothing."""
    tokens: list[object] = [token]
    if isinstance(token, Iterable) and not isinstance(token, str):
        tokens = [*cast("Iterable[object]", token)]
    good = [each for each in tokens if isinstance(each, str) and each]
    return frozenset(map(digest_of, good)) if len(good) == len(tokens) else frozenset()


@attrs.frozen
class Tenant:
    """An account of a service with many: its client, and the token or tokens of its deliveries."""

    lemcal: AsyncLemcal
    tokens: frozenset[bytes] = attrs.field(converter=digests_of, alias="token", repr=False)


FindTenant: TypeAlias = Callable[[str], Awaitable[Tenant | None]]
"""From the name in the path of a delivery to the tenant, None for an unknown one."""

Accounts: TypeAlias = Mapping[str, AsyncLemcal] | FindTenant
"""The clients by their tokens, or a function that finds a tenant by its name."""


_NOBODYS: Final = frozenset({secrets.token_bytes(32)})  # the tokens of a tenant that there is not


class Directory(Protocol):
    """Finds the account that a delivery is for."""

    async def find(self, scope: Scope, token: bytes) -> AsyncLemcal | None:
        """Return the client of the account, None unless the token (its digest) is one of its own."""
        ...


class ByToken:
    """The token alone says which account."""

    def __init__(self, clients: Mapping[bytes, AsyncLemcal]) -> None:
        self._clients = dict(clients)

    async def find(self, scope: Scope, token: bytes) -> AsyncLemcal | None:  # noqa: ARG002
        """Look the token up."""
        return self._clients.get(token)


class ByPath:
    """The path says which account, and the token is one of that account's own."""

    def __init__(self, find: FindTenant) -> None:
        self._find = find

    async def find(self, scope: Scope, token: bytes) -> AsyncLemcal | None:
        """Find the tenant, and compare."""
        tenant = await self._find(name_in(scope))
        known = token in (_NOBODYS if tenant is None else tenant.tokens)
        return tenant.lemcal if known and tenant is not None else None


def name_in(scope: Scope) -> str:
    """Return the only path parameter of a route; else what follows the path of the mount."""
    parameters: Mapping[str, object] = scope.get("path_params") or {}
    if len(parameters) == 1:
        return str(*parameters.values())
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).strip("/")


def directory_of(
    lemcal: AsyncLemcal | None, token: Token | None, accounts: Accounts | None
) -> Directory | str:
    """Return the directory for one account or many, or what is wrong; holds tokens, and raises nothing."""
    if lemcal is not None:
        digests = _digests_of(token)
        return ByToken(dict.fromkeys(digests, lemcal)) if digests else _NEEDED
    if isinstance(accounts, Mapping):
        return _by_token(accounts)  # pyright: ignore[reportUnknownArgumentType]  # a mapping can be called too
    if callable(accounts):
        return ByPath(accounts)
    return "accounts= must be a mapping, or an async function that returns a Tenant"


def _by_token(accounts: Mapping[str, AsyncLemcal]) -> ByToken | str:
    clients = {
        digest: client
        for token, client in accounts.items()
        for digest in _digests_of(token)
        if _is_client(client)
    }
    if len(clients) == len(accounts) > 0:
        return ByToken(clients)
    return "accounts= must map tokens, none of them empty, to clients (AsyncLemcal)"


def _is_client(value: object) -> bool:
    return isinstance(value, AsyncLemcal)
