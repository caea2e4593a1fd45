"""Accepted forms of user id and API key, messages for invalid ones, and that no output shows the key."""

import base64
import contextlib
import functools
import inspect
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st

from lemcal_async import _auth
from lemcal_async._auth import ApiKey, Credentials, CredentialSource, Secret
from lemcal_async.errors import ConfigurationError

USER = "usr_BuDuyx4chjoNfcmzM"
OTHER_USER = "usr_aaaaaaaaaaaaaaaaa"
SECRET = "3f8Kq-hush>>hush??-Zr"
OTHER_SECRET = "another-hush-71c0"
COMBINED = f"{USER}:{SECRET}"
STANDARD = base64.b64encode(COMBINED.encode()).decode()
URLSAFE = base64.urlsafe_b64encode(COMBINED.encode()).decode()
EXPECTED = Credentials(USER, Secret(SECRET))

PACKAGE = str(Path(_auth.__file__).parent)

user_ids = st.text("abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTWXYZ23456789", min_size=1, max_size=20).map(
    "usr_".__add__
)
visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
secrets = st.text(visible, min_size=1, max_size=60)
spaces = st.text(" \t\r\n", max_size=3)


def source_of(
    user_id: Any = None, api_key: ApiKey | None = None, environ: dict[str, str] | None = None
) -> CredentialSource:
    """Create a client's CredentialSource; with ``environ=None``, it ignores the environment."""
    given, user_id, api_key, variables, environ = (
        Secret((user_id, api_key)),
        None,
        None,
        Secret(environ),
        None,
    )
    with mock.patch.dict(os.environ, variables.reveal() or {}, clear=True):
        return CredentialSource(given, environment=variables.reveal() is not None)


def read(user_id: str | None, api_key: ApiKey | None) -> Credentials:
    """Return the credentials for a user id and an API key."""
    return source_of(user_id, api_key).current()


def problem_with(user_id: Any = None, api_key: Any = None, environ: dict[str, str] | None = None) -> str:
    """Return the message of the ConfigurationError that these arguments cause."""
    with pytest.raises(ConfigurationError) as caught:
        source_of(user_id, api_key, environ)
    return str(caught.value)


def combined_forms(user: str, secret: str) -> list[str]:
    """Return the five forms that combine user id and key in one string."""
    combined = f"{user}:{secret}"
    standard = base64.b64encode(combined.encode()).decode()
    urlsafe = base64.urlsafe_b64encode(combined.encode()).decode()
    return [combined, standard, standard.rstrip("="), urlsafe, urlsafe.rstrip("=")]


def variables(user_id: str | None = None, api_key: str | None = None) -> dict[str, str]:
    """Return an environment with the given variables and an unrelated one."""
    given_ = {"LEMCAL_USER_ID": user_id, "LEMCAL_API_KEY": api_key, "HOME": "/nowhere"}
    return {name: value for name, value in given_.items() if value is not None}


# ------------------------------------------------------------------------------------ forms


def test_header_is_basic_of_user_id_and_key() -> None:
    """The header is HTTP Basic with the user id as name and the key as password."""
    assert f"Basic {STANDARD}" == read(USER, SECRET).authorization.reveal()


def test_sample_differs_between_alphabets() -> None:
    """The sample's base64 is padded and differs between the two alphabets, as the tests require."""
    assert (True, True) == (STANDARD.endswith("="), STANDARD != URLSAFE)


@pytest.mark.parametrize("user_id", [None, USER, f" {USER}\n"])
@pytest.mark.parametrize("around", ["{}", "{}\n", " \t{}\r\n"])
@pytest.mark.parametrize(
    "key",
    [*combined_forms(USER, SECRET), base64.b64encode(f"{COMBINED}\n".encode()).decode()],
)
def test_forms_of_the_combined_key(user_id: str | None, around: str, key: str) -> None:
    """`usr_x:secret` and its base64 in any form are read, with or without a separate user id."""
    assert EXPECTED == read(user_id, around.format(key))


def test_separate_user_id_and_key() -> None:
    """The key can be passed separately; a trailing newline is ignored."""
    assert EXPECTED == read(USER, f"{SECRET}\n")


def test_colon_in_the_secret() -> None:
    """Basic allows colons in the password, so a combined key is split only at its first colon."""
    assert [Credentials(USER, Secret("a:b:c"))] * 2 == [read(USER, "a:b:c"), read(None, f"{USER}:a:b:c")]


@settings(deadline=None)
@given(
    user=user_ids,
    secret=secrets.filter(lambda secret: not secret.startswith("usr_")),
    before=spaces,
    separate=st.booleans(),
)
def test_all_forms_are_equivalent(*, user: str, secret: str, before: str, separate: bool) -> None:
    """All forms of the same pair give equal credentials, with or without a separate user id."""
    user_id = user if separate else None
    assert [Credentials(user, Secret(secret))] * 5 == [
        read(user_id, f"{before}{form}\n") for form in combined_forms(user, secret)
    ]


# ------------------------------------------------------------------------------ environment


@pytest.mark.parametrize(
    ("user_id", "api_key", "environ"),
    [
        (None, None, variables(USER, SECRET)),
        (None, None, variables(None, COMBINED)),
        (None, None, variables("", STANDARD)),
        (None, None, variables(f"{USER}\n", f"{URLSAFE}\n")),
        (USER, None, variables(OTHER_USER, SECRET)),
        (USER, None, variables(OTHER_USER, COMBINED)),
        (None, SECRET, variables(USER, OTHER_SECRET)),
        (None, COMBINED, variables(OTHER_USER, OTHER_SECRET)),
        (None, COMBINED, variables("nonsense", None)),
        (USER, SECRET, variables(OTHER_USER, f"{OTHER_USER}:{OTHER_SECRET}")),
    ],
)
def test_arguments_take_precedence_over_the_environment(
    user_id: str | None, api_key: Any, environ: dict[str, str] | None
) -> None:
    """Missing arguments come from the environment; a combined key argument includes its own user id."""
    assert EXPECTED == source_of(user_id, api_key, environ).current()


def test_environment_is_read_once() -> None:
    """Later changes of the environment have no effect."""
    environ = variables(USER, SECRET)
    source = source_of(None, None, environ)
    environ.clear()
    assert EXPECTED == source.current()


@pytest.mark.parametrize(
    ("user_id", "api_key", "environ", "message"),
    [
        (USER, None, variables(None, f"{OTHER_USER}:{SECRET}"), f"user_id is {USER}, but LEMCAL_API_KEY"),
        (None, None, variables(OTHER_USER, COMBINED), f"LEMCAL_USER_ID is {OTHER_USER}, but LEMCAL_API_KEY"),
        (OTHER_USER, STANDARD, None, f"user_id is {OTHER_USER}, but api_key belongs to {USER}"),
    ],
)
def test_conflicting_user_ids(
    user_id: str | None, api_key: Any, environ: dict[str, str] | None, message: str
) -> None:
    """Two different user ids are an error that names both."""
    assert message in problem_with(user_id, api_key, environ)


EMPTY = "(currently unset or empty)"


@pytest.mark.parametrize("environ", [{}, variables("", " ")])
@pytest.mark.parametrize(
    ("user_id", "api_key", "message"),
    [
        (None, None, f"pass user_id= and api_key=, or set LEMCAL_USER_ID and LEMCAL_API_KEY {EMPTY}"),
        (USER, None, f"no API key: pass api_key=, or set LEMCAL_API_KEY {EMPTY}"),
        (
            None,
            SECRET,
            f"no user id: pass user_id=, set LEMCAL_USER_ID {EMPTY}, or pass the key as 'usr_...:key'",
        ),
    ],
)
def test_missing_credentials(
    environ: dict[str, str] | None, user_id: str | None, api_key: Any, message: str
) -> None:
    """The error names the missing argument and variable; an empty variable counts as unset."""
    assert message in problem_with(user_id, api_key, environ)


def test_missing_key_with_a_user_id_from_the_environment() -> None:
    """The user id is not reported as missing."""
    assert problem_with(None, None, variables(USER)).startswith("no API key: ")


@pytest.mark.parametrize(
    ("user_id", "api_key", "message"),
    [
        (None, None, "no user id and no API key: pass user_id= and api_key="),
        (USER, None, "no API key: pass api_key="),
        (None, SECRET, "no user id: pass user_id=, or pass the key as 'usr_...:key' (or its base64)"),
    ],
)
def test_missing_credentials_without_an_environment(user_id: str | None, api_key: Any, message: str) -> None:
    """A second account does not use the first one's variables, and its error does not mention them."""
    assert message == problem_with(user_id, api_key, None)


# --------------------------------------------------------------------------------- mistakes

LEMLIST = "lemcal requires userId:apiKey, not lemlist's empty username"
CHARACTERS = "the value contains a space, a control character or a non-ASCII character"

MISTAKES = {
    "user id empty, lemlist style": ("", SECRET, f"user_id: the user id is empty; {LEMLIST}"),
    "user id of spaces": (" \n", SECRET, f"user_id: the user id is empty; {LEMLIST}"),
    "empty user name": (None, f":{SECRET}", f"api_key: the user id is empty; {LEMLIST}"),
    "empty user name, with a user id": (USER, f":{SECRET}", f"api_key: the user id is empty; {LEMLIST}"),
    "empty user name, base64": (
        None,
        base64.b64encode(f":{SECRET}".encode()).decode(),
        f"api_key: the user id is empty; {LEMLIST}",
    ),
    "key empty": (USER, "", "api_key: the value is empty"),
    "key of spaces": (USER, " \n", "api_key: the value is empty"),
    "nothing after the colon": (None, f"{USER}:", "api_key: nothing follows the colon"),
    "nothing after the colon, base64": (
        None,
        base64.b64encode(f"{USER}:".encode()).decode(),
        "api_key: nothing follows the colon",
    ),
    "header value": (None, f"Basic {STANDARD}", "api_key: remove the word 'Basic'"),
    "header value, lower case": (USER, f"basic\t{STANDARD}", "api_key: remove the word 'Basic'"),
    "space in the key": (USER, f"{SECRET} {SECRET}", f"api_key: {CHARACTERS}"),
    "newline in the key": (None, f"{USER}:\n{SECRET}", f"api_key: {CHARACTERS}"),
    "control character in the key": (USER, f"{SECRET}\x00", f"api_key: {CHARACTERS}"),
    "non-ASCII key": (USER, f"{SECRET}é", f"api_key: {CHARACTERS}"),
    "byte order mark": (None, f"\ufeff{COMBINED}", f"api_key: {CHARACTERS}"),
    "non-ASCII key in base64": (
        None,
        base64.b64encode(f"{COMBINED}é".encode()).decode(),
        f"api_key: {CHARACTERS}",
    ),
    "space in the user id": ("usr_Bu Duyx", SECRET, f"user_id: {CHARACTERS}"),
    "non-ASCII user id": ("usr_Bü", SECRET, f"user_id: {CHARACTERS}"),
    "combined form as user id": (COMBINED, SECRET, "user_id: a user id has no colon; pass 'usr_...:key'"),
    "swapped": (SECRET, USER, "user_id: the user id and the API key seem to be swapped"),
    "swapped in one": (None, f"{SECRET}:{USER}", "api_key: the user id and the API key seem to be swapped"),
    "e-mail": ("lea@example.com", SECRET, "user_id: this looks like an e-mail address"),
    "e-mail in one": (None, f"lea@example.com:{SECRET}", "api_key: this looks like an e-mail address"),
    "another prefix": ("tea_aaaaaaaaaaaaaaaaa", SECRET, "user_id: a user id starts with 'usr_'"),
    "prefix alone": ("usr_", SECRET, "user_id: a user id starts with 'usr_'"),
    "user id in place of the key": (None, USER, "api_key: this is a user id; pass the API key"),
    "user id twice": (USER, USER, "api_key: this is a user id; pass the API key"),
    "user id of an int": (17, SECRET, "user_id: must be a string, not int"),
    "key of bytes": (USER, SECRET.encode(), "api_key: must be a string or a function that returns one"),
}


@pytest.mark.parametrize(("user_id", "api_key", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_arguments(user_id: str | None, api_key: Any, message: str) -> None:
    """Each mistake has its own message, which names the argument and says what to do."""
    assert problem_with(user_id, api_key).startswith(message)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (variables(SECRET, USER), "LEMCAL_USER_ID: the user id and the API key seem to be swapped"),
        (variables("lea@example.com", SECRET), "LEMCAL_USER_ID: this looks like an e-mail address"),
        (variables(None, f":{SECRET}"), f"LEMCAL_API_KEY: the user id is empty; {LEMLIST}"),
        (variables(USER, "a b"), f"LEMCAL_API_KEY: {CHARACTERS}"),
    ],
)
def test_mistakes_in_the_environment(environ: dict[str, str] | None, message: str) -> None:
    """A mistake in a variable is reported under the variable's name."""
    assert problem_with(environ=environ).startswith(message)


# -------------------------------------------------------------------------------- functions


def test_function_is_called_each_time_and_parsed_when_it_changes() -> None:
    """A new key is used from the next call on; an unchanged key returns the same object."""
    keys = iter([COMBINED, COMBINED, f"{USER}:{OTHER_SECRET}", STANDARD])
    source = source_of(None, lambda: next(keys), None)
    first, second, third, fourth = (source.current() for _ in range(4))
    assert (EXPECTED, Credentials(USER, Secret(OTHER_SECRET)), EXPECTED) == (first, third, fourth)
    assert first is second


def test_function_is_not_called_by_the_constructor() -> None:
    """The key store need not be available when the client is created."""
    source_of(USER, lambda: pytest.fail("called"), None)


@pytest.mark.parametrize(
    ("user_id", "key", "environ"),
    [(USER, SECRET, None), (None, SECRET, variables(USER)), (None, COMBINED, variables(OTHER_USER))],
)
def test_function_with_a_user_id(user_id: str | None, key: Any, environ: dict[str, str] | None) -> None:
    """A key from a function is completed with a user id, like a key argument."""
    assert EXPECTED == source_of(user_id, lambda: key, environ).current()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the api_key function must return a string, not NoneType"),
        (SECRET.encode(), "the api_key function must return a string, not bytes"),
        ("", "value of the api_key function: the value is empty"),
        (f"{OTHER_USER}:{SECRET}", f"user_id is {USER}, but value of the api_key function belongs to"),
    ],
)
def test_function_that_returns_an_invalid_key(value: Any, message: str) -> None:
    """An invalid value raises an error when it is used."""
    source = source_of(USER, lambda: value)
    with pytest.raises(ConfigurationError) as caught:
        source.current()
    assert str(caught.value).startswith(message)


def test_recovery_from_an_invalid_key() -> None:
    """After an invalid value, the next valid one is used."""
    keys = iter([SECRET, "", SECRET])
    source = source_of(USER, lambda: next(keys), None)
    first = source.current()
    with pytest.raises(ConfigurationError):
        source.current()
    assert first is source.current()


def test_exception_of_the_function_propagates() -> None:
    """The function's exception is raised unchanged, without a cause or context."""
    error = LookupError("vault sealed")

    def api_key() -> str:
        raise error

    with pytest.raises(LookupError) as caught:
        source_of(USER, api_key, None).current()
    assert (error, None, None) == (caught.value, caught.value.__cause__, caught.value.__context__)


async def coroutine_function() -> str:
    """Fetch a key asynchronously."""
    return SECRET


class AsyncCallable:
    """An object with an async ``__call__``."""

    async def __call__(self) -> str:
        """Return the key."""
        return SECRET


@pytest.mark.parametrize(
    "api_key", [coroutine_function, functools.partial(coroutine_function), AsyncCallable()]
)
def test_async_function_is_refused_by_the_constructor(api_key: Any) -> None:
    """An async function cannot be awaited where the key is needed."""
    assert "api_key: must be a plain function, not an async one" == problem_with(USER, api_key)


def test_coroutine_from_a_plain_function_is_closed() -> None:
    """The coroutine is refused, and Python does not warn that it was never awaited."""
    coroutine: Any = coroutine_function()
    with pytest.raises(ConfigurationError, match="must return a string, not coroutine"):
        source_of(USER, lambda: coroutine, None).current()
    assert inspect.CORO_CLOSED == inspect.getcoroutinestate(coroutine)


def test_user_id_with_a_function_is_checked_by_the_constructor() -> None:
    """An invalid user id is reported without calling the function."""
    assert problem_with("lea@example.com", lambda: SECRET).startswith("user_id: this looks like an e-mail")


# -------------------------------------------------------------------------------- the value


def test_equality_is_by_value() -> None:
    """Equal pairs of user id and key give equal credentials."""
    same = [read(USER, SECRET), read(None, STANDARD)]
    assert {EXPECTED} == {*same}
    assert [True, False, False, False] == [
        same[0] == same[1],
        Credentials(USER, Secret(OTHER_SECRET)) == EXPECTED,
        Credentials(OTHER_USER, Secret(SECRET)) == EXPECTED,
        EXPECTED == read(USER, OTHER_SECRET),
    ]


def test_digest_is_fixed() -> None:
    """The digest is the same in every process, because processes share Redis keys that contain it."""
    assert "a3d6aab077947cc08f4bd00fd6e13352" == Credentials("usr_x", Secret("secret")).digest


@settings(deadline=None)
@given(st.lists(st.tuples(user_ids, secrets), min_size=2, max_size=5, unique=True))
def test_digests_differ(pairs: list[tuple[str, str]]) -> None:
    """Different credentials have different digests."""
    assert len(pairs) == len({Credentials(pair[0], Secret(pair[1])).digest for pair in pairs})


@pytest.mark.parametrize("name", ["user_id", "authorization", "digest", "secret", "other"])
def test_immutable(name: str) -> None:
    """No attribute can be changed, removed or added."""
    with pytest.raises(AttributeError):
        setattr(EXPECTED, name, "x")
    with pytest.raises(AttributeError):
        delattr(EXPECTED, name)


# ------------------------------------------------------------------------------- redaction


@settings(deadline=None)
@given(user_ids, secrets, st.data())
def test_redact_leaves_no_form_of_the_key(user: str, secret: str, data: st.DataObject) -> None:
    """No form of the key remains in a redacted text."""
    credentials = Credentials(user, Secret(secret))
    forms = [secret, credentials.authorization.reveal(), *combined_forms(user, secret)]
    pieces = st.one_of(st.sampled_from(forms), st.text(visible, max_size=5), st.just("***"))
    text = "".join(data.draw(st.lists(pieces, max_size=6)))
    redacted = credentials.redact(text)
    if redacted != "***":  # the text was withheld, or was nothing but a form
        assert [] == [form for form in forms if form in redacted]


def test_redact_keeps_other_text() -> None:
    """Only the key is masked; the user id is not secret and remains."""
    text = f"{USER} sent {SECRET}, {COMBINED}, Basic {STANDARD}, {URLSAFE.rstrip('=')} and more"
    assert f"{USER} sent ***, ***, ***, *** and more" == EXPECTED.redact(text)


def test_redact_of_a_text_without_the_key() -> None:
    """A text without the key is returned unchanged."""
    assert "no key here ***" == EXPECTED.redact("no key here ***")


@pytest.mark.parametrize("secret", ["e", "ey", "key", "k*y-hush"])
def test_redact_withholds_the_text_if_masks_would_reveal_the_key(secret: str) -> None:
    """Masks of a very short key would reveal it, and a mask could complete a key with asterisks."""
    credentials = Credentials(USER, Secret(secret))
    assert ["***", "a dog"] == [credentials.redact(f"the {secret} they key in"), credentials.redact("a dog")]


# ------------------------------------------------------------------------------- no leaks


@pytest.mark.parametrize("show", [repr, str, "{}".format, ascii])
def test_credentials_show_only_the_user_id(show: Callable[[object], str]) -> None:
    """No text form of credentials contains the key, the header or the digest."""
    assert f"Credentials(user_id='{USER}')" == show(EXPECTED)


@pytest.mark.parametrize(
    ("api_key", "shown"),
    [
        (SECRET, f"CredentialSource(Credentials(user_id='{USER}'))"),
        (functools.partial(str, SECRET), "CredentialSource(a function)"),
        (f"{SECRET} ", f"CredentialSource(Credentials(user_id='{USER}'))"),
    ],
)
def test_source_shows_no_key(api_key: Any, shown: str) -> None:
    """A source's repr shows the user id; it does not show the arguments of a function."""
    assert shown == repr(source_of(USER, api_key, None))


@pytest.mark.parametrize("value", [EXPECTED, source_of(USER, SECRET), Secret(SECRET)])
def test_cannot_be_pickled(value: object) -> None:
    """Pickling is refused, and the error says why."""
    with pytest.raises(TypeError, match="the pickle would contain"):
        pickle.dumps(value)


@pytest.mark.parametrize("show", [repr, str, "{}".format, ascii])
def test_secret_is_masked(show: Callable[[object], str]) -> None:
    """Every text form masks the value, also inside a container."""
    assert ("Secret(***)", "[Secret(***)]") == (show(Secret(SECRET)), show([Secret(SECRET)]))


def test_secret_is_equal_by_value() -> None:
    """Equality by value detects a rotated key."""
    assert {Secret(SECRET)} == {Secret(SECRET), Secret(f"{SECRET[:-1]}r")}
    assert [True, False] == [Secret(SECRET) != Secret(OTHER_SECRET), Secret(SECRET) != Secret(SECRET)]
    assert (SECRET, False) == (Secret(SECRET).reveal(), Secret(SECRET).__eq__(SECRET) is True)


@pytest.mark.parametrize("value", [EXPECTED, source_of(USER, SECRET, None)])
def test_no_instance_dictionary(value: object) -> None:
    """`vars()`, which object dumpers use, does not work."""
    with pytest.raises(TypeError):
        vars(value)


def client(user_id: Any, api_key: Any, environ: dict[str, str] | None) -> None:
    """Create a source and read its credentials, like a client and its first call."""
    source_of(user_id, api_key, environ).current()


def as_function(value: str) -> Callable[[], str]:
    """Wrap a value as a function whose repr shows it."""
    return functools.partial(str, value)


LEAKS = {
    **{name: (user_id, api_key, None) for name, (user_id, api_key, _) in MISTAKES.items()},
    **{
        f"function: {name}": (user_id, as_function(api_key), None)
        for name, (user_id, api_key, _) in MISTAKES.items()
        if isinstance(api_key, str) and api_key.strip() and isinstance(user_id, str | None)
    },
    "environment swapped": (None, None, variables(SECRET, USER)),
    "environment disagrees": (OTHER_USER, None, variables(None, COMBINED)),
    "no user id": (None, SECRET, {}),
    "arguments disagree": (OTHER_USER, STANDARD, {}),
    "function fails": (USER, functools.partial(int, f"{SECRET}"), {}),
}


@pytest.mark.parametrize(("user_id", "api_key", "environ"), LEAKS.values(), ids=LEAKS)
def test_no_key_in_a_traceback_with_locals(
    user_id: Any, api_key: Any, environ: dict[str, str] | None
) -> None:
    """A traceback rendered with local variables shows no form of the key in the package's frames."""
    with pytest.raises((ConfigurationError, ValueError)) as caught:
        client(user_id, api_key, environ)
    error = caught.value
    rendered = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [frame for frame in rendered.stack if frame.filename.startswith(PACKAGE)]
    shown = "".join(f"{frame.name} {frame.locals}" for frame in frames)
    if isinstance(error, ConfigurationError):
        shown += f"{error}{error!r}{error.__dict__}{pickle.dumps(error)!r}"
        assert (None, None) == (error.__cause__, error.__context__)
        assert (True, str(error)) == (str(error).isprintable(), str(error).strip())
    assert frames != []
    assert [] == [form for form in (SECRET, STANDARD.rstrip("="), URLSAFE.rstrip("=")) if form in shown]


@settings(deadline=None)
@given(st.one_of(st.none(), st.text(max_size=30), user_ids), st.text(max_size=60))
def test_any_text_gives_credentials_or_one_line(user_id: str | None, api_key: str) -> None:
    """Any argument gives credentials, or a ConfigurationError with a message of one printable line."""
    with contextlib.suppress(ConfigurationError):
        header = read(user_id, api_key).authorization.reveal()
        assert base64.b64decode(header.removeprefix("Basic ")).startswith(b"usr_")
        return
    assert problem_with(user_id, api_key).isprintable()
