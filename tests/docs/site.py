"""Checks the built site in Chromium: ``nox -s docs``, then ``python tests/docs/site.py``.

The first or second search result must be the expected page, and code and tables must not be cut off in a
window 1280 pixels wide, in light and dark. Otherwise, the exit status is 1. Requires Chromium with its
driver, and Selenium.
"""

import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import chromium, use_colors

SITE = Path(__file__).parents[2] / "site"

EXPECTED = {
    "429": "faq.html",
    "cancel": "how-it-works.html#cancellation",
    "celery": "faq.html",
    "deadline": "deadlines.html",
    "django": "faq.html",
    "dlt": "data-analysis.html",
    "extras": "index.html#install",
    "fleet": "fleet.html",
    "install": "index.html#install",
    "pandas": "data-analysis.html",
    "rate limit": "rate-limiter.html",
    "redis": "redis.html",
    "retry": "how-it-works.html#retry",
    "sandbox": "try-it.html",
    "timeout": "deadlines.html",
    "token": "security.html",
    "webhook": "webhooks.html",
}

FIND = """
const box = "input[role=combobox]";
const host = [...document.querySelectorAll("*")].find(e => e.shadowRoot?.querySelector(box));
"""
TYPE = f"""{FIND}
const input = host.shadowRoot.querySelector(box);
Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(input, arguments[0]);
input.dispatchEvent(new Event("input", {{bubbles: true, composed: true}}));
"""
HITS = f"""{FIND}
return [...host.shadowRoot.querySelectorAll("ol a")].map(a => a.href);
"""
CUT = """
const wide = ".md-content pre, .md-content pre > code, .md-content .md-typeset__scrollwrap";
return [...document.querySelectorAll(wide)]
  .filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => e.innerText.split("\\n").sort((a, b) => b.length - a.length)[0]);
"""


class SiteHandler(SimpleHTTPRequestHandler):
    """Serves the site without logging; the search requires HTTP."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def find_problems(browser: Any, root: str) -> list[str]:
    """Return the problems of the site that is served at ``root``."""
    problems: list[str] = []
    for scheme in ("light", "dark"):
        use_colors(browser, scheme)
        for page in sorted(SITE.rglob("*.html")):
            browser.get(f"{root}/{page.relative_to(SITE)}")
            problems += [
                f"{page.relative_to(SITE)}, {scheme}: cut off: {line}" for line in browser.execute_script(CUT)
            ]
    browser.get(f"{root}/index.html")
    browser.find_element("css selector", ".md-search__button").click()
    for words, expected in EXPECTED.items():
        time.sleep(0.3)
        browser.execute_script(TYPE, words)
        time.sleep(0.7)
        hits = [hit.removeprefix(f"{root}/") for hit in browser.execute_script(HITS)[:2]]
        if not any(is_at(hit, expected) for hit in hits):
            problems.append(f"search for {words}: expected {expected}, got {hits}")
    return problems


def is_at(hit: str, expected: str) -> bool:
    """Whether a search result is on the expected page and below the expected heading."""
    address, _, anchor = hit.partition("#")
    page, _, heading = expected.partition("#")
    return address.partition("?")[0] == page and anchor.startswith(heading)


def main() -> None:
    """Check the site and print the problems."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SiteHandler, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium(width=1280) as browser:
            problems = find_problems(browser, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    sys.stdout.write("\n".join(problems or ["The search works, and nothing is cut off."]) + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
