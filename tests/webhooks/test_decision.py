"""The pure part: what a head and a body are worth."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from lemcal_async.webhooks._http import (
    MAX_BODY_BYTES,
    Reject,
    Verify,
    check_headers,
    check_method,
    digest_of,
    read_body,
    token_in,
)

NONE = digest_of("")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary())
def test_any_body(body: bytes) -> None:
    """Whatever comes in, it is a decision."""
    assert isinstance(read_body(body), Reject | Verify)


@given(ANYTHING, ANYTHING, st.dictionaries(st.text(), ANYTHING))
def test_any_json(meeting_id: Any, meeting_type_id: Any, more: dict[str, Any]) -> None:
    """Only a plain id passes, as it is; the type is a hint that is dropped when it is of no use."""
    decision = read_body(json.dumps({**more, "_id": meeting_id, "meetingTypeId": meeting_type_id}).encode())
    if isinstance(decision, Verify):
        assert meeting_id == decision.meeting_id
        assert meeting_id.isascii()
        assert decision.meeting_type_id in {
            None,
            meeting_type_id if isinstance(meeting_type_id, str) else None,
        }
    else:
        assert 400 == decision.status


@given(st.from_regex(r"\A(mee|met)_[A-Za-z0-9]{1,30}\Z"), st.none() | st.from_regex(r"\Amet_[a-z0-9]{17}\Z"))
def test_ids(meeting_id: str, meeting_type_id: str | None) -> None:
    """Ids as the service makes them pass, of any length."""
    body = json.dumps({"_id": meeting_id, "meetingTypeId": meeting_type_id}).encode()
    assert Verify(meeting_id, meeting_type_id) == read_body(body)


def test_the_last_of_two_ids_counts() -> None:
    """As everywhere in JSON; which one it is does not matter, as it is looked up."""
    assert Verify("mee_2") == read_body(b'{"_id": "mee_1", "_id": "mee_2"}')


@pytest.mark.parametrize(("depth", "passes"), [(1, True), (60, True), (64, False), (500, False)])
def test_depth(depth: int, *, passes: bool) -> None:
    """Meetings are about 5 deep."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + (b"0" if opening != b"[" else b"") + closing * depth
        assert passes == isinstance(read_body(b'{"_id": "mee_1", "x": %b}' % inner), Verify)


def test_size() -> None:
    """To the byte; a body that is just within may be real."""
    fill = MAX_BODY_BYTES - len(b'{"_id": "mee_1", "x": ""}')
    assert Verify("mee_1") == read_body(b'{"_id": "mee_1", "x": "%b"}' % (b"x" * fill))
    too_large = read_body(b'{"_id": "mee_1", "x": "%b"}' % (b"x" * (fill + 1)))
    assert isinstance(too_large, Reject)
    assert 413 == too_large.status


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
    assert status == (refusal and refusal.status)


def test_no_content_length() -> None:
    """As of a chunked body."""
    assert check_headers([(b"transfer-encoding", b"chunked")]) is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "post", ""])
def test_methods(method: str) -> None:
    """There is one."""
    refusal = check_method(method)
    assert refusal is not None
    assert (405, None) == (refusal.status, check_method("POST"))


@given(st.text(min_size=1))
def test_a_token_is_found(token: str) -> None:
    """However it is quoted; what cannot be quoted is no token of ours."""
    from urllib.parse import quote

    try:
        query = f"a=b&token={quote(token)}"
    except UnicodeEncodeError:
        return
    assert digest_of(token) == token_in(query.encode())


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"token",
        b"token=",
        b"token=a&token=a",
        b"a=token",
        b"tok%65n=",
        b"&" * 5000,
        b"\xff=\xfe",
        b"Token=a",
    ],
)
def test_no_token(query: bytes) -> None:
    """Nothing that could be one, or more than one."""
    assert NONE == token_in(query)


@given(st.binary(), st.binary())
def test_any_query(first: bytes, second: bytes) -> None:
    """Digests of other tokens are others."""
    assert 32 == len(token_in(first))
    assert (token_in(b"token=" + first.hex().encode()) == token_in(b"token=" + second.hex().encode())) == (
        first == second
    )
