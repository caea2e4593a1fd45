"""What the wires read and write by themselves, beside what h11 makes of it."""

import h11
import httpx
import pytest
from hypothesis import given, strategies as st

from lemcal_async.transport._http11 import _plain_head, _plain_request

NAMES = [
    b"Content-Length",
    b"content-length",
    b"Connection",
    b"Transfer-Encoding",
    b"X-A",
    b"Date",
    b"X A",
    b"",
]
VALUES = [
    b"0",
    b"2",
    b"02",
    b"+2",
    b"2, 2",
    b"close",
    b"keep-alive",
    b"chunked",
    b"a b",
    b" a",
    b"a ",
    b"",
    b"\xe9",
]
ENDS = [b"\r\n", b"\n", b"\r", b"\r\n ", b"\0\r\n"]
FIELDS = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from([b": ", b":", b" : ", b":\t"]),
    st.sampled_from(VALUES),
    st.sampled_from(ENDS[:1] * 9 + ENDS),
)


def begin(method: bytes = b"GET", headers: list[tuple[bytes, bytes]] | None = None) -> h11.Connection:
    """Return h11 where a request has been sent."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target=b"/", headers=headers or [(b"Host", b"x")]))
    connection.send(h11.EndOfMessage())
    return connection


@given(
    status=st.sampled_from(
        [b"HTTP/1.1 200 OK", b"HTTP/1.1 404 ", b"HTTP/1.1 204 No", b"HTTP/1.0 200 OK", b"HTTP/1.1 200"]
    ),
    fields=st.lists(FIELDS, max_size=4),
    body=st.binary(max_size=4),
)
def test_a_head_is_read_as_h11_reads_it(
    status: bytes, fields: list[tuple[bytes, bytes, bytes, bytes]], body: bytes
) -> None:
    """Whatever is taken for plain, h11 takes for the same status, headers, and length of the body."""
    data = status + b"\r\n" + b"".join(map(b"".join, fields)) + b"\r\n" + body
    plain = _plain_head(data)
    if plain is None:
        return
    connection = begin()
    connection.receive_data(data[: plain.size] + b"x" * plain.length)
    head = connection.next_event()
    assert isinstance(head, h11.Response)
    assert (plain.status, plain.reason) == (head.status_code, head.reason)
    assert plain.headers == head.headers.raw_items()
    read = b""
    while isinstance(event := connection.next_event(), h11.Data):
        read += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert plain.length == len(read)
    assert connection.their_state is h11.DONE
    assert (b"", False) == connection.trailing_data


def test_a_usual_answer_is_plain() -> None:
    """As node and nginx send it."""
    head = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\nX-RateLimit-Limit: 20\r\n\r\n"
    plain = _plain_head(head + b"{}")
    assert plain is not None
    assert (200, b"OK", len(head), 2) == (plain.status, plain.reason, plain.size, plain.length)
    assert (b"X-RateLimit-Limit", b"20") == plain.headers[-1]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("content", [b"", b"{}"])
def test_a_request_is_written_as_h11_writes_it(method: str, content: bytes) -> None:
    """To the byte."""
    request = httpx.Request(method, "https://example.com/a?b=c%20d", content=content, headers={"X-A": "a b"})
    connection = h11.Connection(h11.CLIENT)
    written = connection.send(h11.Request(method=method, target=b"/a?b=c%20d", headers=request.headers.raw))
    if content:
        written += connection.send(h11.Data(content))
    assert written == _plain_request(request)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-A": "a\r\nX-B: b"},
        {"X-A": "a\nb"},
        {"X-A": " a"},
        {"X-A": ""},
        {"X A": "a"},
        {"X-A": "\0"},
        {"Connection": "close"},
        {"Transfer-Encoding": "chunked"},
        {"Content-Length": "3"},
        {"Expect": "100-continue"},
        [("Host", "a"), ("Host", "b")],
    ],
)
def test_an_odd_request_is_left_to_h11(headers: dict[str, str] | list[tuple[str, str]]) -> None:
    """It knows what to refuse."""
    assert _plain_request(httpx.Request("GET", "https://example.com/", headers=headers)) is None


def test_a_request_without_a_host_is_left_to_h11() -> None:
    """Which refuses it."""
    request = httpx.Request("GET", "https://example.com/")
    del request.headers["Host"]
    assert _plain_request(request) is None
