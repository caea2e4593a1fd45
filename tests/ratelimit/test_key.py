"""The budget of a request, derived from its URL and Authorization header."""

import base64
import pickle

import httpx
import pytest
from hypothesis import given, strategies as st

from lemcal_async._auth import Credentials, Secret
from lemcal_async._urls import DEFAULT_BASE_URL
from lemcal_async.ratelimit import Key
from lemcal_async.ratelimit._base import key_of

SECRET = "3f8Kq-hush>>hush??-Zr"
CREDENTIALS = Credentials("usr_BuDuyx4chjoNfcmzM", Secret(SECRET))
AUTHORIZATION = CREDENTIALS.authorization.reveal()


def basic(pair: bytes) -> str:
    """Return a Basic header for arbitrary bytes."""
    return "Basic " + base64.b64encode(pair).decode()


@pytest.mark.parametrize("tail", ["", "/", "/me", "/meetings?type=mtp_1", "/hooks/hoo_1"])
def test_key_equals_the_clients_key(tail: str) -> None:
    """At the default base URL, it is the key that ``AsyncLemcal`` itself uses for the account."""
    assert Key(DEFAULT_BASE_URL, CREDENTIALS.digest) == key_of(DEFAULT_BASE_URL + tail, AUTHORIZATION)


def test_key_of_a_request_authorized_by_httpx() -> None:
    """A request authorized by httpx draws on the budget of the same account."""
    request = httpx.Request("GET", f"{DEFAULT_BASE_URL}/me")
    authorized = next(httpx.BasicAuth(CREDENTIALS.user_id, SECRET).auth_flow(request))
    expected = Key(DEFAULT_BASE_URL, CREDENTIALS.digest)
    assert expected == key_of(str(authorized.url), authorized.headers["authorization"])


@pytest.mark.parametrize("scheme", ["basic", "BASIC", "bAsIc"])
def test_scheme_is_case_insensitive(scheme: str) -> None:
    """``Basic`` may be spelled in any case."""
    header = AUTHORIZATION.replace("Basic", scheme)
    assert key_of(DEFAULT_BASE_URL, AUTHORIZATION) == key_of(DEFAULT_BASE_URL, header)


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("https://api.example.com/api/lemcal/me", "https://api.example.com"),
        ("https://api.example.com:8443/me?a=b#c", "https://api.example.com:8443"),
        ("http://127.0.0.1:8000/api/lemcal/me", "http://127.0.0.1:8000"),
        ("http://[::1]:8000/me", "http://[::1]:8000"),
        ("https://api.lemcal.com/other/me", "https://api.lemcal.com"),
        ("http://api.lemcal.com/api/lemcal/me", "http://api.lemcal.com"),
        ("https://usr_x:s3cret@api.example.com/me", "https://api.example.com"),
        ("https://a@b@api.example.com/me", "https://api.example.com"),
    ],
)
def test_other_addresses_use_their_origin(url: str, base_url: str) -> None:
    """Elsewhere, the origin stands in for the base URL, without credentials that the URL contains."""
    assert Key(base_url, CREDENTIALS.digest) == key_of(url, AUTHORIZATION)


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "Basic",
        "Basic ",
        "Basic not base64!",
        "Basic YQ",
        "Basic dXNy=X==",
        "Basic é",
        basic(b"\xff\xfe"),
        "Bearer abc",
        "usr_x:key",
        AUTHORIZATION + " ",
    ],
)
def test_malformed_header_identifies_a_budget(junk: str) -> None:
    """A malformed header still identifies one budget, and not the account's."""
    key = key_of(DEFAULT_BASE_URL, junk)
    assert key == key_of(DEFAULT_BASE_URL, junk)
    assert key != key_of(DEFAULT_BASE_URL, AUTHORIZATION)
    assert key != key_of(DEFAULT_BASE_URL, "Bearer another")


@given(st.text(st.characters(codec="utf-8")))
def test_any_header_is_accepted(authorization: str) -> None:
    """Any header that a request can contain is accepted."""
    for header in (authorization, f"Basic {authorization}", basic(authorization.encode())):
        assert key_of("https://api.example.com/me", header).base_url == "https://api.example.com"


@given(st.binary(), st.binary())
def test_different_credentials_have_different_budgets(one: bytes, other: bytes) -> None:
    """Two keys are equal if and only if the credentials are."""
    same = key_of(DEFAULT_BASE_URL, basic(one)) == key_of(DEFAULT_BASE_URL, basic(other))
    assert (one == other) is same


def test_key_depends_on_user_id_and_api_key() -> None:
    """The same API key with two user IDs identifies two budgets."""
    other = Credentials("usr_another", Secret(SECRET))
    assert key_of(DEFAULT_BASE_URL, AUTHORIZATION) != key_of(DEFAULT_BASE_URL, other.authorization.reveal())


def test_key_contains_no_secret() -> None:
    """A key can be logged, pickled and stored: it only contains a hash of the credential."""
    key = key_of(f"{DEFAULT_BASE_URL}/me", AUTHORIZATION)
    assert f"{CREDENTIALS.digest[:8]} at {DEFAULT_BASE_URL}" == str(key)
    assert key == pickle.loads(pickle.dumps(key))
    shown = f"{key} {key!r} {pickle.dumps(key)!r}"
    for form in (SECRET, AUTHORIZATION.removeprefix("Basic "), CREDENTIALS.user_id):
        assert form not in shown
