"""Each fault, as a client sees it on a real socket."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from lemcal_async import errors
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox.faults import Fault, FaultPlan

from .conftest import Connect

TEXT = "text/plain; charset=utf-8"
JSON = "application/json; charset=utf-8"
HTML = "text/html; charset=utf-8"
HOOK = {"targetUrl": "https://example.com", "anyMeetingType": True}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (faults.status(500), (500, TEXT, "Internal Server Error")),
        (faults.status(400, "No API key provided", content_type=None), (400, None, "No API key provided")),
        (faults.status(200, "{oops", content_type=JSON), (200, JSON, "{oops")),
        (faults.json_error(402, "Plan"), (402, JSON, '{"error":"Plan"}')),
        (faults.json_error(402, "Plan", error_code="P"), (402, JSON, '{"error":"Plan","code":"P"}')),
        (faults.unsuccessful(500, "No"), (500, JSON, '{"success":false,"error":"No"}')),
        (
            faults.unsuccessful(500, "No", error_code="N"),
            (500, JSON, '{"success":false,"error":{"code":"N","message":"No"}}'),
        ),
        (faults.not_ok(403, "Blocked"), (403, JSON, '{"ok":false,"message":"Blocked"}')),
        (faults.empty_200(), (200, None, "")),
        (faults.empty_string_200(), (200, JSON, '""')),
        (faults.json({"data": []}), (200, JSON, '{"data":[]}')),
        (faults.status(204), (204, TEXT, "")),
    ],
)
def test_faults_that_replace_the_response(
    client: httpx.Client, sandbox: Sandbox, fault: Fault, expected: tuple[int, str | None, str]
) -> None:
    """Such a fault applies once; the request is counted and does not change the state."""
    sandbox.inject(fault)
    response = client.post("/hooks", json=HOOK)
    assert expected == (response.status_code, response.headers.get("content-type"), response.text)
    assert "19" == response.headers["x-ratelimit-remaining"]
    assert [] == sandbox.hooks()
    assert [(expected[0], False)] == [(seen.status_code, seen.processed) for seen in sandbox.requests]
    assert 200 == client.post("/hooks", json=HOOK).status_code


@pytest.mark.parametrize(
    ("fault", "status"),
    [(faults.html_200(), 200), (faults.html_error(403), 403), (faults.html_error(522), 522)],
)
def test_html(sandbox: Sandbox, client: httpx.Client, fault: Fault, status: int) -> None:
    """The service's page for a wrong URL, and the CDN's error page."""
    sandbox.inject(fault)
    response = client.get("/me")
    assert (status, HTML) == (response.status_code, response.headers["content-type"])
    assert "<html" in response.text


def test_html_error_lacks_the_service_s_headers(sandbox: Sandbox, client: httpx.Client) -> None:
    """The CDN's error page lacks the headers of the rate limit, because it does not come from the service."""
    sandbox.inject(faults.html_error(503))
    headers = client.get("/me").headers
    assert [] == [name for name in headers if name.startswith("x-ratelimit") or name == "retry-after"]


@pytest.mark.anyio
async def test_post_is_not_retried_after_html_error(sandbox: Sandbox) -> None:
    """The service may have processed a POST to which the CDN responds, so the client sends it only once."""
    sandbox.inject(faults.html_error(503))
    async with sandbox.client() as lemcal:
        with pytest.raises(errors.ServerError):
            await lemcal.hooks.create("https://example.com", any_meeting_type=True)
    assert [503] == [seen.status_code for seen in sandbox.requests]


@pytest.mark.parametrize(
    "retry_after",
    [
        "1.283",
        "2",
        "2, Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)",
        "86400",
        "soon",
        "",
    ],
)
def test_too_many_requests(sandbox: Sandbox, client: httpx.Client, retry_after: str) -> None:
    """The header is sent verbatim, and no other header contradicts it."""
    sandbox.inject(faults.too_many_requests(retry_after))
    response = client.get("/me")
    assert (429, "Too Many Requests") == (response.status_code, response.text)
    assert retry_after == response.headers["retry-after"]
    assert "0" == response.headers["x-ratelimit-remaining"]
    assert "x-ratelimit-reset" not in response.headers
    assert [429] == [seen.status_code for seen in sandbox.requests]


@pytest.mark.parametrize(("retry_after", "header"), [(3, "3"), (0.5, "0.5")])
def test_too_many_requests_with_a_number(
    sandbox: Sandbox, client: httpx.Client, retry_after: float, header: str
) -> None:
    """A number is converted to text."""
    sandbox.inject(faults.too_many_requests(retry_after))
    assert header == client.get("/me").headers["retry-after"]


def test_too_many_requests_without_the_header(sandbox: Sandbox, client: httpx.Client) -> None:
    """None omits the header."""
    sandbox.inject(faults.too_many_requests(None))
    assert "retry-after" not in client.get("/me").headers


def test_headers_override_those_of_every_response(sandbox: Sandbox, client: httpx.Client) -> None:
    """The fault's headers override the usual ones; a value of None omits a header."""
    sandbox.inject(
        faults.status(503, headers={"Retry-After": "7", "X-RateLimit-Limit": None, "Set-Cookie": "a=b"})
    )
    headers = client.get("/me").headers
    assert ("7", "a=b", "19") == (
        headers["retry-after"],
        headers["set-cookie"],
        headers["x-ratelimit-remaining"],
    )
    assert "x-ratelimit-limit" not in headers


def test_redirect(sandbox: Sandbox, client: httpx.Client) -> None:
    """A client that follows the redirect is logged at the new path."""
    sandbox.inject(faults.redirect("/api/lemcal/meetings"))
    response = client.get("/me")
    assert (302, "/api/lemcal/meetings") == (response.status_code, response.headers["location"])
    sandbox.inject(faults.redirect("/elsewhere", 308))
    client.get("/me", follow_redirects=True)
    assert ["/me", "/me", "/elsewhere"] == [seen.path for seen in sandbox.requests]


def test_slow(sandbox: Sandbox, client: httpx.Client) -> None:
    """The request is processed immediately; the response is delayed."""
    sandbox.inject(faults.slow(0.2))
    started = time.monotonic()
    assert 200 == client.post("/hooks", json=HOOK).status_code
    assert 0.2 <= time.monotonic() - started
    sandbox.inject(faults.slow(60))
    with pytest.raises(httpx.ReadTimeout):
        client.post("/hooks", json=HOOK | {"targetUrl": "https://example.org"}, timeout=0.1)
    assert 2 == len(sandbox.hooks())
    assert [(200, True), (None, True)] == [(seen.status_code, seen.processed) for seen in sandbox.requests]


def test_truncated(sandbox: Sandbox, client: httpx.Client) -> None:
    """The response announces more than it sends, even for a status without a body."""
    sandbox.inject(faults.truncated(), times=2)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        client.post("/hooks", json=HOOK)
    (hook,) = sandbox.hooks()
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        client.delete(f"/hooks/{hook['_id']}")
    assert [] == sandbox.hooks()
    assert [(200, True), (204, True)] == [(seen.status_code, seen.processed) for seen in sandbox.requests]


def test_reset_before_processing(sandbox: Sandbox, client: httpx.Client) -> None:
    """The request has no effect and is not counted, but it is logged."""
    sandbox.inject(faults.reset_before_processing())
    with pytest.raises(httpx.ReadError):
        client.post("/hooks", json=HOOK)
    assert [] == sandbox.hooks()
    assert [(None, False)] == [(seen.status_code, seen.processed) for seen in sandbox.requests]
    assert "19" == client.get("/me").headers["x-ratelimit-remaining"]


def test_reset_after_processing(sandbox: Sandbox, client: httpx.Client) -> None:
    """The request is processed and counted, and the client gets no response."""
    sandbox.inject(faults.reset_after_processing())
    with pytest.raises(httpx.ReadError):
        client.post("/hooks", json=HOOK)
    assert 1 == len(sandbox.hooks())
    assert [(None, True)] == [(seen.status_code, seen.processed) for seen in sandbox.requests]
    assert "18" == client.get("/me").headers["x-ratelimit-remaining"]


def test_broken_connections_are_not_logged_as_errors(
    sandbox: Sandbox, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The server logs no error for an injected fault."""
    for fault in (faults.reset_before_processing(), faults.reset_after_processing(), faults.truncated()):
        sandbox.inject(fault)
        with pytest.raises(httpx.TransportError):
            client.get("/me")
    assert [] == [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_faults_match_method_and_path(sandbox: Sandbox, client: httpx.Client) -> None:
    """Faults match requests by method and path, ``times`` times, in the order of injection."""
    sandbox.inject(faults.status(500), times=2, path="/meetings")
    sandbox.inject(faults.status(501), method="delete", path="/hooks/*")
    sandbox.inject(faults.status(503), path="/meetings")
    assert 200 == client.get("/me").status_code
    assert 200 == client.post("/hooks", json=HOOK).status_code
    assert [500, 500, 503, 200] == [client.get("/meetings").status_code for _ in range(4)]
    assert [501, 404] == [client.delete("/hooks/hoo_x").status_code for _ in range(2)]


def test_clear_faults(sandbox: Sandbox, client: httpx.Client) -> None:
    """Pending faults are dropped."""
    sandbox.inject(faults.status(500), times=5)
    assert 500 == client.get("/me").status_code
    sandbox.clear_faults()
    assert 200 == client.get("/me").status_code


def test_faults_take_precedence_over_the_limit(connect: Connect) -> None:
    """A fault also applies to a request over the limit."""
    with Sandbox(limit=1, period=60).serve() as sandbox:
        client = connect(sandbox)
        client.get("/me")
        sandbox.inject(faults.status(500))
        assert [500, 429] == [client.get("/me").status_code for _ in range(2)]


@pytest.mark.parametrize("wrong", [faults.html_200, "html_200", None])
def test_non_faults_are_refused(wrong: Any) -> None:
    """Passing a function that was not called raises TypeError."""
    with pytest.raises(TypeError, match="not a fault"):
        Sandbox().inject(wrong)


def test_impossible_faults_are_refused() -> None:
    """Zero times, an invalid status code, and a body that HTTP forbids are refused."""
    with pytest.raises(ValueError, match="times"):
        Sandbox().inject(faults.empty_200(), times=0)
    with pytest.raises(ValueError, match="status"):
        faults.status(100, "")
    with pytest.raises(ValueError, match="204 has no body"):
        faults.status(204, "something")


UNTYPED: Any = faults


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: faults.slow(-1), "seconds must be at least 0 seconds, not -1"),
        (lambda: faults.slow(float("nan")), "seconds must be at least 0 seconds, not nan"),
        (lambda: UNTYPED.slow("3"), "seconds must be a number of seconds, not '3'"),
        (lambda: faults.too_many_requests(-1), "retry_after must be at least 0 seconds"),
        (lambda: UNTYPED.too_many_requests([]), "retry_after must be a number of seconds"),
        (lambda: faults.too_many_requests("1\r\nx: y"), "Retry-After contains characters"),
        (lambda: UNTYPED.status("503"), "code must be a whole number, not '503'"),
        (lambda: faults.status(600), "code must be a status code from 200 to 599, not 600"),
        (lambda: UNTYPED.status(500, 5), "body must be a string, not 5"),
        (lambda: UNTYPED.status(500, content_type=5), "content_type must be a string, not 5"),
        (lambda: UNTYPED.status(500, headers=["x"]), "headers must be a mapping"),
        (lambda: UNTYPED.status(500, headers={"x": 5}), "the header x must be a string, not 5"),
        (lambda: faults.status(500, headers={"x y": "z"}), "'x y', which is not a header's name"),
        (lambda: UNTYPED.json_error("400", "x"), "code must be a whole number"),
        (lambda: UNTYPED.json_error(400, 5), "error must be a string, not 5"),
        (lambda: UNTYPED.json_error(400, "x", error_code=5), "error_code must be a string, not 5"),
        (lambda: UNTYPED.unsuccessful(400, 5), "error must be a string, not 5"),
        (lambda: UNTYPED.not_ok(400, 5), "message must be a string, not 5"),
        (lambda: UNTYPED.html_error(4.5), "code must be a whole number, not 4.5"),
        (lambda: faults.redirect("/x", 200), "code must be a status code from 300 to 399"),
        (lambda: UNTYPED.redirect(5), "location must be a string, not 5"),
        (lambda: faults.json(object()), "not JSON serializable"),
    ],
)
def test_invalid_options_are_refused(make: Callable[[], Fault], message: str) -> None:
    """Options that make no sense are refused when the fault is created."""
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 1.5}, "times must be a whole number"),
        ({"times": "2"}, "times must be a whole number, not '2'"),
        ({"method": 5}, "method must be a string"),
        ({"path": 5}, "path must be a string"),
        ({"path": "meetings"}, "path must start with a slash, such as /meetings or /hooks/\\*"),
        ({"path": "/api/lemcal/meetings"}, "path is relative to the API prefix; omit /api/lemcal"),
    ],
)
def test_faults_that_could_never_apply_are_refused(options: dict[str, Any], message: str) -> None:
    """Options of inject() that match no request are refused."""
    with pytest.raises((TypeError, ValueError), match=message):
        Sandbox().inject(faults.empty_200(), **options)


def test_faults_compare_by_value() -> None:
    """Faults compare by value."""
    assert faults.slow(1) == faults.slow(1) != faults.slow(2)
    assert faults.reset_before_processing() != faults.reset_after_processing()
    assert None is FaultPlan().take("GET", "/me")
