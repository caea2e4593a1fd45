"""Reads the user id and API key, in every form that people store them in, and keeps them secret.

The service uses HTTP Basic authentication, ``userId:apiKey`` (documented). Every form is converted to
``Credentials``; invalid credentials raise a ``ConfigurationError`` that says what to do. This module sends
nothing.

Error trackers render tracebacks with local variables. Therefore, a function that may raise holds a key only
inside a ``Secret``, and a function that handles a plain key returns a description of the problem instead of
raising.
"""

import base64
import binascii
import hashlib
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar, cast

import attrs

from lemcal_async.errors import ConfigurationError

USER_ID_VARIABLE = "LEMCAL_USER_ID"
API_KEY_VARIABLE = "LEMCAL_API_KEY"

ApiKey: TypeAlias = str | Callable[[], str]
"""An API key in any supported form, or a function without arguments that returns the current key."""

_PREFIX = "usr_"
_MASK = "***"
_SHORT = 4  # characters; a shorter key occurs in ordinary words, so the position of masks would reveal it

_VISIBLE_ASCII = r"[!-~]*"
_BASIC = r"(?i)basic\s"
_WITHOUT_USER = r":[!-~]+"  # lemlist's form: an empty username, with the key as the password

_COMBINED = f"'{_PREFIX}...:key' (or its base64)"
_UNSET = "(currently unset or empty)"
_NOT_LEMLIST = "lemcal requires userId:apiKey, not lemlist's empty username with the key as password"

T_co = TypeVar("T_co", covariant=True)


class Secret(Generic[T_co]):
    """A value that must not be shown: masked in its repr, not picklable, equal by value.

    Wrap a secret as soon as it arrives, and ``reveal()`` it only where it is used. In a public function,
    overwrite the plain argument on the same line, because a traceback may show it::

        url, database_url = Secret(database_url), ""
    """

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    def reveal(self) -> T_co:
        """Return the plain value. Do not assign it to a variable in a function that may raise."""
        return self._value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return self._value == cast("Secret[object]", other)._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_MASK})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled: the pickle would contain the value")


def digest_of(combined: str) -> str:
    """Return a digest of ``usr_x:secret``, for use where the secret itself must not appear."""
    return hashlib.blake2b(combined.encode(), digest_size=16, person=b"lemcal-async").hexdigest()


@attrs.frozen
class Credentials:
    """The validated user id and API key of one account. Cannot be pickled.

    ``authorization`` is the value of the header. ``digest`` identifies the credentials without revealing
    them; rate limits are kept per digest.
    """

    user_id: str
    secret: Secret[str] = attrs.field(repr=False)
    authorization: Secret[str] = attrs.field(
        init=False,
        eq=False,
        repr=False,
        default=attrs.Factory(lambda self: _basic(self), takes_self=True),  # noqa: PLW0108 - defined below
    )
    digest: str = attrs.field(
        init=False,
        eq=False,
        repr=False,
        default=attrs.Factory(lambda self: digest_of(_combined(self)), takes_self=True),
    )

    def redact(self, text: str) -> str:
        """Return ``text`` with every form of the key, as sent or stored, replaced by ``***``.

        If the key is shorter than four characters or contains an asterisk (which could combine with the
        mask), a text that contains it is replaced entirely.
        """
        secret = self.secret.reveal()
        if secret in text and (len(secret) < _SHORT or "*" in secret):
            return _MASK
        standard = self.authorization.reveal().removeprefix("Basic ")
        urlsafe = standard.translate(str.maketrans("+/", "-_"))
        # Longest form first, because it contains the shorter ones.
        for form in (f"Basic {standard}", standard, urlsafe, standard.rstrip("="), urlsafe.rstrip("=")):
            text = text.replace(form, _MASK)
        return text.replace(_combined(self), _MASK).replace(secret, _MASK)


def _combined(credentials: Credentials) -> str:
    return f"{credentials.user_id}:{credentials.secret.reveal()}"


def _basic(credentials: Credentials) -> Secret[str]:
    return Secret("Basic " + base64.b64encode(_combined(credentials).encode()).decode())


class CredentialSource:
    """The source of a client's credentials: its arguments, the environment, or a function.

    ``given`` is a user id and an API key. If ``environment`` is True, the two environment variables supply
    missing values; they are read only once, here. Raises ``ConfigurationError`` if the credentials are
    invalid. An API key function is called by each ``current()``, and its exceptions propagate unchanged.
    """

    __slots__ = (
        "_credentials",
        "_environment",
        "_function",
        "_last",
        "_user_id",
        "_user_variable",
        "account",
    )

    def __init__(self, given: Secret[tuple[str | None, ApiKey | None]], *, environment: bool = False) -> None:
        self._credentials: Credentials | None = None  # first, for the repr in a traceback
        if problem := _problem_of_arguments(*given.reveal()):
            raise ConfigurationError(problem)
        self._last: tuple[Secret[str], Credentials] | None = None
        self.account: tuple[str, str] | None = None  # user id and e-mail address, once known
        self._environment = environment
        self._user_id = _text_of(given.reveal()[0])
        self._user_variable = _variable(USER_ID_VARIABLE) if environment else None
        self._function = _function_of(given.reveal()[1])
        key = _text_of(given.reveal()[1])
        if self._function is None:
            if key is not None:
                self._credentials = self._read(key, "api_key")
            elif environment and (key := _variable(API_KEY_VARIABLE)):
                self._credentials = self._read(key, API_KEY_VARIABLE)
            else:
                known = bool(self._user_id or self._user_variable)
                raise ConfigurationError(_missing_credentials(user_known=known, environment=environment))

    def current(self) -> Credentials:
        """Return the current credentials.

        Raises ``ConfigurationError`` if the function does not return a valid key. Exceptions of the function
        propagate.
        """
        if self._credentials is not None or self._function is None:
            return cast("Credentials", self._credentials)
        value: Secret[Any] = Secret(self._function())
        if inspect.iscoroutine(value.reveal()):
            value.reveal().close()  # otherwise, Python would warn that it was never awaited
        if not isinstance(value.reveal(), str):
            kind = type(value.reveal()).__name__
            raise ConfigurationError(f"the api_key function must return a string, not {kind}")
        if self._last is None or self._last[0] != value:
            self._last = (value, self._read(value, "value of the api_key function"))
        return self._last[1]

    @property
    def user_id(self) -> str:
        """The user id: the argument, if given, or else that of the current credentials; see ``current``."""
        return self.current().user_id if self._user_id is None else self._user_id.reveal()

    def _read(self, key: Secret[str], key_name: str) -> Credentials:
        """Read a key in any form, together with the user id from the argument or the environment."""
        key = Secret(key.reveal().strip())  # a key read from a file ends in a newline
        _check(key_name, _problem_of_raw_key(key.reveal()))
        alone = self._user_id is None and self._user_variable is None
        carried, secret = _split(key.reveal(), alone=alone)
        users: list[tuple[str, Secret[str]]] = []
        if self._user_id is not None:
            users.append(("user_id", self._user_id))
        elif self._user_variable is not None and (carried is None or key_name == API_KEY_VARIABLE):
            users.append((USER_ID_VARIABLE, self._user_variable))
        if carried is not None:
            users.append((key_name, carried))

        for name, user in users:
            _check(name, _problem_of_user(user.reveal(), secret.reveal()))
        _check(key_name, _problem_of_secret(secret.reveal()))
        if not users:
            variable = f", set {USER_ID_VARIABLE} {_UNSET}" if self._environment else ""
            raise ConfigurationError(f"no user id: pass user_id={variable}, or pass the key as {_COMBINED}")
        (name, user), (other_name, other) = users[0], users[-1]
        if user != other:
            raise ConfigurationError(
                f"{name} is {user.reveal()}, but {other_name} belongs to {other.reveal()}: "
                f"make them match, or omit {name}"
            )
        return Credentials(user.reveal(), secret)

    def __str__(self) -> str:
        """Return the user id, if known."""
        if self._function is no_account:
            return "without an account"
        if self._user_id is not None:
            return self._user_id.reveal()
        credentials = self._last[1] if self._last is not None else self._credentials
        return "an account" if credentials is None else credentials.user_id

    def __repr__(self) -> str:
        return f"CredentialSource({self._credentials or 'a function'})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CredentialSource cannot be pickled: the pickle would contain the API key")


def no_account() -> str:
    """Refuse to return a key: the ``api_key`` of a client that only creates clients for other accounts."""
    raise ConfigurationError(
        "this client has no account: use the client that for_account(user_id, api_key) returns"
    )


def _text_of(value: object) -> Secret[str] | None:
    """Return a string, stripped; None for any other type."""
    return Secret(value.strip()) if isinstance(value, str) else None


def _function_of(api_key: ApiKey | None) -> Callable[[], object] | None:
    return api_key if callable(api_key) else None


def _variable(name: str) -> Secret[str] | None:
    """Return an environment variable. An empty one counts as unset."""
    value = Secret(os.environ.get(name, "").strip())
    return value if value.reveal() else None


def _check(name: str, problem: str) -> None:
    if problem:
        raise ConfigurationError(f"{name}: {problem}")


# The functions below handle plain keys and therefore do not raise.


def _split(key: str, *, alone: bool) -> tuple[Secret[str] | None, Secret[str]]:
    """Return the user id that a key includes, or None, and the secret."""
    if ":" not in key:
        decoded = _decoded(key)
        if not (decoded.startswith(_PREFIX) and ":" in decoded) and not re.fullmatch(_WITHOUT_USER, decoded):
            return None, Secret(key)
        key = decoded
    elif not (key.startswith((_PREFIX, ":")) or alone):
        return None, Secret(key)  # HTTP Basic allows colons in the password
    user, _, secret = key.partition(":")
    return Secret(user), Secret(secret)


def _decoded(key: str) -> str:
    """Decode ``key`` from base64 (either alphabet, padded or not); return "" if it is not base64."""
    standard = key.translate(str.maketrans("-_", "+/"))
    try:
        decoded = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except binascii.Error:
        return ""
    return decoded.decode("latin-1").strip()  # `echo usr_...:key | base64` encodes a newline


def _problem_of_arguments(user_id: object, api_key: object) -> str:
    if user_id is not None and not isinstance(user_id, str):
        return f"user_id: must be a string, not {type(user_id).__name__}"
    if api_key is None or isinstance(api_key, str):
        return ""
    if not callable(api_key):
        return f"api_key: must be a string or a function that returns one, not {type(api_key).__name__}"
    if inspect.iscoroutinefunction(api_key) or inspect.iscoroutinefunction(type(api_key).__call__):
        return "api_key: must be a plain function, not an async one"
    problem = _problem_of_user(user_id.strip(), "") if user_id is not None else ""
    return f"user_id: {problem}" if problem else ""


def _problem_of_raw_key(key: str) -> str:
    if not key:
        return "the value is empty; pass the API key"
    if re.match(_BASIC, key):
        return "remove the word 'Basic' and pass only the rest"
    return _problem_of_characters(key)


def _problem_of_secret(secret: str) -> str:
    if not secret:
        return "nothing follows the colon; the API key is missing"
    if secret.startswith(_PREFIX):
        return f"this is a user id; pass the API key, or both as {_COMBINED}"
    return _problem_of_characters(secret)


def is_user_id(value: object) -> bool:
    """Whether a value has the form of a user id."""
    return isinstance(value, str) and not _problem_of_user(value, "")


def _problem_of_user(user: str, secret: str) -> str:
    if not user:
        return f"the user id is empty; {_NOT_LEMLIST}"
    if ":" in user:
        return f"a user id has no colon; pass {_COMBINED} as the API key"
    problem = _problem_of_characters(user)
    if problem or (user.startswith(_PREFIX) and user != _PREFIX):
        return problem
    if secret.startswith(_PREFIX):
        return f"the user id and the API key seem to be swapped; the user id starts with '{_PREFIX}'"
    if "@" in user:
        return f"this looks like an e-mail address; pass the user id, which starts with '{_PREFIX}'"
    return f"a user id starts with '{_PREFIX}'; this value does not"


def _problem_of_characters(value: str) -> str:
    if re.fullmatch(_VISIBLE_ASCII, value):
        return ""
    return "the value contains a space, a control character or a non-ASCII character; copy it again"


def _missing_credentials(*, user_known: bool, environment: bool) -> str:
    if user_known:
        variable = f", or set {API_KEY_VARIABLE} {_UNSET}" if environment else ""
        return f"no API key: pass api_key={variable}"
    variables = f", or set {USER_ID_VARIABLE} and {API_KEY_VARIABLE} {_UNSET}" if environment else ""
    return f"no user id and no API key: pass user_id= and api_key={variables}"
