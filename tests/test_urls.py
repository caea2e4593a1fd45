"""Credentials are sent only to the configured host, and only below its path."""

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx
import pytest
from hypothesis import given, reject, settings, strategies as st

from lemcal_async._auth import Secret
from lemcal_async._urls import (
    DEFAULT_BASE_URL,
    check_base_url,
    check_path,
    check_target_url,
    is_loopback,
    quote_id,
    with_query,
)
from lemcal_async.errors import ConfigurationError

# Building blocks of paths and ids that try to reach another route.
trouble = st.lists(
    st.one_of(
        st.sampled_from(
            ["/", "//", ".", "..", "%2e", "%2E", "%2f", "%5c", "%", "\\", "?", "#", "@", ":", ";", " "]
        ),
        st.sampled_from(
            ["evil.example", "http:", "\t", "\n", "\x00", "\x7f", "é", "\ud800", "%c3%a9", "[::1]"]
        ),
        st.text(max_size=4),
    ),
    max_size=8,
).map("".join)


# ----------------------------------------------------------------------------------- base URLs
@pytest.mark.parametrize(
    ("url", "checked"),
    [
        (DEFAULT_BASE_URL, DEFAULT_BASE_URL),
        ("https://api.lemcal.com/api/lemcal/", DEFAULT_BASE_URL),
        ("https://example.com", "https://example.com"),
        ("https://example.com//", "https://example.com"),
        ("https://example.com:8443/a/b", "https://example.com:8443/a/b"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://api.localhost", "http://api.localhost"),
        ("http://127.0.0.1:8000/x", "http://127.0.0.1:8000/x"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_base_urls(url: str, checked: str) -> None:
    """Https is allowed for any host, http on loopback; a trailing slash is removed."""
    assert checked == check_base_url(Secret(url))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/api/lemcal",
        "api.lemcal.com",
        "//api.lemcal.com",
        "ftp://api.lemcal.com",
        "file:///etc",
        "https://",
        "https:///api",
        "https://example.com:port",
        "https://example.com:70000",
        "https://[::1",
        " https://example.com",
        "https://example.com/\n",
        "https://exa mple.com",
        None,
        b"https://example.com",
        7,
        httpx.URL("https://example.com"),
    ],
)
def test_invalid_base_urls(url: Any) -> None:
    """Anything but an absolute http(s) URL is rejected; the message shows an example."""
    with pytest.raises(ConfigurationError, match="must be an absolute http") as caught:
        check_base_url(Secret(url))
    assert DEFAULT_BASE_URL in str(caught.value)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://usr_x:hush@example.com", "credentials"),
        ("https://hush@example.com", "credentials"),
        ("https://:hush@example.com", "credentials"),
        ("https://example.com?token=hush", "query"),
        ("https://example.com/?", "query"),
        ("https://example.com#hush", "fragment"),
        ("https://example.com/#", "fragment"),
        ("https://hush example.com", "absolute"),
    ],
)
def test_base_urls_with_credentials_or_query(url: str, what: str) -> None:
    """Credentials, queries and fragments are rejected, and not quoted in the message."""
    with pytest.raises(ConfigurationError, match=what) as caught:
        check_base_url(Secret(url))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://10.0.0.1",
        "http://[2001:db8::1]",
        "http://0.0.0.0",
    ],
)
def test_plain_http(url: str) -> None:
    """Plain http to other hosts would send the API key unencrypted, so it must be enabled explicitly."""
    with pytest.raises(ConfigurationError, match="allow_insecure_http=True"):
        check_base_url(Secret(url))
    assert url == check_base_url(Secret(url), allow_insecure_http=True)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("notlocalhost", False),
        ("localhost.example.com", False),
        ("192.168.0.1", False),
        ("", False),
    ],
)
def test_loopback_hosts(host: str, loopback: bool) -> None:  # noqa: FBT001  # from parametrize
    """Localhost by name or by address."""
    assert loopback == is_loopback(host)


# ----------------------------------------------------------------------------------------- ids
@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("mee_8xKv-9.~", "mee_8xKv-9.~"),
        ("a?b#c", "a%3Fb%23c"),
        ("%2e%2e", "%252e%252e"),
        ("%2F", "%252F"),
        ("é", "%C3%A9"),
        ("...", "..."),
        ("a:b@c", "a%3Ab%40c"),
    ],
)
def test_valid_ids(value: str, quoted: str) -> None:
    """An id is quoted as a single path segment."""
    assert quoted == quote_id(value, "hook_id")


@pytest.mark.parametrize("value", [None, "", 0, 7, b"mee_x", ["mee_x"], {}])
def test_missing_ids(value: object) -> None:
    """An id must be a non-empty string: an empty one would address the list."""
    with pytest.raises(ConfigurationError, match="hook_id must be a non-empty string, got"):
        quote_id(value, "hook_id")


@pytest.mark.parametrize(
    "value",
    [".", "..", "/", "../me", "a/b", "a\\b", "a b", " ", "a\n", "\x00", "\x7f", "\t", "\ud800", "a\udfff"],
)
def test_ids_that_change_the_route(value: str) -> None:
    """An id that could change the route is rejected, not escaped: no such id exists."""
    with pytest.raises(ConfigurationError, match="hook_id is not an id"):
        quote_id(value, "hook_id")


def test_long_ids_are_abbreviated_in_messages() -> None:
    """A message stays readable."""
    with pytest.raises(ConfigurationError) as caught:
        quote_id("x" * 10_000 + "/", "hook_id")
    assert len(str(caught.value)) < 120
    assert str(caught.value).endswith("... ('.', '..', or with slashes or whitespace)")


@given(trouble)
@settings(max_examples=200)
def test_an_accepted_id_stays_one_segment(value: str) -> None:
    """Any accepted id arrives at the server unchanged, as one segment."""
    try:
        quoted = quote_id(value, "id")
    except ConfigurationError:
        reject()
    url = httpx.URL(f"{DEFAULT_BASE_URL}/meetingTypes/{quoted}")
    assert f"/api/lemcal/meetingTypes/{quoted}".encode() == url.raw_path
    assert "/" not in quoted
    assert value == unquote(quoted)


# --------------------------------------------------------------------------------------- paths
@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/", "/"),
        ("/me", "/me"),
        ("/meetings/mee_x", "/meetings/mee_x"),
        ("/meetings/", "/meetings/"),
        ("/a//b", "/a//b"),
        ("/a:b@c;d=e,f", "/a:b@c;d=e,f"),
        ("/caf%C3%A9", "/caf%C3%A9"),
        ("/café", "/caf%C3%A9"),
        ("/a..b/.hidden/...", "/a..b/.hidden/..."),
        ("/a%3Fb", "/a%3Fb"),
        ("/:80", "/:80"),
    ],
)
def test_paths(path: str, sent: str) -> None:
    """A path is percent-encoded where needed, and never twice."""
    assert sent == check_path(path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "start it with one '/'"),
        ("me", "start it with one '/'"),
        ("https://evil.example/me", "start it with one '/'"),
        ("//evil.example/me", "start it with one '/'"),
        ("?a=b", "start it with one '/'"),
        ("@evil.example", "start it with one '/'"),
        (".evil.example", "start it with one '/'"),
        ("/\\evil.example", "backslashes"),
        ("/a b", "whitespace"),
        ("/a\r\nX: y", "control characters"),
        ("/\x00", "control characters"),
        ("/\ud800", "control characters"),
        ("/me?a=b", "params="),
        ("/me#x", "params="),
        ("/..", "dot segments"),
        ("/.", "dot segments"),
        ("/a/../me", "dot segments"),
        ("/a/./b", "dot segments"),
        ("/a/%2e%2e/me", "dot segments"),
        ("/a/.%2E/me", "dot segments"),
        ("/%2e", "dot segments"),
        ("/a%2f..%2fme", "dot segments"),
        ("/a%2F%2e%2e%2Fme", "dot segments"),
        ("/a%5c..%5Cme", "dot segments"),
    ],
)
def test_paths_that_change_the_route(path: str, reason: str) -> None:
    """Paths to other hosts or routes, or with a query, are rejected; the message says what to do."""
    with pytest.raises(ConfigurationError, match=f"below the base URL.*{reason}"):
        check_path(path)


@given(
    st.sampled_from(
        [DEFAULT_BASE_URL, "https://example.com", "http://127.0.0.1:8000/x", "https://[::1]/a/b/c"]
    ),
    trouble.map("/".__add__),
)
@settings(max_examples=200)
def test_an_accepted_path_stays_below_the_base(base: str, path: str) -> None:
    """Any accepted path leads to the same host and below the base path, and has no query."""
    try:
        accepted = check_path(path)
    except ConfigurationError:
        reject()
    home, url = httpx.URL(check_base_url(Secret(base))), httpx.URL(base + accepted)
    assert (home.scheme, home.host, home.port) == (url.scheme, url.host, url.port)
    assert (b"", "", b"") == (url.query, url.fragment, url.userinfo)
    assert url.path.startswith(home.path.rstrip("/") + "/")
    assert not {".", ".."}.intersection(url.path.replace("\\", "/").split("/"))


# ---------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    ("params", "url"),
    [
        (None, "/x"),
        ({}, "/x"),
        ({"a": None}, "/x"),
        ({"a": []}, "/x"),
        ({"a": [None]}, "/x"),
        ({"a": 1, "b": None}, "/x?a=1"),
        ({"a": ""}, "/x?a="),
        ({"a": 0}, "/x?a=0"),
        ({"a": True, "b": False}, "/x?a=true&b=false"),
        ({"a": [1, None, True], "b": (2, "x")}, "/x?a=1&a=true&b=2&b=x"),
        ({"a": "b&c=d#e f", "ä": "ö"}, "/x?a=b%26c%3Dd%23e+f&%C3%A4=%C3%B6"),
        ({"a": 1.5}, "/x?a=1.5"),
    ],
)
def test_parameters(params: dict[str, object] | None, url: str) -> None:
    """None is omitted, lists become repeated parameters, and bools are written as in JSON."""
    assert url == with_query("/x", params)


@pytest.mark.parametrize("params", [{"a": "\ud800"}, {"\udfff": 1}, {"a": ["b", "\ud800"]}])
def test_parameters_with_lone_surrogates(params: dict[str, object]) -> None:
    """A lone surrogate cannot be encoded; the message names the path, not the value."""
    with pytest.raises(ConfigurationError, match="parameters of /x contain text that is not valid Unicode"):
        with_query("/x", params)


encodable = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(encodable, encodable))
def test_parameters_arrive_unchanged(params: dict[str, str]) -> None:
    """No value can turn into another parameter or into part of the path."""
    parts = urlsplit(with_query("/x", params))
    assert ("", "/x", "") == (parts.netloc, parts.path, parts.fragment)
    assert list(params.items()) == parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(params))


# ------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com/hook?token=hush",
        "https://user:hush@example.com:8443/x",
        "HTTPS://EXAMPLE.COM",
        "http://localhost:8000",
    ],
)
def test_valid_targets(url: str) -> None:
    """The target of a hook may be any http(s) URL, and is not changed."""
    assert url == check_target_url(Secret(url)).reveal()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com?token=hush",
        "/hook?token=hush",
        "ftp://example.com/hush",
        "javascript:hush()",
        "https://",
        "https:///hush",
        "https://[::1/hush",
        "https://exam ple.com/hush",
        "https://example.com/hush\n",
        None,
        7,
        b"https://example.com/hush",
    ],
)
def test_invalid_targets(url: Any) -> None:
    """Anything else is rejected before it is sent, and not quoted, because it may contain a token."""
    with pytest.raises(ConfigurationError, match="must be an absolute http") as caught:
        check_target_url(Secret(url))
    assert "hush" not in str(caught.value)


def test_target_with_a_fragment() -> None:
    """The part of a token after an unencoded ``#`` is never sent, so every delivery would get a 401."""
    with pytest.raises(ConfigurationError, match=r"percent-encode the token, as .*hook_url") as caught:
        check_target_url(Secret("https://you.example/hooks?token=a#hush"))
    assert "hush" not in str(caught.value)
