"""The page without a browser: its routes, its live stream, and its protection from other sites."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any, Self

import anyio
import httpx
import pytest

from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox._html import FAULTS
from lemcal_async.sandbox._log import SeenRequest

from .conftest import Connect, Receiver


@pytest.fixture
def browser(sandbox: Sandbox) -> Iterator[httpx.Client]:
    """Return a client for the page."""
    with httpx.Client(base_url=sandbox.url, trust_env=False) as browser:
        yield browser


class Links(HTMLParser):
    """Collects a page's links and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect links and ids."""
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]
        self.ids += [value for name, value in attrs if name == "id" and value]


def test_index(sandbox: Sandbox, browser: httpx.Client) -> None:
    """The page shows the account and its data, loads only its own files, and is not logged."""
    response = browser.get("/")
    assert (200, "text/html; charset=utf-8") == (response.status_code, response.headers["content-type"])
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    for text in (sandbox.base_url, f"LEMCAL_API_KEY={sandbox.api_key}", sandbox.meetings()[0]["_id"]):
        assert text in response.text
    links = Links()
    links.feed(response.text)
    assert ["_sandbox/static/icon.svg", "_sandbox/static/page.css", "_sandbox/static/page.js"] == links.loads
    assert len(links.ids) == len(set(links.ids))
    for name in links.loads:
        loaded = browser.get(f"/{name}")
        assert 200 == loaded.status_code
        assert not re.search(r"https?://(?!www\.w3\.org/)", loaded.text)
    assert 404 == browser.get("/_sandbox/static/_page.py").status_code
    assert [] == sandbox.requests


def test_index_before_the_first_request(sandbox: Sandbox, browser: httpx.Client) -> None:
    """The page shows commands to try, with valid credentials."""
    text = browser.get("/").text
    command = re.search(r"curl -u (\S+) (\S+)</pre>", text)
    assert command is not None
    user, _, key = command[1].partition(":")
    assert 200 == httpx.get(command[2], auth=(user, key), trust_env=False).status_code
    assert 'id="no-requests" hidden' in browser.get("/").text
    assert sandbox.requests


def test_selecting_an_account(connect: Connect) -> None:
    """The page shows one account at a time; an unknown number selects the first."""
    with Sandbox(accounts=2).serve() as sandbox:
        client = connect(sandbox)
        second = client.get(f"{sandbox.url}/?account=1").text
        assert sandbox.meetings(1)[0]["_id"] in second
        assert sandbox.meetings(0)[0]["_id"] not in second
        for unknown in ("2", "-1", "x"):
            assert sandbox.meetings(0)[0]["_id"] in client.get(f"{sandbox.url}/?account={unknown}").text


def test_values_are_escaped(sandbox: Sandbox, browser: httpx.Client, client: httpx.Client) -> None:
    """Values from bookings, hooks and requests are escaped."""
    attack = "<img src=x onerror=alert(1)>\"'"
    sandbox.book(meetingTypeName=attack, providedInfos={"email": attack})
    sandbox.add_hook(f"http://127.0.0.1:1/{attack}".replace(" ", "%20"))
    client.get(f"/{attack}", params={"q": attack}, headers={"user-agent": attack})
    number = sandbox.requests[-1].number
    texts = [
        browser.get("/").text,
        browser.get(f"/_sandbox/page/requests/{number}").text,
        *browser.get("/_sandbox/page/state").json().values(),
    ]
    for text in texts:
        assert "<img" not in text
    assert "&lt;img" in texts[0]


def test_no_credentials_are_shown(sandbox: Sandbox, browser: httpx.Client, client: httpx.Client) -> None:
    """Neither API keys nor the tokens of hooks appear in bodies, lists, details or JSON."""
    target = {"targetUrl": "http://127.0.0.1:1/x?token=hush", "anyMeetingType": True}
    assert 200 == client.post("/hooks", json=target).status_code
    assert 409 == client.post("/hooks", json=target).status_code
    sandbox.book()
    sandbox.wait_for_deliveries(1)
    for path in (
        "/",
        "/_sandbox/page/state",
        "/_sandbox/page/requests/1",
        "/_sandbox/page/requests/2",
        "/_sandbox/requests",
        "/_sandbox/deliveries",
    ):
        text = browser.get(path).text
        assert "hush" not in text
        assert "basic " not in text.lower()
    details = browser.get("/_sandbox/page/requests/2").text
    assert "http://127.0.0.1:1/x?..." in details
    assert "Duplicate hook" in details


def test_request_details(sandbox: Sandbox, browser: httpx.Client, client: httpx.Client) -> None:
    """The details contain the headers and both bodies, with JSON pretty-printed."""
    client.get("/me", headers={"user-agent": "me/1"})
    details = browser.get("/_sandbox/page/requests/1").text
    assert "<dt>user-agent</dt><dd>me/1</dd>" in details
    assert f"&quot;_id&quot;: &quot;{sandbox.user_id}&quot;" in details
    assert "no longer in the log" in browser.get("/_sandbox/page/requests/7").text


def test_older_rows(sandbox: Sandbox, browser: httpx.Client) -> None:
    """The page starts with the latest requests; older ones load 1,000 at a time."""
    for _ in range(1_500):
        sandbox._log.add_request(SeenRequest(0, "GET", "/me", "", None, {}, status_code=200, seconds=0))
    first = [int(number) for number in re.findall(r'<li id="r(\d+)"', browser.get("/").text)]
    assert list(range(1500, 1200, -1)) == first
    text = browser.get("/_sandbox/page/requests", params={"before": 1201}).text
    assert list(range(1200, 200, -1)) == [int(number) for number in re.findall(r'<li id="r(\d+)"', text)]
    assert "" == browser.get("/_sandbox/page/requests", params={"before": 1}).text
    assert "" == browser.get("/_sandbox/page/requests").text


class Stream:
    """The live stream, read event by event."""

    def __init__(self, sandbox: Sandbox, position: str = "", last: str | None = None) -> None:
        self._stack = contextlib.ExitStack()
        client = self._stack.enter_context(httpx.Client(trust_env=False, timeout=30))
        headers = {} if last is None else {"last-event-id": last}
        url = f"{sandbox.url}/_sandbox/events?after={position}"
        response = self._stack.enter_context(client.stream("GET", url, headers=headers))
        assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
        self._lines = response.iter_lines()
        self.last_id = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def next(self) -> tuple[str, Any]:
        """Return the next event and its data."""
        name, data = "", ""
        for line in self._lines:
            field, _, value = line.partition(": ")
            if field == "id":
                self.last_id = value
            elif field == "event":
                name = value
            elif field == "data":
                data = value
            elif not line and name:
                return name, json.loads(data)
        return "end", None

    def until(self, wanted: str) -> Any:
        """Return the data of the next event of that name."""
        while True:
            name, data = self.next()
            assert name != "end"
            if name == wanted:
                return data


def test_stream(sandbox: Sandbox, client: httpx.Client, receiver: Receiver) -> None:
    """The stream sends requests, deliveries and state changes, with the data for the rate limit chart."""
    with Stream(sandbox) as stream:
        name, hello = stream.next()
        assert ("hello", 20, 2.0, "fixed") == (name, hello["limit"], hello["period"], hello["window"])
        client.get("/me")
        row = stream.until("requests")[-1]
        assert ("r1", "host1@example.com", False, 20, 19) == (
            row["id"],
            row["key"],
            row["refused"],
            row["limit"],
            row["remaining"],
        )
        assert hello["now"] <= row["at"] <= hello["now"] + 60
        assert 0 < row["resetsIn"] <= 2
        sandbox.add_hook(receiver.url())
        stream.until("state")
        sandbox.book()
        assert "d1" == stream.until("deliveries")[0]["id"]
        sandbox.inject(faults.status(500))
        stream.until("state")


def test_stream_resumes(sandbox: Sandbox, browser: httpx.Client, client: httpx.Client) -> None:
    """The stream resumes without gaps; a position from another sandbox reloads the page."""
    match = re.search(r'data-stream="([\d-]+)"', browser.get("/").text)
    assert match is not None
    client.get("/me")
    with Stream(sandbox, match[1]) as stream:
        assert "r1" == stream.until("requests")[-1]["id"]
        client.get("/me")
        stream.until("requests")
        client.get("/me")
        stream.until("requests")
        last = stream.last_id
    client.get("/meetings")
    with Stream(sandbox, match[1], last) as stream:
        assert {"r3", "r4"} >= {row["id"] for row in stream.until("requests")}
    with Stream(sandbox, "999999-0-0-0") as stream:
        assert ["hello", "reload", "end"] == [stream.next()[0] for _ in range(3)]


def test_streams_end_with_the_sandbox() -> None:
    """An open page does not delay the sandbox's shutdown."""
    with Sandbox().serve() as sandbox:
        stream = Stream(sandbox)
        assert "hello" == stream.next()[0]
    with contextlib.suppress(httpx.TransportError):
        assert "end" == stream.next()[0]
    stream.__exit__()
    assert "lemcal-sandbox" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("192.168.1.7", 200),
        ("sandbox:8080", 200),  # a container's name; nobody else can point it here
        ("app.localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/_sandbox/accounts", "/_sandbox/events?after=9-9-9-9"])
def test_dns_rebinding_is_blocked(
    sandbox: Sandbox, browser: httpx.Client, path: str, host: str, status: int
) -> None:
    """A website cannot reach the page by resolving its own name to this machine."""
    assert status == browser.get(path, headers={"host": host}).status_code
    assert [] == sandbox.requests


def test_own_host_name_is_accepted() -> None:
    """The host passed to serve() is accepted, whatever it is."""
    sandbox = Sandbox()
    sandbox._base_url = "http://sandbox.example.com:1/api/lemcal"
    for host, status in (("sandbox.example.com:1", 200), ("other.example.com:1", 403)):
        transport = httpx.ASGITransport(sandbox)

        async def get(host: str = host, transport: httpx.ASGITransport = transport) -> int:
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return (await client.get("/", headers={"host": host})).status_code

        assert status == anyio.run(get)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),  # not a browser
        ({"origin": "{origin}"}, 201),
        ({"origin": "{origin}", "sec-fetch-site": "same-origin"}, 201),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),  # another port on this machine
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_cross_site_requests_are_refused(
    sandbox: Sandbox, browser: httpx.Client, headers: dict[str, str], status: int
) -> None:
    """A request that a browser marks as coming from another site is refused, and changes nothing."""
    headers = {name: value.format(origin=sandbox.url) for name, value in headers.items()}
    response = browser.post("/_sandbox/bookings", headers=headers)
    assert (status, 13 if status == 201 else 12) == (response.status_code, len(sandbox.meetings()))


def test_form_offers_every_fault() -> None:
    """The page's form offers each kind of fault."""
    assert set(faults.__all__) == set(FAULTS)


def test_form_injects_every_fault(sandbox: Sandbox, browser: httpx.Client, client: httpx.Client) -> None:
    """Each choice, sent like the form sends it, injects a fault that applies to the next request."""
    text = browser.get("/").text
    choices = re.findall(
        r'<option value="(\w+)" data-option="(\w*)" data-value="([^"]*)"( data-number)?'
        r" data-fixed='([^']*)'",
        text,
    )
    assert len(FAULTS) == len(choices)
    for name, option, value, is_number, fixed in choices:
        options = json.loads(fixed.replace("&quot;", '"'))
        if option:
            options[option] = float(value) if is_number else value
            if is_number and option == "seconds":
                options[option] = 0.01
        response = browser.post("/_sandbox/faults", json={"fault": name, "options": options, "path": "/me"})
        assert 204 == response.status_code, response.text
        assert "No pending faults" not in browser.get("/_sandbox/page/state").json()["faults"]
        with contextlib.suppress(httpx.TransportError):
            client.get("/me")
        assert "No pending faults" in browser.get("/_sandbox/page/state").json()["faults"]
    sandbox.inject(faults.status(500), times=7)
    assert "7 x any *" in browser.get("/_sandbox/page/state").json()["faults"]
    assert 204 == browser.delete("/_sandbox/faults").status_code
    assert 200 == client.get("/me", auth=(sandbox.user_id, sandbox.api_key)).status_code
