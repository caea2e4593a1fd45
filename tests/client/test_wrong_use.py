"""Misuse raises a ConfigurationError that says what to do, before anything is sent."""

import math
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.transport import PooledTransport

from .conftest import KEY, TARGET, USER_ID, Wire, check_plain

pytestmark = pytest.mark.anyio

# --------------------------------------------------------------------------- constructor


class HalfLimiter:
    """A limiter that lacks a method."""

    async def acquire(self) -> None:
        """Do nothing."""


CONSTRUCTOR: dict[str, tuple[dict[str, Any], str]] = {
    "no credentials": ({"user_id": None, "api_key": None}, "set LEMCAL_USER_ID and LEMCAL_API_KEY"),
    "no API key": ({"api_key": None}, r"no API key: pass api_key=, or set LEMCAL_API_KEY"),
    "no user id": ({"user_id": None}, r"no user id: pass user_id="),
    "lemlist style": ({"user_id": ""}, "not lemlist's empty username"),
    "lemlist style in one": (
        {"user_id": None, "api_key": f":{KEY}"},
        "not lemlist's empty username",
    ),
    "user id of another key": ({"api_key": f"usr_other:{KEY}"}, "make them match"),
    "swapped": ({"user_id": KEY, "api_key": USER_ID}, "swapped"),
    "e-mail address": ({"user_id": "host@example.com"}, "e-mail address"),
    "key of bytes": ({"api_key": KEY.encode()}, "api_key: must be a string or a function"),
    "user id of another type": ({"user_id": 5}, "user_id: must be a string, not int"),
    "empty base URL": ({"base_url": ""}, "base_url must be an absolute"),
    "base URL of another type": (
        {"base_url": httpx.URL("https://example.com")},
        "base_url must be an absolute",
    ),
    "base URL without scheme": ({"base_url": "api.lemcal.com"}, "base_url must be an absolute"),
    "base URL of another scheme": ({"base_url": "ftp://example.com"}, "base_url must be an absolute"),
    "base URL with a bad port": ({"base_url": "https://example.com:99999"}, "base_url must be an absolute"),
    "base URL with a bad host": ({"base_url": "https://example..com"}, "base_url must be an absolute"),
    "base URL with a bad address": (
        {"base_url": "https://256.1.1.1"},
        "invalid URL: Invalid IPv4",
    ),
    "base URL with credentials": ({"base_url": "https://a:b@example.com"}, "must not contain credentials"),
    "base URL with a query": ({"base_url": "https://example.com?a=b"}, "must not have a query"),
    "base URL with a fragment": (
        {"base_url": "https://example.com#a"},
        "must not have a query or a fragment",
    ),
    "plain http": ({"base_url": "http://example.com"}, "use https, or pass allow_insecure_http=True"),
    "plain http that looks local": ({"base_url": "http://localhost.example.com"}, "plain http"),
    "plain http, forbidden": (
        {"base_url": "http://example.com", "allow_insecure_http": False},
        "plain http to example.com",
    ),
    "transport of httpx.Client": (
        {"transport": httpx.HTTPTransport},
        "transport= must be an httpx or httpx2 AsyncBaseTransport",
    ),
    "a client for a transport": (
        {"transport": object()},
        "transport= must be an httpx or httpx2 AsyncBaseTransport, not object",
    ),
    "transport class": (
        {"transport": PooledTransport},
        "transport= must be an httpx or httpx2 AsyncBaseTransport, not type",
    ),
    "limiter of another kind": ({"limiter": 20}, "limiter= must be of type RateLimiter, not int"),
    "limiter that is incomplete": (
        {"limiter": HalfLimiter()},
        r"limiter= must be of type RateLimiter, not HalfLimiter: it has no snapshot\(\)$",
    ),
    "limiter class": ({"limiter": LocalRateLimiter}, "limiter= must be of type RateLimiter, not "),
    "retry of a number": ({"retry": 3}, "retry= must be of type RetryPolicy, not int"),
    "retry class": ({"retry": RetryPolicy}, "retry= must be of type RetryPolicy, not type"),
    "on_bad_row": ({"on_bad_row": "ignore"}, "on_bad_row='ignore': it must be 'raise' or 'skip'"),
    "on_bad_row of None": ({"on_bad_row": None}, "it must be 'raise' or 'skip'"),
    "on_bad_row of a list": ({"on_bad_row": ["skip"]}, "it must be 'raise' or 'skip'"),
    "no response bytes": ({"max_response_bytes": 0}, "max_response_bytes=0: it must be a whole number"),
    "response bytes as a string": ({"max_response_bytes": "64M"}, "max_response_bytes='64M'"),
    "response bytes of None": ({"max_response_bytes": None}, "max_response_bytes=None"),
}


@pytest.mark.parametrize("wrong", CONSTRUCTOR)
def test_constructor(wrong: str) -> None:
    """Invalid arguments are refused by the constructor, not by the first call."""
    options, words = CONSTRUCTOR[wrong]
    wire = Wire()
    with pytest.raises(ConfigurationError, match=words) as caught:
        wire.client(**options)
    check_plain(caught.value)
    assert (None, None, 0) == (caught.value.method, caught.value.status_code, caught.value.attempts)
    assert [] == wire.requests


@pytest.mark.parametrize(
    "base_url", ["http://127.0.0.1:1/api", "http://localhost", "http://[::1]:8", "http://lemcal.localhost"]
)
def test_plain_http_to_loopback(base_url: str) -> None:
    """Plain http to the loopback interface is allowed."""
    assert base_url in repr(Wire().client(base_url=base_url))


async def test_plain_http_if_allowed() -> None:
    """``allow_insecure_http=True`` allows plain http to another host, such as a proxy."""
    wire = Wire()
    await wire.client(base_url="http://example.com/lemcal", allow_insecure_http=True).me()
    assert ["http://example.com/lemcal/me"] == [str(request.url) for request in wire.requests]


# --------------------------------------------------------------------------- options

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"timeout={timeout!r}": (
            {"timeout": timeout},
            "timeout=.*: it must be a number of seconds above 0, or None for no limit",
        )
        for timeout in (
            0,
            -1,
            math.nan,
            "30",
            b"30",
            ...,
            (1, 2, 3, 4),
            {"read": 5},
            httpx.Timeout(5, read=0),
            httpx.Timeout(5, connect="1"),  # type: ignore[arg-type]  # misuse
        )
    },
    **{
        f"deadline={deadline!r}": (
            {"deadline": deadline},
            "deadline=.*: it must be a number of seconds above 0, or None for no limit",
        )
        for deadline in (0, -0.5, math.nan, math.inf, "5", httpx.Timeout(5), ...)
    },
    "retry=2": ({"retry": 2}, "retry= must be of type RetryPolicy, not int"),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_options(wrong: str) -> None:
    """The constructor and ``with_options`` raise the same errors."""
    options, words = OPTIONS[wrong]
    for make in (Wire().client, Wire().client().with_options):
        with pytest.raises(ConfigurationError, match=words) as caught:
            make(**options)
        check_plain(caught.value)


@pytest.mark.parametrize("priority", ["urgent", None, 1, ["bulk"]])
def test_priority(priority: Any) -> None:
    """Only "interactive" and "bulk" are valid."""
    with pytest.raises(ConfigurationError, match="it must be 'interactive' or 'bulk'"):
        Wire().client().with_options(priority=priority)


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"max_wait": -1}, {"backoff": math.nan}, {"backoff_max": -0.1}]
)
def test_retry_policy(options: dict[str, Any]) -> None:
    """The error names the field."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RetryPolicy(**options)


def test_unknown_options() -> None:
    """A misspelled option raises TypeError."""
    with pytest.raises(TypeError, match="retries"):
        Wire().client(retries=3)
    with pytest.raises(TypeError, match="limiter"):
        Wire().client().with_options(limiter=Unlimited())  # type: ignore[call-arg]  # misuse


# --------------------------------------------------------------------------- calls

Do = Callable[[AsyncLemcal], Awaitable[object]]

CALLS: dict[str, tuple[Do, str]] = {
    "hook without selector": (
        lambda c: c.hooks.create(TARGET),
        "either meeting_type_id= or any_meeting_type=True",
    ),
    "hook with both": (
        lambda c: c.hooks.create(TARGET, meeting_type_id="met_1", any_meeting_type=True),
        "either meeting_type_id= or any_meeting_type=True",
    ),
    "hook for no type": (
        lambda c: c.hooks.create(TARGET, meeting_type_id=""),
        "meeting_type_id must be a non-empty",
    ),
    "hook for a path": (
        lambda c: c.hooks.create(TARGET, meeting_type_id="a/b"),
        "meeting_type_id is not an id",
    ),
    "absolute URL": (
        lambda c: c.request("GET", "https://example.com/me"),
        "absolute and '//' URLs would send",
    ),
    "other host": (
        lambda c: c.request("GET", "//example.com/me"),
        "absolute and '//' URLs would send the API key",
    ),
    "no slash": (lambda c: c.request("GET", "me"), "start it with one '/'"),
    "no path": (lambda c: c.request("GET", ""), "start it with one '/'"),
    "backslash": (lambda c: c.request("GET", "/\\example.com"), "percent-encode backslashes"),
    "dots": (lambda c: c.request("GET", "/meetings/../me"), "dot segments"),
    "quoted dots": (lambda c: c.request("GET", "/meetings/%2E%2e/me"), "dot segments"),
    "query in the path": (lambda c: c.request("GET", "/meetings?a=b"), "pass the query as params="),
    "space in the path": (lambda c: c.request("GET", "/a b"), "percent-encode backslashes, whitespace"),
    "newline in the path": (
        lambda c: c.request("GET", "/a\r\nX: y"),
        "percent-encode backslashes, whitespace",
    ),
    "URL too long": (lambda c: c.request("GET", "/" + 70_000 * "a"), "invalid URL: URL too long"),
    "params in pairs": (
        lambda c: c.request("GET", "/me", params=cast("Any", [("a", 1)])),
        "params= must be of type Mapping, not list",
    ),
    "params of another type": (
        lambda c: c.request("GET", "/me", params={"a": object()}),
        r"params=\{'a': \.\.\.\}: it must be text, a number, .* not object$",
    ),
    "params with a nested list": (
        lambda c: c.request("GET", "/me", params={"a": ["b", ["c"]]}),
        r"params=\{'a': \.\.\.\}: it must be text, a number, .* not list$",
    ),
    "params of bytes": (
        lambda c: c.request("GET", "/me", params={"a": b"b"}),
        r"params=\{'a': \.\.\.\}: it must be text, a number, .* not bytes$",
    ),
    "params that cannot be encoded": (
        lambda c: c.request("GET", "/me", params={"a": "\ud800"}),
        "not valid Unicode",
    ),
    "no method": (lambda c: c.request("", "/me"), "it must be an HTTP method such as 'GET'"),
    "method of None": (
        lambda c: c.request(cast("Any", None), "/me"),
        "method='None': it must be an HTTP method",
    ),
    "method of bytes": (lambda c: c.request(cast("Any", b"GET"), "/me"), "it must be an HTTP method"),
    "path of None": (lambda c: c.request("GET", cast("Any", None)), "start it with one '/'"),
    "method with a header": (lambda c: c.request("GET /x\r\n", "/me"), "it must be an HTTP method"),
    "json of a set": (
        lambda c: c.request("POST", "/hooks", json={1}),
        "json= cannot be written as JSON: Object of",
    ),
    "json of bytes": (
        lambda c: c.request("POST", "/hooks", json={"a": b""}),
        "json= cannot be written as JSON",
    ),
    "json of NaN": (
        lambda c: c.request("POST", "/hooks", json=[math.nan]),
        "json= cannot be written as JSON",
    ),
    "json within itself": (
        lambda c: c.request("POST", "/hooks", json=circular()),
        "json= cannot be written as JSON",
    ),
}


def circular() -> list[Any]:
    """Return a list that contains itself."""
    data: list[Any] = []
    data.append(data)
    return data


@pytest.mark.parametrize("wrong", CALLS)
@pytest.mark.parametrize("deadline", [None, 5])
async def test_calls(wrong: str, deadline: float | None) -> None:
    """Invalid arguments are refused before the call is queued or sent."""
    do, words = CALLS[wrong]
    wire = Wire()
    lemcal = wire.client(deadline=deadline, limiter=LocalRateLimiter())
    with pytest.raises(ConfigurationError, match=words) as caught:
        await do(lemcal)
    check_plain(caught.value)
    assert [] == wire.requests
    assert 20 == lemcal.rate_limit.remaining


@pytest.mark.parametrize(
    "target",
    [
        "ftp://example.com/x",
        "example.com/x",
        "//example.com/x",
        "https://",
        "https:///x",
        "mailto:host@example.com",
        "https://example.com/a b",
        "https://[::1",
        "",
        None,
        b"https://example.com",
        7,
    ],
)
async def test_targets(target: Any) -> None:
    """A target that is not an absolute http or https URL is refused before anything is sent."""
    wire = Wire()
    with pytest.raises(ConfigurationError, match="target_url must be an absolute http:// or https:// URL"):
        await wire.client().hooks.create(target, any_meeting_type=True)
    assert [] == wire.requests


WITH_IDS: dict[str, Callable[[AsyncLemcal, Any], Awaitable[object]]] = {
    "meetings.get": lambda c, value: c.meetings.get(value),
    "meetings.get, type": lambda c, value: c.meetings.get("mee_1", value),
    "meetings.list": lambda c, value: c.meetings.list(value),
    "meeting_types.get": lambda c, value: c.meeting_types.get(value),
    "hooks.create": lambda c, value: c.hooks.create(TARGET, meeting_type_id=value),
    "hooks.delete": lambda c, value: c.hooks.delete(value),
}


@pytest.mark.parametrize("call", WITH_IDS)
@pytest.mark.parametrize(
    "value", ["", "a/b", "../me", "..", ".", "/", "a\\b", "a b", "a\n", "\ud800", 5, b"met_1", ["met_1"]]
)
async def test_ids(call: str, value: Any) -> None:
    """A value that could lead to another route is not accepted as an id."""
    wire = Wire()
    with pytest.raises(ConfigurationError, match=r"(must be a non-empty string|is not an id)") as caught:
        await WITH_IDS[call](wire.client(), value)
    check_plain(caught.value)
    assert [] == wire.requests


@pytest.mark.parametrize("call", ["meetings.get", "meeting_types.get", "hooks.delete"])
async def test_none_is_not_an_id(call: str) -> None:
    """None is refused, except where it is the default and means all."""
    wire = Wire()
    with pytest.raises(ConfigurationError, match="must be a non-empty string, got None"):
        await WITH_IDS[call](wire.client(), None)
    assert [] == wire.requests


@pytest.mark.parametrize("value", ["a?b=c", "a#b", "a%2e%2e", "a;b", "é", "a&b=c"])
async def test_unusual_ids_are_quoted(value: str) -> None:
    """An unusual id is quoted as one path segment, or as one query value."""
    wire = Wire(lambda request: httpx.Response(200, json=[] if request.method == "GET" else {"_id": "x"}))
    await wire.client().hooks.delete(value)
    await wire.client().meetings.list(value)
    deleted, listed = wire.requests
    assert f"/api/lemcal/hooks/{value}" == deleted.url.path
    assert b"" == deleted.url.query
    assert {"meetingTypeId": value} == dict(listed.url.params)


def test_call_outside_an_event_loop() -> None:
    """Without an event loop, anyio's own error is raised."""
    wire = Wire()
    call = wire.client(limiter=LocalRateLimiter()).me()
    with pytest.raises(RuntimeError, match=r"event loop|async library"):  # depends on anyio's version
        call.send(None)
    assert [] == wire.requests
