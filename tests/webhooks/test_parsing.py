"""The pure part: what a head and a body are worth."""

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
    digest_of,
    headers_of,
    hook_url,
    parse_body,
    tokens_in,
)

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary())
def test_any_body(body: bytes) -> None:
    """Whatever comes in, it is a decision."""
    assert isinstance(parse_body(body), Rejection | MeetingRef)


@given(ANYTHING, ANYTHING, st.dictionaries(st.text(), ANYTHING))
def test_any_json(meeting_id: Any, meeting_type_id: Any, more: dict[str, Any]) -> None:
    """Only a plain id passes, as it is; the type is a hint that is dropped when it is of no use."""
    decision = parse_body(json.dumps({**more, "_id": meeting_id, "meetingTypeId": meeting_type_id}).encode())
    if isinstance(decision, MeetingRef):
        assert meeting_id == decision.meeting_id
        assert meeting_id.isascii()
        assert decision.meeting_type_id in {
            None,
            meeting_type_id if isinstance(meeting_type_id, str) else None,
        }
    else:
        assert 400 == decision.status_code


@given(st.from_regex(r"\A(mee|met)_[A-Za-z0-9]{1,30}\Z"), st.none() | st.from_regex(r"\Amet_[a-z0-9]{17}\Z"))
def test_ids(meeting_id: str, meeting_type_id: str | None) -> None:
    """Ids as the service makes them pass, of any length."""
    body = json.dumps({"_id": meeting_id, "meetingTypeId": meeting_type_id}).encode()
    assert MeetingRef(meeting_id, meeting_type_id) == parse_body(body)


def test_the_last_of_two_ids_counts() -> None:
    """As everywhere in JSON; which one it is does not matter, as it is looked up."""
    assert MeetingRef("mee_2") == parse_body(b'{"_id": "mee_1", "_id": "mee_2"}')


@pytest.mark.parametrize(("depth", "passes"), [(1, True), (60, True), (64, False), (500, False)])
def test_depth(depth: int, *, passes: bool) -> None:
    """Meetings are about 5 deep."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + (b"0" if opening != b"[" else b"") + closing * depth
        assert passes == isinstance(parse_body(b'{"_id": "mee_1", "x": %b}' % inner), MeetingRef)


def test_size() -> None:
    """To the byte; a body that is just within may be real."""
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
    """It is believed when it says too much; else the body is counted."""
    refusal = check_headers([(b"host", b"x"), (b"Content-Length", value)])
    assert status == (refusal and refusal.status_code)


def test_no_content_length() -> None:
    """As of a chunked body."""
    assert check_headers([(b"transfer-encoding", b"chunked")]) is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "post", ""])
def test_methods(method: str) -> None:
    """There is one."""
    refusal = check_method(method)
    assert refusal is not None
    assert (405, None) == (refusal.status_code, check_method("POST"))


@given(st.text(min_size=1))
def test_a_token_is_found(token: str) -> None:
    """However it is quoted; what cannot be quoted is no token of ours."""
    try:
        query = f"a=b&token={quote(token)}"
    except UnicodeEncodeError:
        return
    assert digest_of(token) in tokens_in(query.encode(), [])
    url = hook_url("https://you.example/hooks?a=b", token)
    assert digest_of(token) in tokens_in(url.partition("?")[2].encode(), [])
    assert {"a": ["b"], "token": [token]} == parse_qs(url.partition("?")[2])


@pytest.mark.parametrize("token", ["a+b", "a/b==", "plain", "a b"])
def test_a_token_that_was_not_quoted(token: str) -> None:
    """What a URL carries as it is arrives; a plus sign may stand for itself or for a space."""
    assert digest_of(token) in tokens_in(b"token=" + token.encode(), [])


def test_a_token_as_a_password() -> None:
    """For servers that log the query; a token in the query comes first."""
    basic = (b"authorization", b"Basic " + base64.b64encode(b"lemcal:s3cr:et"))
    assert (digest_of("s3cr:et"),) == tokens_in(b"", [basic])
    assert (digest_of("q"),) == tokens_in(b"token=q", [basic])
    assert () == tokens_in(b"", [basic, basic])


@pytest.mark.parametrize(
    "value", [b"", b"Basic", b"Basic !!", b"Bearer x", b"Basic " + base64.b64encode(b"x")]
)
def test_no_password(value: bytes) -> None:
    """Other forms of authorization, broken ones, and those without a password."""
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
    """Nothing that could be one, or more than one."""
    assert () == tokens_in(query, [])


@given(st.binary(), st.binary())
def test_any_query(first: bytes, second: bytes) -> None:
    """Digests of other tokens are others."""
    assert len(tokens_in(first, [])) <= 2
    assert (
        tokens_in(b"token=x" + first.hex().encode(), []) == tokens_in(b"token=x" + second.hex().encode(), [])
    ) == (first == second)


@pytest.mark.parametrize(
    ("url", "token"),
    [("https://you.example/x", ""), ("https://you.example/x?token=a", "b"), ("https://you.example/x#y", "b")],
)
def test_no_url_for_a_hook(url: str, token: str) -> None:
    """Two tokens would be none, and what follows a fragment is never sent."""
    with pytest.raises(ConfigurationError, match=r"hook_url\(\)"):
        hook_url(url, token)


def test_headers() -> None:
    """Text or bytes, a mapping or pairs."""
    expected = [(b"content-type", b"x"), (b"a", b"1")]
    assert expected == headers_of({"Content-Type": "x", "A": "1"})
    assert expected == headers_of([(b"Content-Type", b"x"), ("A", "1")])
