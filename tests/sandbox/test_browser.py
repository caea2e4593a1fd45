"""The page in a real browser."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser import chromium, resize, use_colors

from lemcal_async.sandbox import Sandbox, _page
from lemcal_async.sandbox._log import SeenRequest

from .conftest import NO_TLS, Connect, Receiver

TIMEOUT = 30  # seconds; generous for a busy machine

COUNT_ROWS = "return document.querySelector('#requests').childElementCount"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Serve one sandbox for all tests of this module, like the browser, which takes a second to start."""
    with Sandbox(accounts=2, limit=20).serve() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a browser."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, sandbox: Sandbox) -> Iterator[Any]:
    """Open the page. After the test, check that nothing failed and that all requests went to the sandbox."""
    sandbox.clear_faults()
    for hook in sandbox.hooks():
        sandbox.delete_hook(hook["_id"])
    resize(browser, 1280)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(f"{sandbox.url}/")
    wait_until(lambda: text(browser, "#live") == "live")
    yield browser
    problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert [] == problems
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [entry["params"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(entry["request"]["url"]).hostname for entry in requests}
    assert {"127.0.0.1"} == hosts - {None}  # the browser's own icons are data: URLs


def wait_until(condition: Callable[[], Any]) -> Any:
    """Wait until the condition returns a true value, and return it."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    wait: Any = WebDriverWait(None, TIMEOUT, 0.05, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition())


def find(page: Any, selector: str) -> Any:
    """Return the first element that matches a selector."""
    return page.find_element("css selector", selector)


def click(page: Any, selector: str) -> None:
    """Click an element, retrying while it is missing or stale: a list is replaced when it changes."""
    wait_until(lambda: (find(page, selector).click(), True))


def text(page: Any, selector: str) -> str:
    """Return an element's text, or the empty string if the element does not exist."""
    return str(
        page.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    )


def test_request_appears_in_the_log(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """The row shows status and account, and the body after a click; the chart shows a dot."""
    connect(sandbox).get("/meetings", params={"meetingTypeId": "met_x"})
    number = sandbox.requests[-1].number
    row = f"#r{number}"
    wait_until(lambda: "200" in text(page, f"{row} .status"))
    assert "/meetings?meetingTypeId=met_x" in text(page, row)
    assert "host1@example.com" in text(page, row)
    wait_until(lambda: page.execute_script("return document.querySelectorAll('#strips .dot').length") >= 1)
    assert re.search(r"\d+ of 20 left, resets in \d\.\d s", text(page, "#strips figcaption"))
    click(page, f"{row} summary")
    wait_until(lambda: "[]" in text(page, f"{row} pre"))
    connect(sandbox).get("/me")  # the row stays open while others are added
    wait_until(lambda: "/me" in text(page, f"#r{number + 1}"))
    assert page.execute_script("return document.querySelector(arguments[0]).open", f"{row} details")


def test_request_appears_without_a_reload(page: Any) -> None:
    """The stream adds the row to the page, and polls the log several times per second."""
    assert _page._POLL_INTERVAL <= 0.25
    with Sandbox().serve() as other:
        page.get(f"{other.url}/")
        wait_until(lambda: text(page, "#live") == "live")
        page.execute_script("window.loaded = 'once'")
        httpx.get(f"{other.base_url}/me", verify=NO_TLS, trust_env=False)
        wait_until(lambda: "401" in text(page, "#r1 .status"))
        assert "once" == page.execute_script("return window.loaded")
        page.get("about:blank")


def test_refused_requests_are_marked(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """Requests over the limit are crosses in the chart, and marked in the log."""
    client = connect(sandbox, 1)
    statuses = [client.get("/me").status_code for _ in range(45)]
    assert 429 in statuses
    wait_until(lambda: page.execute_script("return document.querySelectorAll('#strips path.refused').length"))
    wait_until(lambda: "429" in text(page, "#requests .refused .status"))


def test_booking_form(page: Any, sandbox: Sandbox, receiver: Receiver) -> None:
    """A booking is delivered to a real receiver; it can be redelivered, moved, canceled and removed."""
    find(page, "#hooks input[name=targetUrl]").send_keys(receiver.url())
    click(page, "#hooks .fields button")
    wait_until(lambda: "/hook?..." in text(page, "#hooks li"))
    find(page, "#book input[name=guest]").send_keys("Ada Lovelace <ada@example.org>")
    page.execute_script("document.querySelector('#book input[name=start]').value = '2030-05-06T07:30'")
    click(page, "#book button")
    assert receiver.arrived.acquire(timeout=TIMEOUT)
    booked = json.loads(receiver.seen[0][2])
    assert "ada@example.org" == booked["providedInfos"]["email"]
    assert booked["start"].startswith("2030-05-0")
    wait_until(lambda: text(page, "#deliveries .status") == "200")

    click(page, "#deliveries button")
    assert receiver.arrived.acquire(timeout=TIMEOUT)
    wait_until(lambda: "repeat of 1" in text(page, "#deliveries li"))

    row = f"#meetings #{booked['_id']}"
    wait_until(lambda: "ada@example.org" in text(page, row))
    click(page, f"{row} .move summary")
    page.execute_script(f"document.querySelector('{row} input').value = '2031-05-06T07:30'")
    click(page, f"{row} .move button")
    wait_until(lambda: "2031-05-0" in text(page, row))
    (moved,) = [meeting for meeting in sandbox.meetings() if meeting["_id"] == booked["_id"]]
    assert ("2031", "2031") == (moved["start"][:4], moved["end"][:4])

    click(page, f"{row} form[data-url$=cancel] button")
    wait_until(lambda: "canceled" in text(page, row))
    click(page, f"{row} form[data-method=DELETE] button")
    wait_until(lambda: not page.find_elements("css selector", row))
    assert booked["_id"] not in [meeting["_id"] for meeting in sandbox.meetings()]


def test_invalid_guest_is_explained(page: Any, sandbox: Sandbox) -> None:
    """The page shows the sandbox's error message, and the form keeps its input."""
    before = len(sandbox.meetings())
    find(page, "#book input[name=guest]").send_keys("nobody")
    click(page, "#book button")
    wait_until(lambda: "pass an e-mail address" in text(page, "#message"))
    assert "nobody" == find(page, "#book input[name=guest]").get_attribute("value")
    assert before == len(sandbox.meetings())
    page.get_log("browser")  # discard the entry for the 400


def test_fault_is_injected_and_applied(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """The page lists the fault until it applies to a request with the chosen path."""
    from selenium.webdriver.support.select import Select

    Select(find(page, "#fault select[name=fault]")).select_by_value("status")
    assert ("code", "503") == (text(page, "#option-label"), find(page, "#option").get_attribute("value"))
    find(page, "#option").clear()
    find(page, "#option").send_keys("507")
    Select(find(page, "#fault select[name=path]")).select_by_visible_text("/meetingTypes")
    click(page, "#fault button")
    wait_until(lambda: "507" in text(page, "#faults li"))
    client = connect(sandbox, 1)
    assert 507 == client.get("/meetingTypes").status_code
    wait_until(lambda: "fault: 507" in text(page, f"#r{sandbox.requests[-1].number}"))
    wait_until(lambda: "No pending faults" in text(page, "#faults"))

    Select(find(page, "#fault select[name=fault]")).select_by_value("truncated")
    assert not find(page, "#option").is_displayed()
    click(page, "#fault button")
    wait_until(lambda: "truncated" in text(page, "#faults li"))
    click(page, "#faults button")
    wait_until(lambda: "No pending faults" in text(page, "#faults"))


def test_page_works_with_the_keyboard(page: Any, sandbox: Sandbox) -> None:
    """Every control is named, can be reached with Tab, and works with the keyboard."""
    from selenium.webdriver.common.keys import Keys

    before = len(sandbox.meetings())
    reached: set[str] = set()
    for _ in range(60):
        active = page.switch_to.active_element
        active.send_keys(Keys.TAB)
        name = page.execute_script("""
            const active = document.activeElement;
            return active.closest("section")?.getAttribute("aria-labelledby") + " " + active.tagName;
        """)
        reached.add(name)
        if name == "book-title BUTTON":
            page.switch_to.active_element.send_keys(Keys.ENTER)
            wait_until(lambda: len(sandbox.meetings()) == before + 1)
            break
    assert {"requests-title SUMMARY", "account-title SELECT", "account-title BUTTON"} <= reached
    unnamed = page.execute_script("""
        const named = (e) => e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length;
        return [...document.querySelectorAll("button, input:not([type=hidden]), select, summary")]
          .filter((e) => !named(e)).map((e) => e.outerHTML);
    """)
    assert [] == unnamed


@pytest.mark.parametrize("width", [320, 400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout_and_contrast(page: Any, width: int, scheme: str) -> None:
    """The page fits the screen, and its text has enough contrast in both color schemes."""
    resize(page, width)
    use_colors(page, scheme)
    assert width >= page.execute_script("return document.documentElement.scrollWidth")
    contrasts = page.execute_script("""
        const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const behind = (element) => {
          for (let at = element; at; at = at.parentElement) {
            const color = parse(getComputedStyle(at).backgroundColor);
            if (color.length === 3 || color[3] > 0) return color;
          }
          return [255, 255, 255];
        };
        return ["h1", "h2", ".hint", "time", ".s2", "button", ".primary", "pre", "label"].map((selector) => {
          const element = document.querySelector(selector);
          const [one, other] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
          return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        });
    """)
    assert all(contrast >= 4.5 for contrast in contrasts), contrasts
    use_colors(page, "light")


def test_log_of_ten_thousand_requests(browser: Any) -> None:
    """The latest rows load with the page, older ones on demand; the log scrolls and is bounded."""
    with Sandbox().serve() as sandbox:
        for number in range(10_200):
            entry = SeenRequest(0, "GET", "/me", f"n={number}", None, {}, status_code=200, seconds=0)
            sandbox._log.add_request(entry)
        browser.get(f"{sandbox.url}/")
        wait_until(lambda: text(browser, "#live") == "live")
        shown = 300
        while find(browser, "#older").is_displayed():
            find(browser, "#older").click()
            before = shown
            wait_until(lambda: browser.execute_script(COUNT_ROWS) > before)  # noqa: B023  # called immediately
            shown = browser.execute_script(COUNT_ROWS)
        assert shown >= 10_000
        log = find(browser, "#requests")
        browser.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", log)
        end = browser.execute_async_script("""
            const done = arguments[arguments.length - 1], log = document.querySelector("#requests");
            let frames = 0;
            function step() {
              log.scrollTop -= 2000;
              if (++frames < 10) requestAnimationFrame(step); else done(log.scrollTop);
            }
            requestAnimationFrame(step);
        """)
        assert 0 <= end < browser.execute_script("return arguments[0].scrollHeight", log) - 10 * 1000
        httpx.get(f"{sandbox.base_url}/me", verify=NO_TLS, trust_env=False)
        wait_until(lambda: "/me" in text(browser, "#r10201"))
        assert 10_000 >= browser.execute_script(COUNT_ROWS)
        browser.get("about:blank")


def test_another_site_cannot_control_the_sandbox(browser: Any, sandbox: Sandbox) -> None:
    """Another site cannot book with a script, a form, or a frame around the page."""
    attack = f"""<!doctype html><iframe src="{sandbox.url}/"></iframe>
    <form method="post" action="{sandbox.url}/_sandbox/bookings" enctype="text/plain" target="out">
    <button>go</button></form><iframe name="out"></iframe>"""
    before = len(sandbox.meetings())
    with other_origin(attack) as url:
        browser.get(url)
        outcome = browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            fetch(arguments[0], { method: "POST" }).then(() => done("answered"), () => done("blocked"));
            """,
            f"{sandbox.url}/_sandbox/bookings",
        )
        assert "blocked" == outcome
        find(browser, "button").click()
        browser.switch_to.frame("out")
        wait_until(lambda: "another website" in find(browser, "body").text)
        browser.switch_to.default_content()
        browser.get("about:blank")
    assert before == len(sandbox.meetings())


@contextlib.contextmanager
def other_origin(page: str) -> Iterator[str]:
    """Serve a page at a different origin."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()
        thread.join()
