"""The forms of user id and API key, what is said about wrong ones, and that the key shows nowhere."""

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
    """Return the source that a client makes of its arguments, in this environment; None: not consulted."""
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
    """Return what an account's user id and key mean."""
    return source_of(user_id, api_key).current()


def problem_with(user_id: Any = None, api_key: Any = None, environ: dict[str, str] | None = None) -> str:
    """Return the message of the ConfigurationError that these arguments end in."""
    with pytest.raises(ConfigurationError) as caught:
        source_of(user_id, api_key, environ)
    return str(caught.value)


def combined_forms(user: str, secret: str) -> list[str]:
    """Return the five ways in which people hold both in one string."""
    combined = f"{user}:{secret}"
    standard = base64.b64encode(combined.encode()).decode()
    urlsafe = base64.urlsafe_b64encode(combined.encode()).decode()
    return [combined, standard, standard.rstrip("="), urlsafe, urlsafe.rstrip("=")]


def variables(user_id: str | None = None, api_key: str | None = None) -> dict[str, str]:
    """Return an environment with these two variables, as far as they are given, and another one."""
    given_ = {"LEMCAL_USER_ID": user_id, "LEMCAL_API_KEY": api_key, "HOME": "/nowhere"}
    return {name: value for name, value in given_.items() if value is not None}


# ------------------------------------------------------------------------------------ forms


def test_header_is_basic_of_user_id_and_key() -> None:
    """The header is HTTP Basic with the user id as name and the key as password."""
    assert f"Basic {STANDARD}" == read(USER, SECRET).authorization.reveal()


def test_sample_tells_the_alphabets_apart() -> None:
    """The sample is of use: its base64 is padded, and differs between the two alphabets."""
    assert (True, True) == (STANDARD.endswith("="), STANDARD != URLSAFE)


@pytest.mark.parametrize("user_id", [None, USER, f" {USER}\n"])
@pytest.mark.parametrize("around", ["{}", "{}\n", " \t{}\r\n"])
@pytest.mark.parametrize(
    "key",
    [*combined_forms(USER, SECRET), base64.b64encode(f"{COMBINED}\n".encode()).decode()],
)
def test_forms_of_the_combined_key(user_id: str | None, around: str, key: str) -> None:
    """`usr_x:secret` and its base64 of either kind are read, with or without the user id beside it."""
    assert EXPECTED == read(user_id, around.format(key))


def test_key_of_its_own_beside_a_user_id() -> None:
    """Two values are the plainest form; a newline from a file does not matter."""
    assert EXPECTED == read(USER, f"{SECRET}\n")


def test_colon_in_the_secret() -> None:
    """Basic allows a colon in the password: only the first one of a combined key divides."""
    assert [Credentials(USER, Secret("a:b:c"))] * 2 == [read(USER, "a:b:c"), read(None, f"{USER}:a:b:c")]


@settings(deadline=None)
@given(
    user=user_ids,
    secret=secrets.filter(lambda secret: not secret.startswith("usr_")),
    before=spaces,
    beside=st.booleans(),
)
def test_every_form_of_every_pair_is_the_same(*, user: str, secret: str, before: str, beside: bool) -> None:
    """Whatever the form, the same pair gives equal credentials; a user id beside it changes nothing."""
    beside_it = user if beside else None
    assert [Credentials(user, Secret(secret))] * 5 == [
        read(beside_it, f"{before}{form}\n") for form in combined_forms(user, secret)
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
def test_arguments_win_over_the_environment(
    user_id: str | None, api_key: Any, environ: dict[str, str] | None
) -> None:
    """What is not passed is looked up; a combined key that is passed brings its own user id."""
    assert EXPECTED == source_of(user_id, api_key, environ).current()


def test_environment_is_read_once() -> None:
    """A change of the environment after construction is not seen, and the mapping is not kept."""
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
def test_disagreement_names_both_sides(
    user_id: str | None, api_key: Any, environ: dict[str, str] | None, message: str
) -> None:
    """Two user ids that differ are never resolved by guessing."""
    assert message in problem_with(user_id, api_key, environ)


EMPTY = "(currently unset or empty)"


@pytest.mark.parametrize("environ", [{}, variables("", " ")])
@pytest.mark.parametrize(
    ("user_id", "api_key", "message"),
    [
        (None, None, f"pass user_id= and api_key=, or set LEMCAL_USER_ID and LEMCAL_API_KEY {EMPTY}."),
        (USER, None, f"No API key: pass api_key=, or set LEMCAL_API_KEY {EMPTY}."),
        (
            None,
            SECRET,
            f"No user id: pass user_id=, set LEMCAL_USER_ID {EMPTY}, or pass the key as 'usr_...:key'",
        ),
    ],
)
def test_missing_names_argument_and_variable(
    environ: dict[str, str] | None, user_id: str | None, api_key: Any, message: str
) -> None:
    """What is missing is named together with both places to give it; an empty variable is not set."""
    assert message in problem_with(user_id, api_key, environ)


def test_missing_key_beside_a_user_id_from_the_environment() -> None:
    """The user id that is there is not reported as missing."""
    assert problem_with(None, None, variables(USER)).startswith("No API key: ")


@pytest.mark.parametrize(
    ("user_id", "api_key", "message"),
    [
        (None, None, "No user id and no API key: pass user_id= and api_key=."),
        (USER, None, "No API key: pass api_key=."),
        (None, SECRET, "No user id: pass user_id=, or pass the key as 'usr_...:key' (or its base64)."),
    ],
)
def test_without_an_environment_no_variable_is_named(user_id: str | None, api_key: Any, message: str) -> None:
    """A second account does not fall back on the first one's variables, nor is it told to set them."""
    assert message == problem_with(user_id, api_key, None)


# --------------------------------------------------------------------------------- mistakes

LEMLIST = "lemcal requires userId:apiKey, not lemlist's empty user name"
CHARACTERS = "the value contains a space, a control character or a non-ASCII character"

MISTAKES = {
    "user id empty, lemlist style": ("", SECRET, f"user_id: the user id is empty; {LEMLIST}"),
    "user id blank": (" \n", SECRET, f"user_id: the user id is empty; {LEMLIST}"),
    "key with an empty user name": (None, f":{SECRET}", f"api_key: the user id is empty; {LEMLIST}"),
    "the same beside a user id": (USER, f":{SECRET}", f"api_key: the user id is empty; {LEMLIST}"),
    "base64 of the same": (
        None,
        base64.b64encode(f":{SECRET}".encode()).decode(),
        f"api_key: the user id is empty; {LEMLIST}",
    ),
    "key empty": (USER, "", "api_key: the value is empty"),
    "key blank": (USER, " \n", "api_key: the value is empty"),
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
    "user id is no string": (17, SECRET, "user_id: must be a string, not int"),
    "key is no string": (USER, SECRET.encode(), "api_key: must be a string or a function that returns one"),
}


@pytest.mark.parametrize(("user_id", "api_key", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_arguments(user_id: str | None, api_key: Any, message: str) -> None:
    """Each mistake has a message of its own, which names the argument and says what to do."""
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
    """A new key is used from the next call on; the same one again gives the same object."""
    answers = iter([COMBINED, COMBINED, f"{USER}:{OTHER_SECRET}", STANDARD])
    source = source_of(None, lambda: next(answers), None)
    first, second, third, fourth = (source.current() for _ in range(4))
    assert (EXPECTED, Credentials(USER, Secret(OTHER_SECRET)), EXPECTED) == (first, third, fourth)
    assert first is second


def test_function_is_not_called_by_the_check() -> None:
    """A vault that is not ready yet does not hinder construction."""
    source_of(USER, lambda: pytest.fail("called"), None)


@pytest.mark.parametrize(
    ("user_id", "answer", "environ"),
    [(USER, SECRET, None), (None, SECRET, variables(USER)), (None, COMBINED, variables(OTHER_USER))],
)
def test_function_beside_a_user_id(user_id: str | None, answer: Any, environ: dict[str, str] | None) -> None:
    """What a function returns is completed in the way of an argument."""
    assert EXPECTED == source_of(user_id, lambda: answer, environ).current()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "The api_key function must return a string, not NoneType."),
        (SECRET.encode(), "The api_key function must return a string, not bytes."),
        ("", "value of the api_key function: the value is empty"),
        (f"{OTHER_USER}:{SECRET}", f"user_id is {USER}, but value of the api_key function belongs to"),
    ],
)
def test_function_that_returns_nothing_of_use(answer: Any, message: str) -> None:
    """The value is judged when it is asked for."""
    source = source_of(USER, lambda: answer)
    with pytest.raises(ConfigurationError) as caught:
        source.current()
    assert str(caught.value).startswith(message)


def test_bad_value_does_not_stick() -> None:
    """After a bad value the next good one is used."""
    answers = iter([SECRET, "", SECRET])
    source = source_of(USER, lambda: next(answers), None)
    first = source.current()
    with pytest.raises(ConfigurationError):
        source.current()
    assert first is source.current()


def test_exception_of_the_function_passes_unchanged() -> None:
    """What the function raises is its user's to handle: the same object, with nothing added."""
    error = LookupError("vault sealed")

    def api_key() -> str:
        raise error

    with pytest.raises(LookupError) as caught:
        source_of(USER, api_key, None).current()
    assert (error, None, None) == (caught.value, caught.value.__cause__, caught.value.__context__)


async def coroutine_function() -> str:
    """Stand for a key that is fetched asynchronously."""
    return SECRET


class AsyncCallable:
    """Stand for an object whose call is asynchronous."""

    async def __call__(self) -> str:
        """Return the key, to whoever awaits it."""
        return SECRET


@pytest.mark.parametrize(
    "api_key", [coroutine_function, functools.partial(coroutine_function), AsyncCallable()]
)
def test_coroutine_function_is_refused_at_once(api_key: Any) -> None:
    """It could not be awaited where the key is needed."""
    assert "api_key: must be a plain function, not an async one." == problem_with(USER, api_key)


def test_coroutine_that_a_plain_function_returns_is_closed() -> None:
    """It is refused by its type, and Python does not warn of a coroutine that was never awaited."""
    made: Any = coroutine_function()
    with pytest.raises(ConfigurationError, match="must return a string, not coroutine"):
        source_of(USER, lambda: made, None).current()
    assert inspect.CORO_CLOSED == inspect.getcoroutinestate(made)


def test_user_id_beside_a_function_is_checked_at_once() -> None:
    """What can be known before the first call is said before it."""
    assert problem_with("lea@example.com", lambda: SECRET).startswith("user_id: this looks like an e-mail")


# -------------------------------------------------------------------------------- the value


def test_equality_is_by_value() -> None:
    """The same pair is the same account under the same key."""
    same = [read(USER, SECRET), read(None, STANDARD)]
    assert {EXPECTED} == {*same}
    assert [True, False, False, False] == [
        same[0] == same[1],
        Credentials(USER, Secret(OTHER_SECRET)) == EXPECTED,
        Credentials(OTHER_USER, Secret(SECRET)) == EXPECTED,
        EXPECTED == read(USER, OTHER_SECRET),
    ]


def test_digest_is_fixed() -> None:
    """The digest is the same in every process: it is a key in stores that processes share."""
    assert "a3d6aab077947cc08f4bd00fd6e13352" == Credentials("usr_x", Secret("secret")).digest


@settings(deadline=None)
@given(st.lists(st.tuples(user_ids, secrets), min_size=2, max_size=5, unique=True))
def test_digests_differ(pairs: list[tuple[str, str]]) -> None:
    """Different credentials have different digests."""
    assert len(pairs) == len({Credentials(pair[0], Secret(pair[1])).digest for pair in pairs})


@pytest.mark.parametrize("name", ["user_id", "authorization", "digest", "secret", "other"])
def test_immutable(name: str) -> None:
    """Nothing of it can be changed, removed, or added."""
    with pytest.raises(AttributeError):
        setattr(EXPECTED, name, "x")
    with pytest.raises(AttributeError):
        delattr(EXPECTED, name)


# ------------------------------------------------------------------------------- redaction


@settings(deadline=None)
@given(user_ids, secrets, st.data())
def test_redact_leaves_no_form_of_the_key(user: str, secret: str, data: st.DataObject) -> None:
    """In a text around any of the forms, none is left."""
    credentials = Credentials(user, Secret(secret))
    forms = [secret, credentials.authorization.reveal(), *combined_forms(user, secret)]
    pieces = st.one_of(st.sampled_from(forms), st.text(visible, max_size=5), st.just("***"))
    text = "".join(data.draw(st.lists(pieces, max_size=6)))
    redacted = credentials.redact(text)
    if redacted != "***":  # the text withheld, or nothing but a form
        assert [] == [form for form in forms if form in redacted]


def test_redact_keeps_the_rest() -> None:
    """Only the key goes; the user id, which is no secret, stays."""
    text = f"{USER} sent {SECRET}, {COMBINED}, Basic {STANDARD}, {URLSAFE.rstrip('=')} and more"
    assert f"{USER} sent ***, ***, ***, *** and more" == EXPECTED.redact(text)


def test_redact_of_a_text_without_the_key() -> None:
    """A text that does not hold it comes back as it is."""
    assert "no key here ***" == EXPECTED.redact("no key here ***")


@pytest.mark.parametrize("secret", ["e", "ey", "key", "k*y-hush"])
def test_redact_withholds_the_text_when_a_mask_would_tell(secret: str) -> None:
    """The gaps left by a very short key would spell it out, and a mask could complete one with asterisks."""
    credentials = Credentials(USER, Secret(secret))
    assert ["***", "a dog"] == [credentials.redact(f"the {secret} they key in"), credentials.redact("a dog")]


# ------------------------------------------------------------------------------- no leaks


@pytest.mark.parametrize("show", [repr, str, "{}".format, ascii])
def test_credentials_show_the_user_id_only(show: Callable[[object], str]) -> None:
    """Whatever prints them prints no key, no header, no digest."""
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
    """A source shows what it settled on; of a function not even its arguments."""
    assert shown == repr(source_of(USER, api_key, None))


@pytest.mark.parametrize("value", [EXPECTED, source_of(USER, SECRET), Secret(SECRET)])
def test_not_pickled(value: object) -> None:
    """They are not written out, and the error says why."""
    with pytest.raises(TypeError, match="would be written out"):
        pickle.dumps(value)


@pytest.mark.parametrize("show", [repr, str, "{}".format, ascii])
def test_secret_is_masked(show: Callable[[object], str]) -> None:
    """However it is printed; inside a container too."""
    assert ("Secret(***)", "[Secret(***)]") == (show(Secret(SECRET)), show([Secret(SECRET)]))


def test_secret_is_equal_by_value() -> None:
    """So that a rotated key is noticed, and only that."""
    assert {Secret(SECRET)} == {Secret(SECRET), Secret(f"{SECRET[:-1]}r")}
    assert [True, False] == [Secret(SECRET) != Secret(OTHER_SECRET), Secret(SECRET) != Secret(SECRET)]
    assert (SECRET, False) == (Secret(SECRET).reveal(), Secret(SECRET).__eq__(SECRET) is True)


@pytest.mark.parametrize("value", [EXPECTED, source_of(USER, SECRET, None)])
def test_no_dictionary_to_dump(value: object) -> None:
    """`vars()`, which dumpers of objects go by, finds nothing."""
    with pytest.raises(TypeError):
        vars(value)


def client(user_id: Any, api_key: Any, environ: dict[str, str] | None) -> None:
    """Do what a client's constructor and a first call do."""
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
    """No argument ends in anything but credentials or a ConfigurationError of one printable line."""
    with contextlib.suppress(ConfigurationError):
        header = read(user_id, api_key).authorization.reveal()
        assert base64.b64decode(header.removeprefix("Basic ")).startswith(b"usr_")
        return
    assert problem_with(user_id, api_key).isprintable()
