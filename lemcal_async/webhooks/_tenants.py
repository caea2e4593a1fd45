"""Finds the account of a delivery, by its token or by its path and token.

An unknown token and an unknown account get the same response after the same work. Tokens are stored only as
digests.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final, Protocol, TypeAlias, cast

import attrs

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks._http import Scope, logger, needs_quoting, token_digest

Token: TypeAlias = str | Iterable[str]
"""A token, or several that are valid at once, for example during a rotation."""


_NEEDED: Final = (
    "token= must be one nonempty string, or several; to generate one, run "
    'python -c "import secrets; print(secrets.token_urlsafe(32))"'
)


def digests_of(token: Token) -> frozenset[bytes]:
    """Return the digests of one or several tokens. Raises ConfigurationError for none or empty ones."""
    secret, token = Secret(token), ""
    tokens = _tokens_of(secret)
    if not tokens.reveal():
        raise ConfigurationError(_NEEDED)
    if any(map(needs_quoting, tokens.reveal())):
        _warn_of_quoting()
    return frozenset(map(token_digest, tokens.reveal()))


@cache  # once per process, because a service may create a Tenant per delivery
def _warn_of_quoting() -> None:
    logger.warning(
        "a webhook token contains characters that must be quoted in a URL, which "
        "lemcal_async.webhooks.hook_url(url, token) does; a token of letters and digits needs no quoting"
    )


def _tokens_of(secret: Secret[Any]) -> Secret[list[str]]:
    """Return the tokens, or an empty list if any of them is invalid."""
    given = secret.reveal()
    tokens: list[object] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str):
        tokens = [*cast("Iterable[object]", given)]
    good = [each for each in tokens if isinstance(each, str) and each]
    return Secret(good if len(good) == len(tokens) else [])


@attrs.frozen
class Tenant:
    """One of a service's many accounts.

    Args:
        lemcal (AsyncLemcal): The account's client.
        token (str | Iterable[str]): The token of the account's deliveries, or several.

    Raises:
        ConfigurationError: If there is no token, or one is empty.
    """

    lemcal: AsyncLemcal
    tokens: frozenset[bytes] = attrs.field(converter=digests_of, alias="token", repr=False)


FindTenant: TypeAlias = Callable[[str], Awaitable[Tenant | None]]
"""An async function from the name in a delivery's path to the tenant, or None if the name is unknown."""

Accounts: TypeAlias = Mapping[str, AsyncLemcal] | FindTenant
"""The clients by token, or an async function that finds a tenant by name."""


_NO_TOKENS: Final = frozenset({secrets.token_bytes(32)})  # matches no token, for unknown tenants


class Directory(Protocol):
    """Finds the account of a delivery."""

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:
        """Return the account's client, or None unless one of the tokens (as digests) belongs to it."""
        ...


class ByToken:
    """Finds the account by token alone."""

    def __init__(self, clients: Mapping[bytes, AsyncLemcal]) -> None:
        self._clients = dict(clients)

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:  # noqa: ARG002
        """Look up the token."""
        return next((self._clients[token] for token in tokens if token in self._clients), None)


class ByPath:
    """Finds the account by path, and checks that the token belongs to it."""

    def __init__(self, find: FindTenant) -> None:
        self._find = find

    async def find(self, name: str, tokens: tuple[bytes, ...]) -> AsyncLemcal | None:
        """Find the tenant and compare the tokens."""
        tenant = await self._find(name)
        known = not (_NO_TOKENS if tenant is None else tenant.tokens).isdisjoint(tokens)
        return tenant.lemcal if known and tenant is not None else None


def name_in(scope: Scope) -> str:
    """Return the route's only path parameter, or else the path below the mount."""
    parameters: Mapping[str, object] = scope.get("path_params") or {}
    if len(parameters) == 1:
        return str(*parameters.values())
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).strip("/")


def directory_of(given: Secret[tuple[Any, Any, Any]]) -> Directory:
    """Return the directory for the receiver's arguments: a client and its token, or accounts.

    Raises ConfigurationError if the arguments are invalid.
    """
    lemcal, token, accounts = (Secret(value) for value in given.reveal())
    no_client = lemcal.reveal() is None
    if no_client != (token.reveal() is None) or no_client == (accounts.reveal() is None):
        raise ConfigurationError("WebhookReceiver takes either a client and token=, or accounts=")
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
    raise ConfigurationError("accounts= must map nonempty tokens to clients (AsyncLemcal)")


def _is_client(value: object) -> bool:
    return isinstance(value, AsyncLemcal)
