"""Whose account a delivery is for: by its token, or by its path and then its token.

A token that is unknown and an account that is unknown get the same answer after the same work. Tokens
are kept as digests only.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol, TypeAlias, cast

import attrs

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks._http import Scope, digest_of

Token: TypeAlias = str | Iterable[str]
"""A token, or several that are valid at once, as while one is replaced by another."""


_NEEDED: Final = (
    "token= must be a string, or several, none of them empty; "
    'python -c "import secrets; print(secrets.token_urlsafe(32))" makes a good one'
)


def digests_of(token: Secret[Token | None]) -> frozenset[bytes]:
    """Return the digests of one token or several; ConfigurationError if there is none, or an empty one."""
    digests = _digests_of(token.reveal())
    if not digests:
        raise ConfigurationError(_NEEDED)
    return digests


def _digests_of(token: object) -> frozenset[bytes]:
    """Return the digests, none if there is anything wrong; does not raise, for it looks at plain tokens."""
    tokens: list[object] = [token]
    if isinstance(token, Iterable) and not isinstance(token, str):
        tokens = [*cast("Iterable[object]", token)]
    good = [each for each in tokens if isinstance(each, str) and each]
    return frozenset(map(digest_of, good)) if len(good) == len(tokens) else frozenset()


def _digests_of_argument(token: Token) -> frozenset[bytes]:
    secret, token = Secret[Token | None](token), ""
    return digests_of(secret)


@attrs.frozen
class Tenant:
    """An account of a service with many: its client, and the token or tokens of its deliveries."""

    lemcal: AsyncLemcal
    tokens: frozenset[bytes] = attrs.field(converter=_digests_of_argument, alias="token", repr=False)


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
    source: Secret[tuple[AsyncLemcal | None, Token | None, Accounts | None]],
) -> Directory:
    """Return the directory for one account with its token, or for many; raises ConfigurationError."""
    lemcal = source.reveal()[0]
    if lemcal is not None:
        return ByToken(dict.fromkeys(digests_of(Secret(source.reveal()[1])), lemcal))
    accounts = Secret(source.reveal()[2])
    if isinstance(accounts.reveal(), Mapping):
        clients = _by_digest(cast("Mapping[str, AsyncLemcal]", accounts.reveal()))
        if len(clients) == len(cast("Mapping[str, AsyncLemcal]", accounts.reveal())) > 0:
            return ByToken(clients)
        raise ConfigurationError("accounts= must map tokens, none of them empty, to clients (AsyncLemcal)")
    if callable(accounts.reveal()):  # a mapping can be called too
        return ByPath(cast("FindTenant", accounts.reveal()))
    raise ConfigurationError("accounts= must be a mapping, or an async function that returns a Tenant")


def _by_digest(accounts: Mapping[str, AsyncLemcal]) -> dict[bytes, AsyncLemcal]:
    """Return the clients by the digests of their tokens, without what is neither token nor client."""
    return {
        digest: client
        for token, client in accounts.items()
        for digest in _digests_of(token)
        if _is_client(client)
    }


def _is_client(value: object) -> bool:
    return isinstance(value, AsyncLemcal)
