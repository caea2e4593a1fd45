"""Whose account a delivery is for: by its token, or by its path and then its token.

A token that is unknown and an account that is unknown get the same answer after the same work. Tokens
are kept as digests only.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol, TypeAlias

import attrs

from lemcal_async.client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks.asgi import Scope
from lemcal_async.webhooks.decision import digest_of

Token: TypeAlias = str | Iterable[str]
"""A token, or several that are valid at once, as while one is replaced by another."""


def digests_of(token: Token) -> frozenset[bytes]:
    """Return the digests of one token or several; ConfigurationError if there is none, or an empty one."""
    tokens = [token] if isinstance(token, str) else [*token]
    usable = tokens != [] and all(map(_is_token, tokens))
    digests = frozenset(map(digest_of, tokens)) if usable else frozenset[bytes]()
    del token, tokens  # a traceback may show local variables
    if not usable:
        raise ConfigurationError(
            "token= must be a string, or several, none of them empty; "
            'python -c "import secrets; print(secrets.token_urlsafe(32))" makes a good one'
        )
    return digests


def _is_token(value: object) -> bool:
    return isinstance(value, str) and value != ""


@attrs.frozen
class Tenant:
    """An account of a service with many: its client, and the token or tokens of its deliveries."""

    lemcal: AsyncLemcal
    tokens: frozenset[bytes] = attrs.field(converter=digests_of, alias="token", repr=False)


FindTenant: TypeAlias = Callable[[str], Awaitable[Tenant | None]]
"""From the name in the path of a delivery to the tenant, None for an unknown one."""

Accounts: TypeAlias = Mapping[str, AsyncLemcal] | FindTenant
"""The clients by their tokens, or a function that finds a tenant by its name."""


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
        known = token in (frozenset[bytes]() if tenant is None else tenant.tokens)
        return tenant.lemcal if known and tenant is not None else None


def name_in(scope: Scope) -> str:
    """Return the only path parameter of a route; else what follows the path of the mount."""
    parameters = scope.get("path_params") or {}
    if len(parameters) == 1:
        return str(*parameters.values())
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).strip("/")


def directory_of(accounts: Accounts) -> Directory:
    """Return the directory for ``accounts=``; raise ConfigurationError for what is none."""
    if isinstance(accounts, Mapping):
        clients = {digest_of(token): lemcal for token, lemcal in accounts.items() if token}
        whole = len(clients) == len(accounts) > 0
        good = all(isinstance(lemcal, AsyncLemcal) for lemcal in clients.values())  # pyright: ignore[reportUnnecessaryIsInstance]
        del accounts  # its keys are tokens
        if whole and good:
            return ByToken(clients)
        raise ConfigurationError("accounts= must map tokens, none of them empty, to clients (AsyncLemcal)")
    if not callable(accounts):
        raise ConfigurationError("accounts= must be a mapping, or an async function that returns a Tenant")
    return ByPath(accounts)
