"""Turning responses into errors, with their messages and advice, or into data."""

import base64
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from lemcal_async._auth import Credentials, Secret
from lemcal_async._headers import Quota
from lemcal_async._responses import error_from_response, object_of, read_json, rows_of
from lemcal_async.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    CallInfo,
    ConflictError,
    DuplicateHookError,
    HookNotFoundError,
    MeetingTypeNotFoundError,
    MethodNotAllowedError,
    NotFoundError,
    PermissionDeniedError,
    PlanRequiredError,
    RateLimitError,
    ResponseDecodeError,
    ServerError,
)

DATA = Path(__file__).parent / "data" / "responses"

ME = CallInfo("GET", "/me", 1)
MEETINGS = CallInfo("GET", "/meetings", 1)
MEETING_TYPES = CallInfo("GET", "/meetingTypes", 1)
MEETING_TYPE = CallInfo("GET", "/meetingTypes/{id}", 1)
CREATE_HOOK = CallInfo("POST", "/hooks", 1)
DELETE_HOOK = CallInfo("DELETE", "/hooks/{id}", 1)

SECRET = "3f8Kq-hush>>hush??-Zr"
CREDENTIALS = Credentials("usr_BuDuyx4chjoNfcmzM", Secret(SECRET))


def unchanged(text: str) -> str:
    """Return the text without redaction."""
    return text


def error(
    status: int, body: bytes | str = b"", call: CallInfo = MEETINGS, *, location: str | None = None
) -> APIStatusError:
    """Return the error for a response without relevant headers."""
    return error_from_response(
        status,
        {} if location is None else {"location": location},
        body.encode() if isinstance(body, str) else body,
        call,
        redact=unchanged,
        quota=Quota(),
    )


def recorded(name: str) -> bytes:
    """Return a body as observed on the wire."""
    return (DATA / name).read_bytes()


# ------------------------------------------------------------------------------- error classes

CLASSES: dict[str, tuple[int, str, CallInfo, type[APIStatusError]]] = {
    "no target URL": (400, "You must provide a targetUrl", CREATE_HOOK, BadRequestError),
    "bad target URL": (400, "Invalid targetUrl", CREATE_HOOK, BadRequestError),
    "key in a quoted URL": (
        400,
        "Invalid targetUrl https://example.com/api-key/x?apiKey=1",
        CREATE_HOOK,
        BadRequestError,
    ),
    "key at the end of a quoted URL": (
        400,
        "Invalid targetUrl https://example.com/api-key",
        CREATE_HOOK,
        BadRequestError,
    ),
    "unauthorized": (401, "Unauthorized", ME, AuthenticationError),
    "no key": (400, "No API key provided", ME, AuthenticationError),
    "key in JSON": (400, '{"error": "Missing apiKey."}', ME, AuthenticationError),
    "blocked": (403, "User linked to this API key is blocked", ME, AuthenticationError),
    "no user for the key": (404, "No user found for this API key", ME, AuthenticationError),
    "no user for the key, hook": (404, "No user found for this API key", DELETE_HOOK, AuthenticationError),
    "plan": (402, "Upgrade your plan", MEETINGS, PlanRequiredError),
    "forbidden": (403, "Forbidden", MEETINGS, PermissionDeniedError),
    "no such route": (404, "Not Found", MEETINGS, NotFoundError),
    "no such list": (404, "Not Found", MEETING_TYPES, NotFoundError),
    "meeting type": (404, "meeting type not found", MEETING_TYPE, MeetingTypeNotFoundError),
    "meeting type, by route": (404, "Not Found", MEETING_TYPE, MeetingTypeNotFoundError),
    "meeting type, by message": (404, "Meeting type not found", MEETINGS, MeetingTypeNotFoundError),
    "meeting type of a new hook": (
        404,
        '{"success": false, "error": "meeting type not found"}',
        CREATE_HOOK,
        MeetingTypeNotFoundError,
    ),
    "hook": (404, "hook not found", DELETE_HOOK, HookNotFoundError),
    "hook, by route": (404, "", DELETE_HOOK, HookNotFoundError),
    "hook, by message": (404, "Hook not found", CallInfo("GET", "/x", 1), HookNotFoundError),
    "creating a hook": (404, "Not Found", CREATE_HOOK, NotFoundError),
    "unknown call": (404, "Not Found", CallInfo(), NotFoundError),
    "method": (405, "Method Not Allowed", CREATE_HOOK, MethodNotAllowedError),
    "duplicate hook": (409, "Duplicate hook", CREATE_HOOK, DuplicateHookError),
    "duplicate hook, no message": (409, "", CREATE_HOOK, DuplicateHookError),
    "another conflict": (409, "Conflict", CallInfo("POST", "/x", 1), ConflictError),
    "conflict of a deletion": (409, "Conflict", DELETE_HOOK, ConflictError),
    "too many": (429, "Too Many Requests", MEETINGS, RateLimitError),
    "server": (500, "Internal Server Error", MEETINGS, ServerError),
    "server error about the key": (500, "No API key provided", MEETINGS, ServerError),
    "unavailable": (503, "", MEETINGS, ServerError),
    "status of the CDN": (520, "error code: 520", MEETINGS, ServerError),
    "teapot": (418, "I'm a teapot", MEETINGS, APIStatusError),
    "redirect": (302, "", MEETINGS, APIStatusError),
    "not modified": (304, "", MEETINGS, APIStatusError),
    "informational": (103, "", MEETINGS, APIStatusError),
    "unassigned status": (999, "", MEETINGS, APIStatusError),
}


@pytest.mark.parametrize(("status", "body", "call", "expected"), CLASSES.values(), ids=CLASSES)
def test_error_class(status: int, body: str, call: CallInfo, expected: type[APIStatusError]) -> None:
    """The class depends on the status, the route and the server's message."""
    found = error(status, body, call)
    assert (expected, status, call) == (type(found), found.status_code, found.call)


PAGES: dict[str, tuple[int, str, CallInfo, type[APIStatusError], str | None]] = {
    "blocked by the CDN": (
        403,
        "cdn_403.html",
        ME,
        PermissionDeniedError,
        "Attention Required! | Cloudflare",
    ),
    "no such route, hook": (404, "router_404.html", DELETE_HOOK, NotFoundError, None),
    "no such route, meeting type": (404, "router_404.html", MEETING_TYPE, NotFoundError, None),
    "CDN without origin": (502, "cdn_502.html", MEETINGS, ServerError, "502 Bad Gateway"),
    "login wall": (401, "application_200.html", ME, AuthenticationError, "lemcal"),
}


@pytest.mark.parametrize(("status", "name", "call", "expected", "message"), PAGES.values(), ids=PAGES)
def test_html_page(
    status: int, name: str, call: CallInfo, expected: type[APIStatusError], message: str | None
) -> None:
    """An HTML page does not come from the API: its 404 is not about a hook, and only its title is kept."""
    found = error(status, recorded(name), call)
    assert (expected, message) == (type(found), found.server_message)
    assert "an HTML page" in str(found)
    assert "<" not in str(found)


# ------------------------------------------------------------------------- the server's message

SERVER_MESSAGES: dict[str, tuple[bytes | str, str | None]] = {
    "plain text": ("Invalid targetUrl", "Invalid targetUrl"),
    "empty": ("", None),
    "whitespace": (" \r\n\t ", None),
    "error": ('{"error": "Invalid targetUrl"}', "Invalid targetUrl"),
    "error, code": ('{"error": "Invalid targetUrl", "code": "BAD_URL"}', "Invalid targetUrl"),
    "success, error": ('{"success": false, "error": "Invalid targetUrl"}', "Invalid targetUrl"),
    "success, error with code": (
        '{"success": false, "error": {"code": "BAD_URL", "message": "Invalid targetUrl"}}',
        "Invalid targetUrl",
    ),
    "ok, message": ('{"ok": false, "message": "Invalid targetUrl"}', "Invalid targetUrl"),
    "code alone": ('{"success": false, "error": {"code": "BAD_URL"}}', "BAD_URL"),
    "error is a flag": ('{"error": true, "message": "Invalid targetUrl"}', "Invalid targetUrl"),
    "error is null": ('{"error": null, "code": "BAD_URL"}', "BAD_URL"),
    "JSON string": ('"Invalid targetUrl"', "Invalid targetUrl"),
    "empty JSON string": ('""', None),
    "empty object": ("{}", None),
    "empty array": ("[]", None),
    "another object": ('{"detail": 7}', '{"detail": 7}'),
    "an array": ("[1,\n2]", "[1, 2]"),
    "byte order mark": ('\ufeff{"error": "Invalid targetUrl"}', "Invalid targetUrl"),
    "broken JSON": ('{"error": "Inval', '{"error": "Inval'),
    "very deep JSON": ("[" * 60_000, "[" * 297 + "..."),
    "several lines": ("Invalid\r\n  targetUrl\x00\x1b[31m", "Invalid targetUrl [31m"),
    "lines in JSON": ('{"error": "Invalid\\n\\u2028\\u202etargetUrl"}', "Invalid targetUrl"),
    "not UTF-8": ("accès refusé".encode("latin-1"), "acc\ufffds refus\ufffd"),
    "long": ("x" * 301, "x" * 297 + "..."),
    "longest allowed": ("x" * 300, "x" * 300),
    "longer than what is read": ("denied " + "x" * 70_000, "denied"),
    "token in a quoted URL": (
        'Invalid targetUrl "https://example.com/in?token=hush-hush" for this account',
        'Invalid targetUrl "https://example.com/in?*** for this account',
    ),
    "fragment in a quoted URL": ("no hook for http://example.com#hush", "no hook for http://example.com?***"),
    "URL without a query": ("no hook for https://example.com/in", "no hook for https://example.com/in"),
    "title with entities": ("<html><title>\n A &amp; B </title></html>", "A & B"),
    "unclosed title": ("<html><title>A", None),
    "XML other than HTML": ("<Error>Denied</Error>", "<Error>Denied</Error>"),
}


@pytest.mark.parametrize(("body", "message"), SERVER_MESSAGES.values(), ids=SERVER_MESSAGES)
def test_server_message(body: bytes | str, message: str | None) -> None:
    """In every format, the message becomes one line of limited length, or None if there is none."""
    assert message == error(400, body, CREATE_HOOK).server_message


@pytest.mark.parametrize(
    "body", ["<title" * 10_000, "<html>" + "<title>" * 9_000, "a://" * 16_000, "[" * 65_536]
)
def test_hostile_body_does_not_slow_down_parsing(body: str) -> None:
    """No pattern backtracks excessively: parsing takes milliseconds, not minutes."""
    before = time.process_time()
    error(400, body)
    assert time.process_time() - before < 2


# -------------------------------------------------------------------------------- the message

MESSAGES: dict[str, tuple[APIStatusError, str]] = {
    "message": (
        error(401, "Unauthorized"),
        (
            'GET /meetings: 401 Unauthorized ("Unauthorized"). '
            "Check the user id and the API key: the service does not accept them."
        ),
    ),
    "no message": (
        error(404, "", DELETE_HOOK),
        (
            "DELETE /hooks/{id}: 404 Not Found. "
            "Check the id of the hook, and that it belongs to this account; it may already be deleted."
        ),
    ),
    "no permission": (
        error(403, "Forbidden"),
        'GET /meetings: 403 Forbidden ("Forbidden"). The account is not allowed to do this: ask its owner.',
    ),
    "page with a title": (
        error(403, recorded("cdn_403.html")),
        (
            'GET /meetings: 403 Forbidden (an HTML page, "Attention Required! | Cloudflare"). '
            "The API never returns HTML: check the base URL, the path, and any proxy in between."
        ),
    ),
    "page without a title": (
        error(404, recorded("router_404.html")),
        (
            "GET /meetings: 404 Not Found (an HTML page). "
            "The API never returns HTML: check the base URL, the path, and any proxy in between."
        ),
    ),
    "server": (error(500), "GET /meetings: 500 Internal Server Error. The server failed: try again later."),
    "server, unknown call": (
        error(500, "", CallInfo()),
        "the call: 500 Internal Server Error. The server failed: try again later.",
    ),
    "server, deletion": (
        error(504, "", DELETE_HOOK),
        "DELETE /hooks/{id}: 504 Gateway Timeout. The server failed: try again later.",
    ),
    "server, creation": (
        error(500, "", CREATE_HOOK),
        (
            "POST /hooks: 500 Internal Server Error. "
            "The request may have been processed anyway: check before you send it again."
        ),
    ),
    "server, creation, from the CDN": (
        error(502, recorded("cdn_502.html"), CREATE_HOOK),
        (
            'POST /hooks: 502 Bad Gateway (an HTML page, "502 Bad Gateway"). '
            "The request may have been processed anyway: check before you send it again."
        ),
    ),
    "unavailable, creation": (
        error(503, "", CREATE_HOOK),
        (
            "POST /hooks: 503 Service Unavailable. "
            "The request may have been processed anyway: check before you send it again."
        ),
    ),
    "too many": (
        error(429),
        (
            "GET /meetings: 429 Too Many Requests. "
            "Over the rate limit: try again later. Processes that use one key must share a limiter."
        ),
    ),
    "unknown status": (error(499, "gone"), 'GET /meetings: 499 ("gone"). Check the path and the base URL.'),
    "attempts": (
        error(500, "", CallInfo("GET", "/me", 3, 4.25)),
        (
            "GET /me: 500 Internal Server Error (3 attempts, 4.2 s waited). "
            "The server failed: try again later."
        ),
    ),
    "multi-line route": (
        error(499, "", CallInfo("GET", "/a\nb", 1)),
        "GET /a b: 499. Check the path and the base URL.",
    ),
}


@pytest.mark.parametrize(("found", "message"), MESSAGES.values(), ids=MESSAGES)
def test_message(found: APIStatusError, message: str) -> None:
    """One line: the call, the status, the server's message, advice, and the number of attempts."""
    assert message == str(found)


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("https://user:hush@login.example.com:8443/a?token=hush#hush", "(login.example.com)"),
        ("//cdn.example.com/a", "(cdn.example.com)"),
        ("/login?token=hush", "(no host given)"),
        ("https://[hush", "(no host given)"),
        ("https://" + "x" * 200, f"({'x' * 97}...)"),
        (None, "(no host given)"),
    ],
)
def test_redirect_names_only_the_host(location: str | None, host: str) -> None:
    """A redirect is an error that names the target's host, but not its path, query or user."""
    found = error(307, recorded("cdn_502.html"), location=location)
    assert found.server_message == "502 Bad Gateway"
    assert str(found) == (
        'GET /meetings: 307 Temporary Redirect (an HTML page, "502 Bad Gateway"). '
        f"Redirects are never followed {host}: check the base URL."
    )


def test_key_in_the_host_of_a_redirect_is_masked() -> None:
    """All text from the server is redacted."""
    credentials = Credentials("usr_x", Secret("hush-hush"))
    found = error_from_response(
        301,
        {"location": "https://hush-hush.example.com/"},
        b"",
        MEETINGS,
        redact=credentials.redact,
        quota=Quota(),
    )
    assert "(***.example.com)" in str(found)


def test_rate_limit_error_has_the_numbers() -> None:
    """Its ``retry_after``, ``limit`` and ``remaining`` come from the quota."""
    found = error_from_response(429, {}, b"", MEETINGS, redact=unchanged, quota=Quota(20, 0, 1.283))
    assert isinstance(found, RateLimitError)
    assert (1.283, 20, 0, 429) == (found.retry_after, found.limit, found.remaining, found.status_code)
    assert "try again in 1.3 s" in str(found)


def test_retry_after_is_on_every_error() -> None:
    """The service sends it with every response; it also matters for a 503."""
    found = error_from_response(503, {}, b"", MEETINGS, redact=unchanged, quota=Quota(20, None, 2.0))
    assert (2.0, False) == (found.retry_after, hasattr(found, "limit"))


# --------------------------------------------------------------------------- error properties

FAMILIES = {
    400: (BadRequestError, AuthenticationError),
    401: (AuthenticationError,),
    402: (PlanRequiredError,),
    403: (PermissionDeniedError, AuthenticationError),
    404: (NotFoundError, AuthenticationError),
    405: (MethodNotAllowedError,),
    409: (ConflictError,),
    429: (RateLimitError,),
}

calls = st.sampled_from(
    [ME, MEETINGS, MEETING_TYPE, CREATE_HOOK, DELETE_HOOK, CallInfo(attempts=4, waited=2.5)]
)
statuses = st.one_of(st.sampled_from([*FAMILIES]), st.integers(100, 999))
ENVELOPES: list[Callable[[str], Any]] = [
    lambda text: {"error": text},
    lambda text: {"success": False, "error": {"code": 1, "message": text}},
    lambda text: {"ok": False, "message": text},
    lambda text: {"unknown": [text]},
    lambda text: text,
]
bodies = st.one_of(
    st.binary(),
    st.text().map(str.encode),
    st.tuples(st.sampled_from(ENVELOPES), st.text()).map(lambda pair: json.dumps(pair[0](pair[1])).encode()),
    st.text().map(lambda title: f"<html><title>{title}</title></html>".encode()),
)


def contents(found: APIStatusError) -> tuple[type[APIStatusError], str, dict[str, Any]]:
    """Return an error's type, message and attributes."""
    return type(found), str(found), vars(found)


@settings(deadline=None)
@given(statuses, bodies, calls, st.none() | st.text(), st.none() | st.floats(0, 1e6))
def test_any_response_gives_an_error_of_its_family(
    status: int, body: bytes, call: CallInfo, location: str | None, retry_after: float | None
) -> None:
    """Any response becomes an error whose message is one line, and which can be pickled."""
    headers = {} if location is None else {"location": location}
    found = error_from_response(
        status, headers, body, call, redact=unchanged, quota=Quota(retry_after=retry_after)
    )
    family = (ServerError,) if 500 <= status < 600 else FAMILIES.get(status, (APIStatusError,))
    assert isinstance(found, family)
    assert (True, str(found)) == (str(found).isprintable(), str(found).strip())
    assert len(str(found)) < 700
    assert found.server_message is None or (found.server_message.isprintable() and found.server_message != "")
    assert contents(found) == contents(pickle.loads(pickle.dumps(found)))


@settings(deadline=None)
@given(
    statuses,
    st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=-_.~!", min_size=8, max_size=40),
    st.sampled_from(["plain", "json", "html", "control", "late", "location"]),
    calls,
)
def test_no_error_contains_the_key(status: int, secret: str, where: str, call: CallInfo) -> None:
    """If a server echoes the key, in any form and place, the error does not contain it."""
    credentials = Credentials("usr_BuDuyx4chjoNfcmzM", Secret(secret))
    standard = base64.b64encode(f"usr_BuDuyx4chjoNfcmzM:{secret}".encode()).decode()
    echo = f"{secret} for {credentials.authorization.reveal()}"
    body = {
        "plain": echo,
        "json": json.dumps({"error": {"message": echo}}),
        "html": f"<html><title>{echo}</title></html>",
        "control": f"\x00{secret}\x00",
        "late": "x" * 290 + f" {secret}",
        "location": "",
    }[where]
    location = f"https://{secret}:{secret}@login.example.com/{secret}?key={secret}"
    headers = {"location": location} if where == "location" else {}
    found = error_from_response(
        status, headers, body.encode(), call, redact=credentials.redact, quota=Quota()
    )
    shown = f"{found}{found!r}{vars(found)}{pickle.dumps(found)!r}"
    assert [] == [form for form in (secret, standard.rstrip("=")) if form in shown]


def test_key_is_masked_before_truncation() -> None:
    """The message does not end in half of a key."""
    found = error_from_response(
        400, {}, (b"x" * 290) + SECRET.encode(), MEETINGS, redact=CREDENTIALS.redact, quota=Quota()
    )
    assert "x" * 290 + "***" == found.server_message


def test_last_word_of_a_partly_read_body_is_dropped() -> None:
    """The last word may be half of a key."""
    body = b"denied" + b" " * (65_536 - 16) + SECRET.encode()
    found = error_from_response(400, {}, body, MEETINGS, redact=CREDENTIALS.redact, quota=Quota())
    assert found.server_message == "denied"


# ---------------------------------------------------------------------------------- read_json


@pytest.mark.parametrize(
    ("body", "data"),
    [
        (b"[]", []),
        (b' \r\n{"a": [1, 2.5, null, true]}\n', {"a": [1, 2.5, None, True]}),
        (b"\xef\xbb\xbf{}", {}),
        (b"null", None),
        (b"0", 0),
        (b"false", False),
        ('"é"'.encode(), "é"),
    ],
)
def test_json_is_read(body: bytes, data: Any) -> None:
    """Any JSON value except an empty string is data."""
    assert data == read_json(200, Secret(body), MEETINGS)


@pytest.mark.parametrize("body", [b"", b"No Content", b"{}"])
def test_no_content_is_none(body: bytes) -> None:
    """A 204 has no data, whatever its body."""
    assert read_json(204, Secret(body), DELETE_HOOK) is None


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "page": (recorded("application_200.html"), "is an HTML page, not JSON. Check the base URL and the path."),
    "page that is not UTF-8": (
        b"<html>\xe9</html>",
        "is an HTML page, not JSON. Check the base URL and the path.",
    ),
    "no body": (b"", "is empty."),
    "whitespace": (b" \n", "is empty."),
    "empty string": (b'""', "is an empty string."),
    "text": (b"OK", "is not JSON: Expecting value, at character 0."),
    "XML": (b"<Error/>", "is not JSON: Expecting value, at character 0."),
    "trailing data": (b'[] {"email": "lea@example.com"}', "is not JSON: Extra data, at character 3."),
    "unquoted name": (b"[{a: 1}]", "is not JSON: Expecting property name"),
    "cut after a value": (b'[{"a": 1}', "is JSON that is cut off after 9 bytes."),
    "cut after a comma": (b'[{"a": 1}, ', "is JSON that is cut off after 11 bytes."),
    "cut within an object": (b'[{"a": 1,', "is JSON that is cut off after 9 bytes."),
    "cut within a string": (b'[{"email": "lea@exam', "is JSON that is cut off after 20 bytes."),
    "not UTF-8": (b'["\xe9"]', "is not UTF-8 text."),
    "UTF-16": ("[1]".encode("utf-16"), "is not UTF-8 text."),
    "NaN": (b"[NaN]", "contains a number that JSON does not allow"),
    "infinity": (b"[-Infinity]", "contains a number that JSON does not allow"),
    "beyond a float": (b"[1e999]", "contains a number that JSON does not allow"),
    "beyond int()": (b"[" + b"1" * 5_000 + b"]", "contains a number that JSON does not allow"),
    "too deep": (b"[" * 200_000 + b"]" * 200_000, "is JSON that is nested too deeply."),
}


@pytest.mark.parametrize(("body", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_success_that_is_not_json(body: bytes, problem: str) -> None:
    """The error names the problem without quoting the body, and has no cause or context."""
    with pytest.raises(ResponseDecodeError) as caught:
        read_json(200, Secret(body), MEETINGS)
    assert str(caught.value).startswith(f"GET /meetings: 200 OK, but the body {problem}")
    assert str(caught.value).endswith(" check the base URL and the path.") or "is an HTML page" in problem
    assert (200, MEETINGS) == (caught.value.status_code, caught.value.call)
    assert (None, None) == (caught.value.__cause__, caught.value.__context__)
    assert "lea@" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
).filter(lambda value: value != "")


@settings(deadline=None)
@given(json_values, st.booleans())
def test_json_round_trip(value: Any, ascii_only: bool) -> None:  # noqa: FBT001 - from hypothesis
    """``read_json`` is the inverse of ``json.dumps``."""
    assert value == read_json(200, Secret(json.dumps(value, ensure_ascii=ascii_only).encode()), MEETINGS)


@settings(deadline=None)
@given(bodies)
def test_any_body_is_data_or_a_decode_error(body: bytes) -> None:
    """The data can be written as JSON again; otherwise, the error message is one line."""
    try:
        data = read_json(200, Secret(body), MEETINGS)
    except ResponseDecodeError as caught:
        message = str(caught)
    else:
        message = json.dumps(data, allow_nan=False)
    assert message.isprintable()


# ----------------------------------------------------------------------------- rows and objects

NAMES = ("meetings", "data")


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ([], []),
        ([1, {}], [1, {}]),
        ({"meetings": [1]}, [1]),
        ({"data": [1], "total": 1}, [1]),
        ({"meetings": [1], "data": [2]}, [1]),
        ({"meetings": None, "data": [2]}, [2]),
    ],
)
def test_rows(data: Any, rows: list[Any]) -> None:
    """The rows are the array itself, or the first array under one of the names."""
    assert rows == rows_of(Secret(data), NAMES, MEETINGS)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (None, "null"),
        (True, "a boolean"),
        (1, "a number"),
        (1.5, "a number"),
        ("[]", "a string"),
        ({}, "an object"),
        ({"meetings": {}}, "an object"),
        ({"other": []}, "an object"),
    ],
)
def test_body_is_not_a_list(data: Any, kind: str) -> None:
    """The error names the type of the body."""
    with pytest.raises(ResponseDecodeError) as caught:
        rows_of(Secret(data), NAMES, MEETINGS)
    assert str(caught.value) == (
        f"GET /meetings: 200 OK, but the body is {kind}, where a list was expected. "
        "Check the base URL and the path."
    )


def test_object() -> None:
    """An object is returned unchanged."""
    data = {"_id": "met_x"}
    assert data is object_of(Secret(data), MEETING_TYPE)


@pytest.mark.parametrize(("data", "kind"), [([{}], "an array"), (None, "null"), ("", "a string")])
def test_body_is_not_an_object(data: Any, kind: str) -> None:
    """The error names the type of the body, and has the status."""
    with pytest.raises(ResponseDecodeError) as caught:
        object_of(Secret(data), CREATE_HOOK, status_code=201)
    assert str(caught.value) == (
        f"POST /hooks: 201 Created, but the body is {kind}, where an object was expected. "
        "The request may have been processed anyway: check before you send it again."
    )
    assert caught.value.status_code == 201
