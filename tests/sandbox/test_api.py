"""The API on a real socket: every documented route, every documented error, and the limit."""

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
    """``GET /me`` is the account's user."""
    answer = client.get("/me")
    account = sandbox.accounts[0]
    assert (200, JSON) == (answer.status_code, answer.headers["content-type"])
    assert {"_id", "email", "publicIdentifier", "createdAt"} == set(answer.json())
    assert account.user_id == answer.json()["_id"]
    assert (account.email, account.public_identifier) == (
        answer.json()["email"],
        answer.json()["publicIdentifier"],
    )


def test_meetings(sandbox: Sandbox, client: httpx.Client) -> None:
    """``GET /meetings`` is one plain list, without pages."""
    answer = client.get("/meetings")
    assert (200, JSON) == (answer.status_code, answer.headers["content-type"])
    assert sandbox.meetings() == answer.json()
    assert 12 == len(answer.json())


def test_meetings_of_one_type(sandbox: Sandbox, client: httpx.Client) -> None:
    """``meetingTypeId`` filters; an unknown one leaves an empty list."""
    wanted = sandbox.meeting_types()[1]["_id"]
    found = client.get("/meetings", params={"meetingTypeId": wanted}).json()
    assert [row for row in sandbox.meetings() if row["meetingTypeId"] == wanted] == found
    assert 3 == len(found)
    assert [] == client.get("/meetings", params={"meetingTypeId": "met_unknown"}).json()


def test_meeting_types(sandbox: Sandbox, client: httpx.Client) -> None:
    """The list, one of it by its id, and the error for an unknown one."""
    types = client.get("/meetingTypes").json()
    unknown = client.get("/meetingTypes/met_unknown")
    assert sandbox.meeting_types() == types
    assert types[2] == client.get(f"/meetingTypes/{types[2]['_id']}").json()
    assert (404, "meeting type not found", TEXT) == (
        unknown.status_code,
        unknown.text,
        unknown.headers["content-type"],
    )


def test_a_hook_is_created_and_deleted(sandbox: Sandbox, client: httpx.Client) -> None:
    """The answer to the deletion is a 204 without a body; a second one is a 404."""
    wanted = {"targetUrl": "https://example.com/hook?token=x", "anyMeetingType": True}
    answer = client.post("/hooks", json=wanted)
    hook = answer.json()
    assert 200 == answer.status_code
    assert wanted == {key: value for key, value in hook.items() if key not in {"_id", "createdAt"}}
    assert "hoo_" == hook["_id"][:4]
    assert [hook] == sandbox.hooks()

    deleted = client.delete(f"/hooks/{hook['_id']}")
    again = client.delete(f"/hooks/{hook['_id']}")
    assert (204, b"") == (deleted.status_code, deleted.content)
    assert (404, "hook not found") == (again.status_code, again.text)
    assert [] == sandbox.hooks()


def test_any_meeting_type_wins_over_an_id(sandbox: Sandbox, client: httpx.Client) -> None:
    """``anyMeetingType`` takes precedence over an id (documented)."""
    type_id = sandbox.meeting_types()[0]["_id"]
    wanted = {"targetUrl": "http://example.com", "meetingTypeId": type_id}
    of_one_type = client.post("/hooks", json=wanted).json()
    of_any_type = client.post("/hooks", json=wanted | {"anyMeetingType": True}).json()
    assert {"_id", "targetUrl", "meetingTypeId", "createdAt"} == set(of_one_type)
    assert {"_id", "targetUrl", "anyMeetingType", "createdAt"} == set(of_any_type)


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
def test_hooks_that_are_refused(
    client: httpx.Client, sandbox: Sandbox, body: bytes, status: int, error: str
) -> None:
    """The documented texts, in the order in which the fields are checked."""
    answer = client.post("/hooks", content=body, headers={"content-type": "application/json"})
    assert (status, error, TEXT) == (answer.status_code, answer.text, answer.headers["content-type"])
    assert [] == sandbox.hooks()


def test_a_duplicate_hook(client: httpx.Client, sandbox: Sandbox) -> None:
    """The same target for the same meetings is a 409, and the first hook stays."""
    wanted = {"targetUrl": "https://example.com", "anyMeetingType": True}
    hook = client.post("/hooks", json=wanted).json()
    again = client.post("/hooks", json=wanted)
    assert (409, "Duplicate hook") == (again.status_code, again.text)
    assert [hook] == sandbox.hooks()


@pytest.mark.parametrize(
    "path", ["/nothing", "/meetings/mee_x", "/meetings/", "/hooks/", "/meetingTypes/a/b", "/"]
)
def test_a_wrong_path_below_the_prefix(client: httpx.Client, path: str) -> None:
    """It is a 404 in plain text, and it counts."""
    answer = client.get(path)
    assert (404, "Not Found", TEXT) == (answer.status_code, answer.text, answer.headers["content-type"])
    assert "19" == answer.headers["x-ratelimit-remaining"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/me", "GET"),
        ("DELETE", "/meetings", "GET"),
        ("GET", "/hooks", "POST"),
        ("GET", "/hooks/x", "DELETE"),
    ],
)
def test_a_wrong_method(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    """It is a 405, also for the list of hooks, which does not exist."""
    answer = client.request(method, path)
    assert (405, "Method Not Allowed") == (answer.status_code, answer.text)
    assert allowed == answer.headers["allow"]


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
def test_a_path_outside_of_the_api(sandbox: Sandbox, client: httpx.Client, method: str, path: str) -> None:
    """It is a 200 with a web page, as at the real service; it does not count, but it is logged."""
    url = sandbox.base_url.removesuffix("/api/lemcal") + path
    answer = client.request(method, url)
    assert (200, "text/html; charset=utf-8") == (answer.status_code, answer.headers["content-type"])
    assert answer.text.startswith("<!doctype html>")
    assert "retry-after" not in answer.headers
    (seen,) = sandbox.requests
    assert (method, path, 200, False) == (seen.method, seen.path, seen.status_code, seen.processed)


def basic(text: str) -> str:
    """Return the Basic header for ``user:password``."""
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_credentials_that_are_refused(sandbox: Sandbox) -> None:
    """Missing, wrong, malformed, and the sibling product's form are all 401."""
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
            answer = client.get("/me", headers={} if header is None else {"authorization": header})
            assert (401, "Unauthorized", TEXT) == (
                answer.status_code,
                answer.text,
                answer.headers["content-type"],
            )
        assert 401 == client.get("/me", headers={b"authorization": b"Basic \xfc"}).status_code
        assert 200 == client.get("/me", headers={"authorization": good.replace("Basic", "basic")}).status_code


def test_accounts_see_only_their_own(connect: Connect) -> None:
    """Each account has its own user, meetings, types and hooks."""
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


def test_the_limit(sandbox: Sandbox, client: httpx.Client) -> None:
    """20 in 2 s pass, over all routes; the 21st is a 429; every response has the headers."""
    routes = ["/me", "/meetings", "/meetingTypes", "/nothing", "/meetingTypes/met_x"]
    answers = [client.get(routes[number % 5]) for number in range(22)]
    assert [429, 429] == [answer.status_code for answer in answers[20:]]
    assert 429 not in [answer.status_code for answer in answers[:20]]
    assert ("Too Many Requests", TEXT) == (answers[20].text, answers[20].headers["content-type"])
    assert [*range(19, -1, -1), 0, 0] == [int(answer.headers["x-ratelimit-remaining"]) for answer in answers]
    for answer in answers:
        assert "20" == answer.headers["x-ratelimit-limit"]
        assert 0 < float(answer.headers["retry-after"]) <= 2
        assert answer.headers["x-ratelimit-reset"].endswith(" GMT+0100 (Central European Standard Time)")
        assert answer.headers["date"].endswith(" GMT")
    assert [True] * 20 + [False] * 2 == [seen.processed for seen in sandbox.requests]


def test_the_limit_is_counted_per_credential(connect: Connect) -> None:
    """Wrong credentials count too, separately from right ones."""
    with Sandbox(accounts=2, limit=1, period=60).serve() as sandbox:
        wrong = httpx.BasicAuth(sandbox.user_id, "wrong")
        assert [401, 429] == [connect(sandbox).get("/me", auth=wrong).status_code for _ in range(2)]
        assert [200, 429] == [connect(sandbox).get("/me").status_code for _ in range(2)]
        assert [200, 429] == [connect(sandbox, 1).get("/me").status_code for _ in range(2)]


@pytest.mark.parametrize(("window", "statuses"), [("fixed", [200, 200, 200]), ("sliding", [200, 200, 429])])
def test_windows_by_the_clock(connect: Connect, window: WindowKind, statuses: list[int]) -> None:
    """At the end of a fixed window a burst can double; a sliding log does not let it."""
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


def test_without_a_limit(connect: Connect) -> None:
    """There are no 429s and no rate limit headers."""
    with Sandbox(limit=None).serve() as sandbox:
        answers = [connect(sandbox).get("/me") for _ in range(30)]
    assert {200} == {answer.status_code for answer in answers}
    assert not {
        name for answer in answers for name in answer.headers if "ratelimit" in name or "retry" in name
    }


def test_latency_is_a_round_trip(connect: Connect) -> None:
    """Half of it passes before a request is counted, half after."""
    with Sandbox(latency=(0.1, 0.1), clock=time.monotonic).serve() as sandbox:
        client = connect(sandbox)
        client.get("/me")
        started = time.monotonic()
        answer = client.get("/me")
        ended = time.monotonic()
        counted = sandbox.requests[-1].at
    assert 200 == answer.status_code
    assert 0.049 <= counted - started
    assert 0.049 <= ended - counted


def test_latency_is_the_same_for_the_same_seed() -> None:
    """The same seed draws the same latencies, within the bounds."""

    def draws(seed: int) -> list[float]:
        sandbox = Sandbox(latency=(0.04, 0.2), seed=seed)
        return [sandbox._round_trip() for _ in range(50)]

    assert draws(7) == draws(7) != draws(8)
    assert all(0.04 <= draw <= 0.2 for draw in draws(7))
    assert 0.1 < max(draws(7)) - min(draws(7))


def test_the_log_of_requests(sandbox: Sandbox, client: httpx.Client) -> None:
    """The log has the request and its headers, but no key."""
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


def test_many_clients_at_once(sandbox: Sandbox) -> None:
    """Of 60 concurrent requests, 20 pass."""
    statuses: list[int] = []
    gate = threading.Barrier(6)

    def ask() -> None:
        auth = (sandbox.user_id, sandbox.api_key)
        with httpx.Client(base_url=sandbox.base_url, auth=auth, trust_env=False) as client:
            gate.wait()
            statuses.extend(client.get("/me").status_code for _ in range(10))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [200] * 20 + [429] * 40 == sorted(statuses)
    assert 60 == len(sandbox.requests)


def test_a_client_that_leaves_in_the_middle_of_its_request(sandbox: Sandbox, client: httpx.Client) -> None:
    """It is logged without a response, and does no harm."""
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


def test_demo_data_is_valid_json_all_the_way(client: httpx.Client) -> None:
    """Text beyond ASCII travels as UTF-8."""
    answer = client.get("/meetings")
    assert json.loads(answer.content.decode("utf-8")) == answer.json()
