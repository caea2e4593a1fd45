"""User id and API key: the forms people hold them in, the environment, and how to keep them quiet.

The service takes HTTP Basic, ``userId:apiKey`` (documented). Here every form of it becomes one value,
``Credentials``, and what is wrong with it a ``ConfigurationError`` that says what to do; nothing is
sent from here. The key is shown nowhere: in no message, repr or pickle, and in no traceback that is
rendered with local variables, for what handles a key does not raise, and what raises holds no key.
"""

import base64
import binascii
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias

from lemcal_async.errors import ConfigurationError

USER_ID_VARIABLE = "LEMCAL_USER_ID"
API_KEY_VARIABLE = "LEMCAL_API_KEY"

ApiKey: TypeAlias = str | Callable[[], str]
"""An API key in any of its forms, or a function without arguments that returns the current one."""

_PREFIX = "usr_"
_MASK = "***"
_SHORT = 4  # a shorter key is part of too many words: masked one by one, the gaps would spell it out

_VISIBLE_ASCII = r"[!-~]*"
_BASIC = r"(?i)basic\s"
_WITHOUT_USER = r":[!-~]+"  # what lemlist takes: an empty user name, the key as password

_COMBINED = f"'{_PREFIX}...:key' (or its base64)"
_UNSET = "(not set now, or empty)"
_NOT_LEMLIST = "lemcal wants userId:apiKey, where lemlist took an empty user name with the key as password"


def digest_of(combined: str) -> str:
    """Return the digest by which ``usr_x:secret`` is known where the secret must not be."""
    return hashlib.blake2b(combined.encode(), digest_size=16, person=b"lemcal-async").hexdigest()


class Credentials:
    """The user id and API key of one account, ready to be sent. Immutable, equal by value, not pickled.

    Made by ``parse`` and ``CredentialSource``, which check what they are given.
    ``authorization`` is the value of the header. ``digest`` tells two credentials apart without
    revealing them: it is the key under which the rate limit is counted.
    """

    __slots__ = ("_secret", "authorization", "digest", "user_id")

    user_id: str
    authorization: str
    digest: str
    _secret: str

    def __init__(self, user_id: str, secret: str) -> None:
        combined = f"{user_id}:{secret}"
        put = object.__setattr__
        put(self, "user_id", user_id)
        put(self, "authorization", "Basic " + base64.b64encode(combined.encode()).decode())
        put(self, "digest", digest_of(combined))
        put(self, "_secret", secret)

    def redact(self, text: str) -> str:
        """Return ``text`` with the key, in every form in which it is sent or held, replaced by ``***``.

        A text that contains a key of less than four characters, or one with an asterisk in it (which
        the mask could complete), is withheld as a whole.
        """
        if self._secret in text and (len(self._secret) < _SHORT or "*" in self._secret):
            return _MASK
        combined = f"{self.user_id}:{self._secret}"
        standard = self.authorization.removeprefix("Basic ")
        urlsafe = standard.translate(str.maketrans("+/", "-_"))
        # From the longest to the shortest: a shorter form is part of a longer one.
        for form in (self.authorization, standard, urlsafe, standard.rstrip("="), urlsafe.rstrip("=")):
            text = text.replace(form, _MASK)
        return text.replace(combined, _MASK).replace(self._secret, _MASK)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("Credentials cannot be changed; make new ones")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("Credentials cannot be changed; make new ones")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Credentials):
            return NotImplemented
        return self.authorization == other.authorization

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Credentials(user_id={self.user_id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Credentials are not pickled: the API key would be written out with them")


class CredentialSource:
    """Where a client's credentials come from: its arguments, the environment, or a function.

    Making one never raises; ``check`` and ``current`` do. That is for the sake of the caller, whose
    arguments hold the key (the user id does, when the two are swapped)::

        source = CredentialSource(user_id, api_key, os.environ)
        del user_id, api_key  # before anything raises: a traceback may show local variables
        source.check()

    ``environ`` is read now and not kept; None means that the environment is not consulted, as for a
    second account. Pass ``os.environ`` in place: a local variable that holds it shows the key as well.
    A function is called for each ``current()``, and what it raises passes through unchanged.
    """

    __slots__ = ("_function", "_last", "_settled", "_user_id", "_user_variable")

    def __init__(
        self, user_id: str | None, api_key: ApiKey | None, environ: Mapping[str, str] | None
    ) -> None:
        # A variable that is empty counts as one that is not set; None: not consulted.
        key_variable = None if environ is None else environ.get(API_KEY_VARIABLE, "").strip()
        self._user_variable = None if environ is None else environ.get(USER_ID_VARIABLE, "").strip()
        self._user_id = user_id
        self._last: tuple[str, Credentials] | None = None
        self._function: Callable[[], object] | None = None
        self._settled: Credentials | str = _problem_of_arguments(user_id, api_key)
        if self._settled:
            return
        if callable(api_key):
            self._function = api_key
        elif api_key is not None:
            self._settled = _read(user_id, self._user_variable, api_key, "api_key")
        elif key_variable:
            self._settled = _read(user_id, self._user_variable, key_variable, API_KEY_VARIABLE)
        else:
            self._settled = _nothing(user_id or self._user_variable, environment=environ is not None)

    def check(self) -> None:
        """Raise ``ConfigurationError`` if the credentials are known to be unusable; call no function."""
        if self._function is None:
            self.current()

    def current(self) -> Credentials:
        """Return the credentials to use now; raise ``ConfigurationError`` if there are none."""
        outcome = self._outcome()
        if isinstance(outcome, str):
            raise ConfigurationError(outcome)
        return outcome

    def _outcome(self) -> Credentials | str:
        if self._function is None:
            return self._settled
        # It may raise: neither it (a partial shows its arguments) nor the last key is a local variable.
        value = self._function()
        if inspect.iscoroutine(value):
            value.close()  # nothing will await it, and Python would warn of that
        if not isinstance(value, str):
            return f"The api_key function must return a string, not {type(value).__name__}."
        last = self._last
        if last is not None and last[0] == value:
            return last[1]
        outcome = _read(self._user_id, self._user_variable, value, "value of the api_key function")
        if isinstance(outcome, Credentials):
            self._last = (value, outcome)
        return outcome

    def __str__(self) -> str:
        """Return the user id, if it is known."""
        known = self._settled if self._function is None else self._last and self._last[1]
        return known.user_id if isinstance(known, Credentials) else "an account"

    def __repr__(self) -> str:
        shown = repr(self._settled) if self._function is None else "function"
        return f"CredentialSource({shown})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CredentialSource is not pickled: the API key would be written out with it")


def parse(user_id: str | None, api_key: str) -> Credentials:
    """Read one account's credentials in any of their forms, without a look at the environment.

    Raises ``ConfigurationError``. What the caller's own variables hold is the caller's to delete.
    """
    source = CredentialSource(user_id, api_key, None)
    del user_id, api_key
    return source.current()


# From here on functions hold keys and raise nothing: a string they return says what is wrong.


def _read(user_id: str | None, user_variable: str | None, key: str, key_name: str) -> Credentials | str:
    """Read a key in any of its forms, beside the user id given with it or else in the environment."""
    key = key.strip()  # a key read from a file ends in a newline
    if problem := _problem_of_raw_key(key):
        return f"{key_name}: {problem}."
    carried, secret = _split(key, alone=user_id is None and not user_variable)
    users: list[tuple[str, str]] = []
    if user_id is not None:
        users.append(("user_id", user_id.strip()))
    elif user_variable and (carried is None or key_name == API_KEY_VARIABLE):
        users.append((USER_ID_VARIABLE, user_variable))
    if carried is not None:
        users.append((key_name, carried))

    for name, user in users:
        if problem := _problem_of_user(user, secret):
            return f"{name}: {problem}."
    if problem := _problem_of_secret(secret):
        return f"{key_name}: {problem}."
    if not users:
        variable = "" if user_variable is None else f", set {USER_ID_VARIABLE} {_UNSET}"
        return f"No user id: pass user_id={variable}, or give the key as {_COMBINED}."
    (name, user), (other_name, other) = users[0], users[-1]
    if user != other:
        return f"{name} is {user}, but {other_name} belongs to {other}: make them agree, or leave {name} out."
    return Credentials(user, secret)


def _split(key: str, *, alone: bool) -> tuple[str | None, str]:
    """Return the user id that a key carries, None if it carries none, and the secret."""
    if ":" not in key:
        decoded = _decoded(key)
        if not (decoded.startswith(_PREFIX) and ":" in decoded) and not re.fullmatch(_WITHOUT_USER, decoded):
            return None, key
        key = decoded
    elif not (key.startswith((_PREFIX, ":")) or alone):
        return None, key  # Basic allows a colon in the secret
    user, _, secret = key.partition(":")
    return user, secret


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


def _nothing(user: str | None, *, environment: bool) -> str:
    if user:
        variable = f", or set {API_KEY_VARIABLE} {_UNSET}" if environment else ""
        return f"No API key: pass api_key={variable}."
    variables = f", or set {USER_ID_VARIABLE} and {API_KEY_VARIABLE} {_UNSET}" if environment else ""
    return f"No user id and no API key: pass user_id= and api_key={variables}."
