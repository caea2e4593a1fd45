"""Parsing of heads and bodies, without a server."""

import base64
import json
from typing import Any
from urllib.parse import parse_qs, quote

import pytest
from hypothesis import given, strategies as st

from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks._http import (
    MAX_BODY_BYTES,
    MeetingRef,
    Rejection,
    check_headers,
    check_method,
    headers_of,
    hook_url,
    parse_body,
    token_digest,
    tokens_in,
)

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary())
def test_any_body(body: bytes) -> None:
    """Any body is either accepted or rejected, without an error."""
    assert isinstance(parse_body(body), Rejection | MeetingRef)


@given(ANYTHING, ANYTHING, st.dictionaries(st.text(), ANYTHING))
def test_any_json(meeting_id: Any, meeting_type_id: Any, more: dict[str, Any]) -> None:
    """Only a valid id is accepted, unchanged; an invalid type is dropped."""
    parsed = parse_body(json.dumps({**more, "_id": meeting_id, "meetingTypeId": meeting_type_id}).encode())
    if isinstance(parsed, MeetingRef):
        assert meeting_id == parsed.meeting_id
        assert meeting_id.isascii()
        assert parsed.meeting_type_id in {
            None,
            meeting_type_id if isinstance(meeting_type_id, str) else None,
        }
    else:
        assert 400 == parsed.status_code


@given(st.from_regex(r"\A(mee|met)_[A-Za-z0-9]{1,30}\Z"), st.none() | st.from_regex(r"\Amet_[a-z0-9]{17}\Z"))
def test_ids(meeting_id: str, meeting_type_id: str | None) -> None:
    """Ids in the service's format are accepted, at any length."""
    body = json.dumps({"_id": meeting_id, "meetingTypeId": meeting_type_id}).encode()
    assert MeetingRef(meeting_id, meeting_type_id) == parse_body(body)


def test_last_of_two_ids_wins() -> None:
    """As usual in JSON. Which id wins does not matter, because it is looked up."""
    assert MeetingRef("mee_2") == parse_body(b'{"_id": "mee_1", "_id": "mee_2"}')


@pytest.mark.parametrize(("depth", "passes"), [(1, True), (60, True), (64, False), (500, False)])
def test_depth(depth: int, *, passes: bool) -> None:
    """Meetings are nested about 5 levels deep."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + (b"0" if opening != b"[" else b"") + closing * depth
        assert passes == isinstance(parse_body(b'{"_id": "mee_1", "x": %b}' % inner), MeetingRef)


def test_size() -> None:
    """The limit is exact to the byte."""
    fill = MAX_BODY_BYTES - len(b'{"_id": "mee_1", "x": ""}')
    assert MeetingRef("mee_1") == parse_body(b'{"_id": "mee_1", "x": "%b"}' % (b"x" * fill))
    too_large = parse_body(b'{"_id": "mee_1", "x": "%b"}' % (b"x" * (fill + 1)))
    assert isinstance(too_large, Rejection)
    assert 413 == too_large.status_code


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"0", None),
        (b"1048576", None),
        (b"1048577", 413),
        (b"9" * 30, 413),
        (b"9" * 6000, 413),
        (b"0" * 6000, None),
        (b"-1", None),
        (b"+5", None),
        (b"1e9", None),
        (b"", None),
        (b"\xb2", None),
    ],
)
def test_content_length(value: bytes, status: int | None) -> None:
    """A Content-Length that is too large is rejected; otherwise the body is counted."""
    rejection = check_headers([(b"host", b"x"), (b"Content-Length", value)])
    assert status == (rejection and rejection.status_code)


def test_no_content_length() -> None:
    """A chunked body has none."""
    assert check_headers([(b"transfer-encoding", b"chunked")]) is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "post", ""])
def test_methods(method: str) -> None:
    """Only POST is allowed."""
    rejection = check_method(method)
    assert rejection is not None
    assert (405, None) == (rejection.status_code, check_method("POST"))


@given(st.text(min_size=1))
def test_quoted_token(token: str) -> None:
    """A quoted token is found. Text that cannot be encoded is not a token."""
    try:
        query = f"a=b&token={quote(token)}"
    except UnicodeEncodeError:
        return
    assert token_digest(token) in tokens_in(query.encode(), [])
    url = hook_url("https://you.example/hooks?a=b", token)
    assert token_digest(token) in tokens_in(url.partition("?")[2].encode(), [])
    assert {"a": ["b"], "token": [token]} == parse_qs(url.partition("?")[2])


@pytest.mark.parametrize("token", ["a+b", "a/b==", "plain", "a b"])
def test_unquoted_token(token: str) -> None:
    """A plus sign may stand for itself or for a space."""
    assert token_digest(token) in tokens_in(b"token=" + token.encode(), [])


def test_token_as_password() -> None:
    """Basic credentials are for servers that log the query. A token in the query takes precedence."""
    basic = (b"authorization", b"Basic " + base64.b64encode(b"lemcal:s3cr:et"))
    assert (token_digest("s3cr:et"),) == tokens_in(b"", [basic])
    assert (token_digest("q"),) == tokens_in(b"token=q", [basic])
    assert () == tokens_in(b"", [basic, basic])


@pytest.mark.parametrize(
    "value", [b"", b"Basic", b"Basic !!", b"Bearer x", b"Basic " + base64.b64encode(b"x")]
)
def test_no_password(value: bytes) -> None:
    """Other schemes, malformed credentials, and those without a password are ignored."""
    assert () == tokens_in(b"", [(b"authorization", value)])


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"token",
        b"token=",
        b"token=a&token=a",
        b"token=a&t%6fken=a",
        b"a=token",
        b"tok%65n=",
        b"&" * 5000,
        b"\xff=\xfe",
        b"Token=a",
    ],
)
def test_no_token(query: bytes) -> None:
    """A query without a token, or with several, has none."""
    assert () == tokens_in(query, [])


@given(st.binary(), st.binary())
def test_any_query(first: bytes, second: bytes) -> None:
    """Different tokens have different digests."""
    assert len(tokens_in(first, [])) <= 2
    assert (
        tokens_in(b"token=x" + first.hex().encode(), []) == tokens_in(b"token=x" + second.hex().encode(), [])
    ) == (first == second)


@pytest.mark.parametrize(
    ("url", "token"),
    [("https://you.example/x", ""), ("https://you.example/x?token=a", "b"), ("https://you.example/x#y", "b")],
)
def test_invalid_hook_url(url: str, token: str) -> None:
    """A second token would invalidate both, and a fragment is never sent."""
    with pytest.raises(ConfigurationError, match=r"hook_url\(\)"):
        hook_url(url, token)


def test_header_types() -> None:
    """Headers may be text or bytes, a mapping or pairs."""
    expected = [(b"content-type", b"x"), (b"a", b"1")]
    assert expected == headers_of({"Content-Type": "x", "A": "1"})
    assert expected == headers_of([(b"Content-Type", b"x"), ("A", "1")])
