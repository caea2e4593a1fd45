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

WAIT = 30  # seconds; a busy machine is slow

ROWS = "return document.querySelector('#requests').childElementCount"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Serve one sandbox to all tests of this module: a browser takes a second to start."""
    with Sandbox(accounts=2, limit=20).serve() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a browser."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, sandbox: Sandbox) -> Iterator[Any]:
    """Return the browser with the page live; in the end nothing has failed or come from elsewhere."""
    sandbox.clear_faults()
    for hook in sandbox.hooks():
        sandbox.delete_hook(hook["_id"])
    resize(browser, 1280)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(f"{sandbox.url}/")
    until(lambda: text(browser, "#live") == "live")
    yield browser
    problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert [] == problems
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [entry["params"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(entry["request"]["url"]).hostname for entry in requests}
    assert {"127.0.0.1"} == hosts - {None}  # icons of the browser's own are data: URLs


def until(condition: Callable[[], Any]) -> Any:
    """Return what the condition returns once that is true."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    wait: Any = WebDriverWait(None, WAIT, 0.05, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition())


def find(page: Any, selector: str) -> Any:
    """Return the first element that matches."""
    return page.find_element("css selector", selector)


def press(page: Any, selector: str) -> None:
    """Click an element, once it is there and stands still: lists are replaced when something changes."""
    until(lambda: (find(page, selector).click(), True))


def text(page: Any, selector: str) -> str:
    """Return an element's text, the empty string if there is none."""
    return str(
        page.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    )


def test_a_request_appears(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """It shows status and account, its body after a click, and a dot in the picture of the limit."""
    connect(sandbox).get("/meetings", params={"meetingTypeId": "met_x"})
    number = sandbox.requests[-1].number
    row = f"#r{number}"
    until(lambda: "200" in text(page, f"{row} .status"))
    assert "/meetings?meetingTypeId=met_x" in text(page, row)
    assert "host1@example.com" in text(page, row)
    until(lambda: page.execute_script("return document.querySelectorAll('#strips .dot').length") >= 1)
    assert re.search(r"\d+ of 20 left, resets in \d\.\d s", text(page, "#strips figcaption"))
    press(page, f"{row} summary")
    until(lambda: "[]" in text(page, f"{row} pre"))
    connect(sandbox).get("/me")  # the row stays open while others come
    until(lambda: "/me" in text(page, f"#r{number + 1}"))
    assert page.execute_script("return document.querySelector(arguments[0]).open", f"{row} details")


def test_it_appears_at_the_next_look(page: Any) -> None:
    """The stream brings it without a reload, and looks at the log several times per second."""
    assert _page._POLL_INTERVAL <= 0.25
    with Sandbox().serve() as other:
        page.get(f"{other.url}/")
        until(lambda: text(page, "#live") == "live")
        page.execute_script("window.loaded = 'once'")
        httpx.get(f"{other.base_url}/me", verify=NO_TLS, trust_env=False)
        until(lambda: "401" in text(page, "#r1 .status"))
        assert "once" == page.execute_script("return window.loaded")
        page.get("about:blank")


def test_refused_requests_are_marked(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """Requests over the limit are crosses in the picture, and marked in the log."""
    client = connect(sandbox, 1)
    statuses = [client.get("/me").status_code for _ in range(45)]
    assert 429 in statuses
    until(lambda: page.execute_script("return document.querySelectorAll('#strips path.refused').length"))
    until(lambda: "429" in text(page, "#requests .refused .status"))


def test_booking_with_a_button(page: Any, sandbox: Sandbox, receiver: Receiver) -> None:
    """A booking reaches a real receiver; it can be delivered again, moved, canceled and removed."""
    find(page, "#hooks input[name=targetUrl]").send_keys(receiver.url())
    press(page, "#hooks .fields button")
    until(lambda: "/hook?..." in text(page, "#hooks li"))
    find(page, "#book input[name=guest]").send_keys("Ada Lovelace <ada@example.org>")
    page.execute_script("document.querySelector('#book input[name=start]').value = '2030-05-06T07:30'")
    press(page, "#book button")
    assert receiver.arrived.acquire(timeout=WAIT)
    booked = json.loads(receiver.seen[0][2])
    assert "ada@example.org" == booked["providedInfos"]["email"]
    assert booked["start"].startswith("2030-05-0")
    until(lambda: text(page, "#deliveries .status") == "200")

    press(page, "#deliveries button")
    assert receiver.arrived.acquire(timeout=WAIT)
    until(lambda: "repeat of 1" in text(page, "#deliveries li"))

    row = f"#meetings #{booked['_id']}"
    until(lambda: "ada@example.org" in text(page, row))
    press(page, f"{row} .move summary")
    page.execute_script(f"document.querySelector('{row} input').value = '2031-05-06T07:30'")
    press(page, f"{row} .move button")
    until(lambda: "2031-05-0" in text(page, row))
    (moved,) = [meeting for meeting in sandbox.meetings() if meeting["_id"] == booked["_id"]]
    assert ("2031", "2031") == (moved["start"][:4], moved["end"][:4])

    press(page, f"{row} form[data-url$=cancel] button")
    until(lambda: "canceled" in text(page, row))
    press(page, f"{row} form[data-method=DELETE] button")
    until(lambda: not page.find_elements("css selector", row))
    assert booked["_id"] not in [meeting["_id"] for meeting in sandbox.meetings()]


def test_a_wrong_guest_is_explained(page: Any, sandbox: Sandbox) -> None:
    """The page shows the sandbox's error, and the form keeps its input."""
    before = len(sandbox.meetings())
    find(page, "#book input[name=guest]").send_keys("nobody")
    press(page, "#book button")
    until(lambda: "pass an e-mail address" in text(page, "#message"))
    assert "nobody" == find(page, "#book input[name=guest]").get_attribute("value")
    assert before == len(sandbox.meetings())
    page.get_log("browser")  # the 400, which the browser notes


def test_a_fault_is_injected_and_met(page: Any, sandbox: Sandbox, connect: Connect) -> None:
    """The page lists it until a request with its path meets it."""
    from selenium.webdriver.support.select import Select

    Select(find(page, "#fault select[name=fault]")).select_by_value("status")
    assert ("code", "503") == (text(page, "#option-label"), find(page, "#option").get_attribute("value"))
    find(page, "#option").clear()
    find(page, "#option").send_keys("507")
    Select(find(page, "#fault select[name=path]")).select_by_visible_text("/meetingTypes")
    press(page, "#fault button")
    until(lambda: "507" in text(page, "#faults li"))
    client = connect(sandbox, 1)
    assert 507 == client.get("/meetingTypes").status_code
    until(lambda: "fault: 507" in text(page, f"#r{sandbox.requests[-1].number}"))
    until(lambda: "No pending faults" in text(page, "#faults"))

    Select(find(page, "#fault select[name=fault]")).select_by_value("truncated")
    assert not find(page, "#option").is_displayed()
    press(page, "#fault button")
    until(lambda: "truncated" in text(page, "#faults li"))
    press(page, "#faults button")
    until(lambda: "No pending faults" in text(page, "#faults"))


def test_by_keyboard(page: Any, sandbox: Sandbox) -> None:
    """Every control can be reached with Tab and used with the keyboard."""
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
            until(lambda: len(sandbox.meetings()) == before + 1)
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
def test_on_any_screen(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, and text has enough contrast in both color schemes."""
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


def test_a_log_of_ten_thousand(browser: Any) -> None:
    """The newest rows load at once, others on demand; the log scrolls, and is bounded."""
    with Sandbox().serve() as sandbox:
        for number in range(10_200):
            entry = SeenRequest(0, "GET", "/me", f"n={number}", None, {}, status_code=200, seconds=0)
            sandbox._log.add_request(entry)
        browser.get(f"{sandbox.url}/")
        until(lambda: text(browser, "#live") == "live")
        shown = 300
        while find(browser, "#older").is_displayed():
            find(browser, "#older").click()
            before = shown
            until(lambda: browser.execute_script(ROWS) > before)  # noqa: B023  # called at once
            shown = browser.execute_script(ROWS)
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
        until(lambda: "/me" in text(browser, "#r10201"))
        assert 10_000 >= browser.execute_script(ROWS)
        browser.get("about:blank")


def test_another_site_cannot_drive_it(browser: Any, sandbox: Sandbox) -> None:
    """Another site cannot book: not by a script, a form, or a frame around the page."""
    page = f"""<!doctype html><iframe src="{sandbox.url}/"></iframe>
    <form method="post" action="{sandbox.url}/_sandbox/bookings" enctype="text/plain" target="out">
    <button>go</button></form><iframe name="out"></iframe>"""
    before = len(sandbox.meetings())
    with elsewhere(page) as url:
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
        until(lambda: "another website" in find(browser, "body").text)
        browser.switch_to.default_content()
        browser.get("about:blank")
    assert before == len(sandbox.meetings())


@contextlib.contextmanager
def elsewhere(page: str) -> Iterator[str]:
    """Serve a page at another origin."""
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
