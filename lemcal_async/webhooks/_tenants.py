"""Whose account a delivery is for: by its token, or by its path and then its token.

A token that is unknown and an account that is unknown get the same answer after the same work. Tokens
are kept as digests only.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Protocol, TypeAlias, cast

import attrs

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks._http import Scope, digest_of, logger, needs_quoting

Token: TypeAlias = str | Iterable[str]
"""A token, or several that are valid at once, as while one is replaced by another."""


_NEEDED: Final = (
    "token= must be a string, or several, none of them empty; "
    'python -c "import secrets; print(secrets.token_urlsafe(32))" makes a good one'
)


def digests_of(token: Token) -> frozenset[bytes]:
    """Return the digests of one token or several; ConfigurationError if there is none, or an empty one."""
    secret, token = Secret(token), ""
    tokens = _tokens_of(secret)
    if not tokens.reveal():
        raise ConfigurationError(_NEEDED)
    if any(map(needs_quoting, tokens.reveal())):
        logger.warning(
            "a webhook token has characters that a URL does not carry as they are: register the hook with "
            "hook_url(url, token), of lemcal_async.webhooks, or choose another token"
        )
    return frozenset(map(digest_of, tokens.reveal()))


def _tokens_of(secret: Secret[Any]) -> Secret[list[str]]:
    """Return the tokens, none if there is anything wrong with one of them."""
    given = secret.reveal()
    tokens: list[object] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str):
        tokens = [*cast("Iterable[object]", given)]
    good = [each for each in tokens if isinstance(each, str) and each]
    return Secret(good if len(good) == len(tokens) else [])


@attrs.frozen
class Tenant:
    """An account of a service with many.

    Args:
        lemcal (AsyncLemcal): Its client.
        token (str | Iterable[str]): The token of its deliveries, or several.

    Raises:
        ConfigurationError: If there is no token, or an empty one.
    """

    lemcal: AsyncLemcal
    tokens: frozenset[bytes] = attrs.field(converter=digests_of, alias="token", repr=False)


FindTenant: TypeAlias = Callable[[str], Awaitable[Tenant | None]]
"""From the name in the path of a delivery to the tenant, None for an unknown one."""

Accounts: TypeAlias = Mapping[str, AsyncLemcal] | FindTenant
"""The clients by their tokens, or a function that finds a tenant by its name."""


_NOBODYS: Final = frozenset({secrets.token_bytes(32)})  # the tokens of a tenant that there is not


class Directory(Protocol):
    """Finds the account that a delivery is for."""

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:
        """Return the client of the account, None unless one of the tokens (digests) is its own."""
        ...


class ByToken:
    """The token alone says which account."""

    def __init__(self, clients: Mapping[bytes, AsyncLemcal]) -> None:
        self._clients = dict(clients)

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:  # noqa: ARG002
        """Look the token up."""
        return next((self._clients[token] for token in tokens if token in self._clients), None)


class ByPath:
    """The path says which account, and the token is one of that account's own."""

    def __init__(self, find: FindTenant) -> None:
        self._find = find

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:
        """Find the tenant, and compare."""
        tenant = await self._find(name)
        known = not (_NOBODYS if tenant is None else tenant.tokens).isdisjoint(tokens)
        return tenant.lemcal if known and tenant is not None else None


def name_in(scope: Scope) -> str:
    """Return the only path parameter of a route; else what follows the path of the mount."""
    parameters: Mapping[str, object] = scope.get("path_params") or {}
    if len(parameters) == 1:
        return str(*parameters.values())
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).strip("/")


def directory_of(given: Secret[tuple[Any, Any, Any]]) -> Directory:
    """Return the directory for a client and its token, or for accounts, as the receiver was given them.

    Raises ConfigurationError if there is anything wrong.
    """
    lemcal, token, accounts = (Secret(value) for value in given.reveal())
    no_client = lemcal.reveal() is None
    if no_client != (token.reveal() is None) or no_client == (accounts.reveal() is None):
        raise ConfigurationError("a WebhookReceiver takes either a client and token=, or accounts=")
    if not no_client:
        if not _is_client(lemcal.reveal()):
            kind = type(lemcal.reveal()).__name__
            raise ConfigurationError(f"lemcal must be an AsyncLemcal, not {kind}")
        return ByToken({digest: lemcal.reveal() for digest in digests_of(token.reveal())})
    if isinstance(accounts.reveal(), Mapping):
        return _by_token(accounts)
    if callable(accounts.reveal()):
        return ByPath(accounts.reveal())
    raise ConfigurationError("accounts= must be a mapping, or an async function that returns a Tenant")


def _by_token(accounts: Secret[Mapping[str, AsyncLemcal]]) -> ByToken:
    clients = {
        digest: client
        for token, client in accounts.reveal().items()
        if token and _is_client(client)
        for digest in digests_of(token)
    }
    if len(clients) == len(accounts.reveal()) > 0:
        return ByToken(clients)
    raise ConfigurationError("accounts= must map tokens, none of them empty, to clients (AsyncLemcal)")


def _is_client(value: object) -> bool:
    return isinstance(value, AsyncLemcal)
