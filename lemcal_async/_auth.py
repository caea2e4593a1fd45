"""The user id and API key: the forms people hold them in, the environment, and keeping them out of sight.

The service takes HTTP Basic, ``userId:apiKey`` (documented). Every form becomes one value,
``Credentials``; anything wrong becomes a ``ConfigurationError`` that says what to do. Nothing is sent
from here.

Error trackers render tracebacks with local variables. So a function that may raise holds a key only
inside a ``Secret``, and a function that looks at a plain key returns what is wrong instead of raising.
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
"""An API key in any of its forms, or a function without arguments that returns the current one."""

_PREFIX = "usr_"
_MASK = "***"
_SHORT = 4  # characters; a shorter key is part of too many words, and the masks would spell it out

_VISIBLE_ASCII = r"[!-~]*"
_BASIC = r"(?i)basic\s"
_WITHOUT_USER = r":[!-~]+"  # what lemlist takes: an empty user name with the key as the password

_COMBINED = f"'{_PREFIX}...:key' (or its base64)"
_UNSET = "(not set now, or empty)"
_NOT_LEMLIST = "lemcal wants userId:apiKey, where lemlist took an empty user name with the key as password"

T_co = TypeVar("T_co", covariant=True)


class Secret(Generic[T_co]):
    """A value that must not be shown: masked when printed, never pickled, equal by value.

    Wrap a secret as soon as it comes in, and ``reveal()`` it where it is used. At an entrance, drop the
    plain argument in the same line, because a traceback may show it::

        url, database_url = Secret(database_url), ""
    """

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    def reveal(self) -> T_co:
        """Return the value itself. Do not bind it to a name in a function that may raise."""
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
        raise TypeError("a Secret cannot be pickled: the value would be written out with it")


def digest_of(combined: str) -> str:
    """Return the digest that stands for ``usr_x:secret`` where the secret itself must not be."""
    return hashlib.blake2b(combined.encode(), digest_size=16, person=b"lemcal-async").hexdigest()


@attrs.frozen
class Credentials:
    """The user id and API key of one account, checked and ready to be sent. Cannot be pickled.

    ``authorization`` is the value of the header. ``digest`` tells two credentials apart without
    revealing them: the rate limit is counted by it.
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
        """Return ``text`` with the key, in every form in which it is sent or held, replaced by ``***``.

        If the key is shorter than four characters or contains an asterisk (which the mask could
        complete), a text that contains it is withheld as a whole.
        """
        secret = self.secret.reveal()
        if secret in text and (len(secret) < _SHORT or "*" in secret):
            return _MASK
        standard = self.authorization.reveal().removeprefix("Basic ")
        urlsafe = standard.translate(str.maketrans("+/", "-_"))
        # From the longest to the shortest: a shorter form is part of a longer one.
        for form in (f"Basic {standard}", standard, urlsafe, standard.rstrip("="), urlsafe.rstrip("=")):
            text = text.replace(form, _MASK)
        return text.replace(_combined(self), _MASK).replace(secret, _MASK)


def _combined(credentials: Credentials) -> str:
    return f"{credentials.user_id}:{credentials.secret.reveal()}"


def _basic(credentials: Credentials) -> Secret[str]:
    return Secret("Basic " + base64.b64encode(_combined(credentials).encode()).decode())


class CredentialSource:
    """Where a client's credentials come from: its arguments, the environment, or a function.

    ``given`` is a user id and an API key. With ``environment``, the two variables fill in what is
    missing; they are read now, and not again. Raises ``ConfigurationError`` for credentials that
    cannot be right. A function is called for each ``current()``, and what it raises passes through
    unchanged.
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
        self.account: tuple[str, str] | None = None  # user id and e-mail address, once a call has told them
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
                raise ConfigurationError(_nothing(user_known=known, environment=environment))

    def current(self) -> Credentials:
        """Return the credentials to use now; raise ``ConfigurationError`` if a function gave none."""
        if self._credentials is not None or self._function is None:
            return cast("Credentials", self._credentials)
        value: Secret[Any] = Secret(self._function())
        if inspect.iscoroutine(value.reveal()):
            value.reveal().close()  # nothing will await it, and Python would warn of that
        if not isinstance(value.reveal(), str):
            kind = type(value.reveal()).__name__
            raise ConfigurationError(f"The api_key function must return a string, not {kind}.")
        if self._last is None or self._last[0] != value:
            self._last = (value, self._read(value, "value of the api_key function"))
        return self._last[1]

    def _read(self, key: Secret[str], key_name: str) -> Credentials:
        """Read a key in any of its forms, beside the user id given with it or else in the environment."""
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
            raise ConfigurationError(f"No user id: pass user_id={variable}, or give the key as {_COMBINED}.")
        (name, user), (other_name, other) = users[0], users[-1]
        if user != other:
            raise ConfigurationError(
                f"{name} is {user.reveal()}, but {other_name} belongs to {other.reveal()}: "
                f"make them agree, or leave {name} out."
            )
        return Credentials(user.reveal(), secret)

    def __str__(self) -> str:
        """Return the user id, if it is known."""
        if self._function is no_account:
            return "without an account"
        known = self._last[1] if self._last is not None else self._credentials
        return "an account" if known is None else known.user_id

    def __repr__(self) -> str:
        return f"CredentialSource({self._credentials or 'a function'})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CredentialSource cannot be pickled: the API key would be written out with it")


def no_account() -> str:
    """Stand in for the API key of a client that only makes clients for accounts."""
    raise ConfigurationError(
        "this client has no account of its own: call for_account(user_id, api_key), and use what it returns"
    )


def _text_of(value: object) -> Secret[str] | None:
    """Return a string, without the blanks around it; None for anything else."""
    return Secret(value.strip()) if isinstance(value, str) else None


def _function_of(api_key: ApiKey | None) -> Callable[[], object] | None:
    return api_key if callable(api_key) else None


def _variable(name: str) -> Secret[str] | None:
    """Return a variable of the environment. One that is empty counts as not set."""
    value = Secret(os.environ.get(name, "").strip())
    return value if value.reveal() else None


def _check(name: str, problem: str) -> None:
    if problem:
        raise ConfigurationError(f"{name}: {problem}.")


# From here on, functions look at plain keys and do not raise.


def _split(key: str, *, alone: bool) -> tuple[Secret[str] | None, Secret[str]]:
    """Return the user id that a key carries, None if it carries none, and the secret."""
    if ":" not in key:
        decoded = _decoded(key)
        if not (decoded.startswith(_PREFIX) and ":" in decoded) and not re.fullmatch(_WITHOUT_USER, decoded):
            return None, Secret(key)
        key = decoded
    elif not (key.startswith((_PREFIX, ":")) or alone):
        return None, Secret(key)  # Basic allows a colon in the secret
    user, _, secret = key.partition(":")
    return Secret(user), Secret(secret)


def _decoded(key: str) -> str:
    """Return what ``key`` is the base64 of (either alphabet, padded or not), or the empty string."""
    standard = key.translate(str.maketrans("-_", "+/"))
    try:
        decoded = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except binascii.Error:
        return ""
    return decoded.decode("latin-1").strip()  # `echo usr_...:key | base64` holds a newline


def _problem_of_arguments(user_id: object, api_key: object) -> str:
    if user_id is not None and not isinstance(user_id, str):
        return f"user_id: must be a string, not {type(user_id).__name__}."
    if api_key is None or isinstance(api_key, str):
        return ""
    if not callable(api_key):
        return f"api_key: must be a string or a function that returns one, not {type(api_key).__name__}."
    if inspect.iscoroutinefunction(api_key) or inspect.iscoroutinefunction(type(api_key).__call__):
        return "api_key: must be a plain function; an async one cannot be called here."
    problem = _problem_of_user(user_id.strip(), "") if user_id is not None else ""
    return f"user_id: {problem}." if problem else ""


def _problem_of_raw_key(key: str) -> str:
    if not key:
        return "it is empty; give the API key"
    if re.match(_BASIC, key):
        return "leave out the word 'Basic' and give only what follows it"
    return _problem_of_characters(key)


def _problem_of_secret(secret: str) -> str:
    if not secret:
        return "nothing follows the colon; the API key is missing"
    if secret.startswith(_PREFIX):
        return f"that is a user id; give the API key, or both as {_COMBINED}"
    return _problem_of_characters(secret)


def _problem_of_user(user: str, secret: str) -> str:
    if not user:
        return f"the user id is empty; {_NOT_LEMLIST}"
    if ":" in user:
        return f"a user id holds no colon; give {_COMBINED} as the API key"
    problem = _problem_of_characters(user)
    if problem or (user.startswith(_PREFIX) and user != _PREFIX):
        return problem
    if secret.startswith(_PREFIX):
        return f"user id and API key seem to be swapped; the one that starts with '{_PREFIX}' is the user id"
    if "@" in user:
        return f"that looks like an e-mail address; give the user id, which starts with '{_PREFIX}'"
    return f"a user id starts with '{_PREFIX}'; this one does not"


def _problem_of_characters(value: str) -> str:
    if re.fullmatch(_VISIBLE_ASCII, value):
        return ""
    return "it holds a space, a control or a non-ASCII character; copy it again, as one piece"


def _nothing(*, user_known: bool, environment: bool) -> str:
    if user_known:
        variable = f", or set {API_KEY_VARIABLE} {_UNSET}" if environment else ""
        return f"No API key: pass api_key={variable}."
    variables = f", or set {USER_ID_VARIABLE} and {API_KEY_VARIABLE} {_UNSET}" if environment else ""
    return f"No user id and no API key: pass user_id= and api_key={variables}."
