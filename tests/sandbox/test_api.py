"""The API on a real socket: every documented route and error, and the rate limit."""

import base64
import json
import socket
import threading
import time

import httpx
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._ratelimit import WindowKind

from .conftest import Connect

TEXT = "text/plain; charset=utf-8"
JSON = "application/json; charset=utf-8"


def test_me(sandbox: Sandbox, client: httpx.Client) -> None:
    """``GET /me`` returns the account's user."""
    response = client.get("/me")
    account = sandbox.accounts[0]
    assert (200, JSON) == (response.status_code, response.headers["content-type"])
    assert {"_id", "email", "publicIdentifier", "createdAt"} == set(response.json())
    assert account.user_id == response.json()["_id"]
    assert (account.email, account.public_identifier) == (
        response.json()["email"],
        response.json()["publicIdentifier"],
    )


def test_meetings(sandbox: Sandbox, client: httpx.Client) -> None:
    """``GET /meetings`` returns a single list, without pagination."""
    response = client.get("/meetings")
    assert (200, JSON) == (response.status_code, response.headers["content-type"])
    assert sandbox.meetings() == response.json()
    assert 12 == len(response.json())


def test_meetings_of_one_type(sandbox: Sandbox, client: httpx.Client) -> None:
    """``meetingTypeId`` filters the list; an unknown id returns an empty list."""
    wanted = sandbox.meeting_types()[1]["_id"]
    found = client.get("/meetings", params={"meetingTypeId": wanted}).json()
    assert [row for row in sandbox.meetings() if row["meetingTypeId"] == wanted] == found
    assert 3 == len(found)
    assert [] == client.get("/meetings", params={"meetingTypeId": "met_unknown"}).json()


def test_meeting_types(sandbox: Sandbox, client: httpx.Client) -> None:
    """Meeting types are listed and returned by id; an unknown id is a 404."""
    types = client.get("/meetingTypes").json()
    unknown = client.get("/meetingTypes/met_unknown")
    assert sandbox.meeting_types() == types
    assert types[2] == client.get(f"/meetingTypes/{types[2]['_id']}").json()
    assert (404, "meeting type not found", TEXT) == (
        unknown.status_code,
        unknown.text,
        unknown.headers["content-type"],
    )


def test_hook_is_created_and_deleted(sandbox: Sandbox, client: httpx.Client) -> None:
    """Deleting a hook returns a 204 without a body; deleting it again returns a 404."""
    wanted = {"targetUrl": "https://example.com/hook?token=x", "anyMeetingType": True}
    response = client.post("/hooks", json=wanted)
    hook = response.json()
    assert 200 == response.status_code
    assert wanted == {key: value for key, value in hook.items() if key not in {"_id", "createdAt"}}
    assert "hoo_" == hook["_id"][:4]
    assert [hook] == sandbox.hooks()

    deleted = client.delete(f"/hooks/{hook['_id']}")
    again = client.delete(f"/hooks/{hook['_id']}")
    assert (204, b"") == (deleted.status_code, deleted.content)
    assert (404, "hook not found") == (again.status_code, again.text)
    assert [] == sandbox.hooks()


def test_any_meeting_type_takes_precedence_over_an_id(sandbox: Sandbox, client: httpx.Client) -> None:
    """``anyMeetingType`` takes precedence over an id (documented)."""
    type_id = sandbox.meeting_types()[0]["_id"]
    wanted = {"targetUrl": "http://example.com", "meetingTypeId": type_id}
    for_one_type = client.post("/hooks", json=wanted).json()
    for_any_type = client.post("/hooks", json=wanted | {"anyMeetingType": True}).json()
    assert {"_id", "targetUrl", "meetingTypeId", "createdAt"} == set(for_one_type)
    assert {"_id", "targetUrl", "anyMeetingType", "createdAt"} == set(for_any_type)


NO_TARGET = "You must provide a targetUrl"
INVALID = "Invalid targetUrl"
NO_SCOPE = "You must provide either a meetingTypeId or anyMeetingType"


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"", 400, NO_TARGET),
        (b"{broken", 400, NO_TARGET),
        (b"[1]", 400, NO_TARGET),
        (b'{"anyMeetingType": true}', 400, NO_TARGET),
        (b'{"targetUrl": "", "anyMeetingType": true}', 400, NO_TARGET),
        (b'{"targetUrl": 7, "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "example.com", "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "ftp://example.com", "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "https://", "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "http://example.com:port", "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "http://example.com/\\ud800", "anyMeetingType": true}', 400, INVALID),
        (b'{"targetUrl": "https://example.com"}', 400, NO_SCOPE),
        (b'{"targetUrl": "https://example.com", "anyMeetingType": false}', 400, NO_SCOPE),
        (b'{"targetUrl": "https://example.com", "meetingTypeId": "met_x"}', 404, "meeting type not found"),
    ],
)
def test_invalid_hook_is_refused(
    client: httpx.Client, sandbox: Sandbox, body: bytes, status: int, error: str
) -> None:
    """The errors have the documented texts, in the order in which the fields are checked."""
    response = client.post("/hooks", content=body, headers={"content-type": "application/json"})
    assert (status, error, TEXT) == (response.status_code, response.text, response.headers["content-type"])
    assert [] == sandbox.hooks()


def test_duplicate_hook_is_refused(client: httpx.Client, sandbox: Sandbox) -> None:
    """A hook with the same target and meeting type is a 409, and the first hook remains."""
    wanted = {"targetUrl": "https://example.com", "anyMeetingType": True}
    hook = client.post("/hooks", json=wanted).json()
    again = client.post("/hooks", json=wanted)
    assert (409, "Duplicate hook") == (again.status_code, again.text)
    assert [hook] == sandbox.hooks()


@pytest.mark.parametrize(
    "path", ["/nothing", "/meetings/mee_x", "/meetings/", "/hooks/", "/meetingTypes/a/b", "/"]
)
def test_unknown_path_below_the_prefix(client: httpx.Client, path: str) -> None:
    """An unknown path is a plain-text 404, and counts toward the limit."""
    response = client.get(path)
    assert (404, "Not Found", TEXT) == (response.status_code, response.text, response.headers["content-type"])
    assert "19" == response.headers["x-ratelimit-remaining"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/me", "GET"),
        ("DELETE", "/meetings", "GET"),
        ("GET", "/hooks", "POST"),
        ("GET", "/hooks/x", "DELETE"),
    ],
)
def test_wrong_method(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    """A wrong method is a 405, including ``GET /hooks``, which does not exist."""
    response = client.request(method, path)
    assert (405, "Method Not Allowed") == (response.status_code, response.text)
    assert allowed == response.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        *(
            (method, path)
            for method in ("GET", "POST")
            for path in ("/me", "/api/lemcalendar/me", "/api/lemcal")
        ),
    ],
)
def test_path_outside_the_api(sandbox: Sandbox, client: httpx.Client, method: str, path: str) -> None:
    """Such a request returns a 200 with a web page, as on the real service; it is logged but not counted."""
    url = sandbox.base_url.removesuffix("/api/lemcal") + path
    response = client.request(method, url)
    assert (200, "text/html; charset=utf-8") == (response.status_code, response.headers["content-type"])
    assert response.text.startswith("<!doctype html>")
    assert "retry-after" not in response.headers
    (seen,) = sandbox.requests
    assert (method, path, 200, False) == (seen.method, seen.path, seen.status_code, seen.processed)


def basic(text: str) -> str:
    """Return the Basic authorization header for ``user:password``."""
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_invalid_credentials_are_refused(sandbox: Sandbox) -> None:
    """Missing, wrong or malformed credentials, and those of the sibling product, are a 401."""
    user_id, api_key = sandbox.user_id, sandbox.api_key
    good = basic(f"{user_id}:{api_key}")
    headers = [
        None,
        basic(f"{user_id}:wrong"),
        basic(f"usr_unknown:{api_key}"),
        basic(f":{api_key}"),
        basic(user_id),
        good.replace("Basic", "Bearer"),
        "Basic not-base64!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic",
    ]
    with httpx.Client(base_url=sandbox.base_url, trust_env=False) as client:
        for header in headers:
            response = client.get("/me", headers={} if header is None else {"authorization": header})
            assert (401, "Unauthorized", TEXT) == (
                response.status_code,
                response.text,
                response.headers["content-type"],
            )
        assert 401 == client.get("/me", headers={b"authorization": b"Basic \xfc"}).status_code
        assert 200 == client.get("/me", headers={"authorization": good.replace("Basic", "basic")}).status_code


def test_accounts_are_isolated(connect: Connect) -> None:
    """Each account has its own user, meetings, meeting types and hooks."""
    with Sandbox(accounts=2).serve() as sandbox:
        first, second = connect(sandbox), connect(sandbox, 1)
        wanted = {"targetUrl": "https://example.com", "anyMeetingType": True}
        hook = first.post("/hooks", json=wanted).json()

        assert sandbox.accounts[1].user_id == second.get("/me").json()["_id"]
        assert sandbox.meetings(1) == second.get("/meetings").json()
        assert 404 == second.get(f"/meetingTypes/{sandbox.meeting_types(0)[0]['_id']}").status_code
        assert 404 == second.delete(f"/hooks/{hook['_id']}").status_code
        assert 200 == second.post("/hooks", json=wanted).status_code
        assert {row["_id"] for row in sandbox.meetings(0)}.isdisjoint(
            row["_id"] for row in sandbox.meetings(1)
        )


def test_rate_limit(sandbox: Sandbox, client: httpx.Client) -> None:
    """20 requests in 2 s pass, across all routes; the 21st is a 429; every response has the headers."""
    routes = ["/me", "/meetings", "/meetingTypes", "/nothing", "/meetingTypes/met_x"]
    responses = [client.get(routes[number % 5]) for number in range(22)]
    assert [429, 429] == [response.status_code for response in responses[20:]]
    assert 429 not in [response.status_code for response in responses[:20]]
    assert ("Too Many Requests", TEXT) == (responses[20].text, responses[20].headers["content-type"])
    assert [*range(19, -1, -1), 0, 0] == [
        int(response.headers["x-ratelimit-remaining"]) for response in responses
    ]
    for response in responses:
        assert "20" == response.headers["x-ratelimit-limit"]
        assert 0 < float(response.headers["retry-after"]) <= 2
        assert response.headers["x-ratelimit-reset"].endswith(" GMT+0100 (Central European Standard Time)")
        assert response.headers["date"].endswith(" GMT")
    assert [True] * 20 + [False] * 2 == [seen.processed for seen in sandbox.requests]


def test_rate_limit_is_counted_per_credential(connect: Connect) -> None:
    """Wrong credentials are counted too, separately from valid ones."""
    with Sandbox(accounts=2, limit=1, period=60).serve() as sandbox:
        wrong = httpx.BasicAuth(sandbox.user_id, "wrong")
        assert [401, 429] == [connect(sandbox).get("/me", auth=wrong).status_code for _ in range(2)]
        assert [200, 429] == [connect(sandbox).get("/me").status_code for _ in range(2)]
        assert [200, 429] == [connect(sandbox, 1).get("/me").status_code for _ in range(2)]


@pytest.mark.parametrize(("window", "statuses"), [("fixed", [200, 200, 200]), ("sliding", [200, 200, 429])])
def test_window_kinds_with_an_injected_clock(
    connect: Connect, window: WindowKind, statuses: list[int]
) -> None:
    """A burst across the boundary of two fixed windows can double; a sliding log prevents this."""
    now = 0.0
    with Sandbox(limit=2, period=2.0, window=window, clock=lambda: now).serve() as sandbox:
        client = connect(sandbox)
        found: list[int] = []
        for now in (0.0, 1.9, 2.0):
            found.append(client.get("/me").status_code)
            if now == 2.0:
                found[-1] = client.get("/me").status_code
        assert statuses == found
        assert [0.0, 1.9, 2.0, 2.0] == [seen.at for seen in sandbox.requests]


def test_without_a_rate_limit(connect: Connect) -> None:
    """There are no 429s and no rate limit headers."""
    with Sandbox(limit=None).serve() as sandbox:
        responses = [connect(sandbox).get("/me") for _ in range(30)]
    assert {200} == {response.status_code for response in responses}
    assert not {
        name for response in responses for name in response.headers if "ratelimit" in name or "retry" in name
    }


def test_latency_is_a_round_trip(connect: Connect) -> None:
    """Half of the latency passes before a request is counted, half after."""
    with Sandbox(latency=(0.1, 0.1), clock=time.monotonic).serve() as sandbox:
        client = connect(sandbox)
        client.get("/me")
        started = time.monotonic()
        response = client.get("/me")
        ended = time.monotonic()
        counted = sandbox.requests[-1].at
    assert 200 == response.status_code
    assert 0.049 <= counted - started
    assert 0.049 <= ended - counted


def test_latency_is_determined_by_the_seed() -> None:
    """The same seed draws the same latencies, within the bounds."""

    def draws(seed: int) -> list[float]:
        sandbox = Sandbox(latency=(0.04, 0.2), seed=seed)
        return [sandbox._round_trip() for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)
    assert all(0.04 <= draw <= 0.2 for draw in draws(7))
    assert 0.1 < max(draws(7)) - min(draws(7))


def test_request_log(sandbox: Sandbox, client: httpx.Client) -> None:
    """The log contains the request and its headers, but no API key."""
    client.get("/meetings?meetingTypeId=met_x", headers={"user-agent": "me/1", "cookie": "a=b"})
    client.get("/me", auth=(sandbox.user_id, "wrong"))
    client.get("/me", auth=("usr_unknown", sandbox.api_key))
    listed, wrong, unknown = sandbox.requests
    assert ("GET", "/meetings", "meetingTypeId=met_x", sandbox.user_id, 200, True) == (
        listed.method,
        listed.path,
        listed.query,
        listed.user_id,
        listed.status_code,
        listed.processed,
    )
    assert ("me/1", "a=b") == (listed.headers["user-agent"], listed.headers["cookie"])
    assert (sandbox.user_id, 401, False) == (wrong.user_id, wrong.status_code, wrong.processed)
    assert (None, 401) == (unknown.user_id, unknown.status_code)
    text = repr(sandbox.requests) + repr(sandbox.accounts)
    assert sandbox.api_key not in text
    assert base64.b64encode(f"{sandbox.user_id}:{sandbox.api_key}".encode()).decode() not in text


def test_concurrent_clients(sandbox: Sandbox) -> None:
    """Of 60 concurrent requests, 20 pass."""
    statuses: list[int] = []
    gate = threading.Barrier(6)

    def send_requests() -> None:
        auth = (sandbox.user_id, sandbox.api_key)
        with httpx.Client(base_url=sandbox.base_url, auth=auth, trust_env=False) as client:
            gate.wait()
            statuses.extend(client.get("/me").status_code for _ in range(10))

    threads = [threading.Thread(target=send_requests) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [200] * 20 + [429] * 40 == sorted(statuses)
    assert 60 == len(sandbox.requests)


def test_client_disconnects_during_its_request(sandbox: Sandbox, client: httpx.Client) -> None:
    """The request is logged without a response, and the sandbox continues to serve others."""
    port = int(sandbox.base_url.split(":")[2].split("/")[0])
    auth = basic(f"{sandbox.user_id}:{sandbox.api_key}")
    with socket.create_connection(("127.0.0.1", port)) as raw:
        lines = [
            "POST /api/lemcal/hooks HTTP/1.1",
            "host: x",
            f"authorization: {auth}",
            "content-length: 9",
            "",
            "",
        ]
        raw.sendall("\r\n".join(lines).encode() + b"{")
        while not sandbox.requests:
            time.sleep(0.001)
    assert 200 == client.get("/me").status_code
    assert (None, False) == (sandbox.requests[0].status_code, sandbox.requests[0].processed)


def test_demo_data_is_sent_as_utf_8(client: httpx.Client) -> None:
    """Non-ASCII text is encoded as UTF-8."""
    response = client.get("/meetings")
    assert json.loads(response.content.decode("utf-8")) == response.json()
