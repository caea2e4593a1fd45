"""``lemcal report``: the statistics, the text summary and the HTML page."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from browser import chromium, resize, use_colors

from lemcal_async.cli._report import AccountRow, MeetingRow, Report, summarize
from lemcal_async.cli._report_page import describe_age, render
from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run
from .test_exit_statuses import posix_only

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PARIS = ZoneInfo("Europe/Paris")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary working folder, and unset LEMCAL_DB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMCAL_DB", raising=False)
    return tmp_path


def meeting(
    start: str | None, created: str | None, *, status: str = "booked", type_name: str | None = "Call"
) -> MeetingRow:
    """Return a meeting with one host and one guest. Times are UTC."""
    times = [
        None if time is None else datetime.fromisoformat(time).replace(tzinfo=UTC)
        for time in (start, created)
    ]
    return MeetingRow("usr_1", type_name, times[0], times[1], status, "h@x.org", "g@x.org", "Ada")


MEETINGS = [
    meeting("2026-05-18T08:30", "2026-05-11T08:00"),  # a Monday, 7 days ahead
    meeting("2026-05-18T22:30", "2026-05-17T22:30"),  # Tuesday 00:30 in Paris; booked on a Monday there
    meeting("2026-06-02T08:30", "2026-06-02T07:00", type_name="Demo"),
    meeting("2026-07-20T08:30", "2026-06-01T07:00", status="canceled", type_name="Demo"),
    meeting("2026-05-20T08:30", "2026-05-18T07:00", status="disappeared"),
    meeting(None, None, type_name=None),
]


def summary(meetings: list[MeetingRow] = MEETINGS, *, guests: bool = False) -> Report:
    """Return the report in the time zone of Paris."""
    accounts = [AccountRow("usr_1", NOW - timedelta(minutes=5), failing=False, meetings=len(meetings))]
    return summarize(meetings, accounts, PARIS, NOW, guests=guests, pending=3, parked=1, oldest_pending=NOW)


def test_statistics() -> None:
    """Each meeting is counted on the right day and hour of the requested time zone."""
    facts = summary()
    assert (4, 1, 1, 6, 1) == (facts.booked, facts.canceled, facts.disappeared, facts.total, facts.upcoming)
    assert pytest.approx(2 / 6) == facts.canceled_share
    assert [date(2026, 5, 11), date(2026, 5, 18), date(2026, 5, 25), date(2026, 6, 1)] == list(facts.weeks)
    assert {"Call": [1, 2, 0, 0], "Demo": [0, 0, 0, 2]} == facts.bookings
    assert {"Call": (1, 3), "Demo": (1, 2), "no type": (0, 1)} == facts.canceled_by_type
    ahead = {"same day": 1, "1 day": 1, "2-3": 1, "4-7": 1, "8-14": 0, "15-30": 0, "31+": 1}
    assert ahead == dict(facts.days_ahead)
    used = {
        (day, hour): count for day, row in enumerate(facts.hours) for hour, count in enumerate(row) if count
    }
    assert {(0, 10): 1, (1, 0): 1, (1, 10): 1} == used
    assert [("Host 1", 4)] == facts.hosts
    assert facts.guests is None


def test_with_guests() -> None:
    """Hosts and guests are named only with ``guests=True``."""
    facts = summary(guests=True)
    assert ([("h@x.org", 4)], [("Ada <g@x.org>", 4)]) == (facts.hosts, facts.guests)


def test_many_types_and_weeks() -> None:
    """Only the most frequent types are listed, the rest is combined; the weeks are the latest half year."""
    first = datetime(2024, 1, 1, tzinfo=UTC)
    booked = [(number, first + timedelta(weeks=week)) for number in range(9) for week in range(number, 120)]
    meetings = [
        MeetingRow("usr_1", f"T{number}", None, created, "booked", None, None, None)
        for number, created in booked
    ]
    facts = summary(meetings)
    assert [f"T{n}" for n in range(6)] + ["other types"] == list(facts.bookings)
    assert (26, [3] * 26) == (len(facts.weeks), facts.bookings["other types"])


def test_empty_database() -> None:
    """An empty database yields an empty report."""
    facts = summarize([], [], PARIS, NOW, guests=True)
    assert (0, 0.0, {}, []) == (facts.total, facts.canceled_share, facts.bookings, list(facts.weeks))
    assert "No bookings yet" in render(facts)


@pytest.mark.parametrize(
    ("minutes", "failing", "text"),
    [
        (None, True, "never synchronized"),
        (0, False, "synchronized 0 min ago"),
        (119, True, "synchronized 119 min ago, failing now"),
        (120, False, "synchronized 2 h ago"),
        (47 * 60, False, "synchronized 47 h ago"),
        (49 * 60, False, "synchronized 2 days ago"),
    ],
)
def test_age(minutes: int | None, text: str, *, failing: bool) -> None:
    """The age of an account's data is in minutes, hours or days."""
    synced_at = None if minutes is None else NOW - timedelta(minutes=minutes)
    assert text == describe_age(AccountRow("usr_1", synced_at, failing, 0), NOW)


class Tags(HTMLParser):
    """Collects the tags of a page and the resources it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the tag and its links."""
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action")]


def test_page_is_self_contained() -> None:
    """The page contains no scripts, loads no resources, and escapes names."""
    attack = "<script>alert(1)</script>\"'"
    page = render(summary([meeting("2026-05-18T08:30", "2026-05-11T08:00", type_name=attack)], guests=True))
    found = Tags(page)
    assert not {"script", "img", "link", "iframe", "object"} & found.tags
    assert [] == found.loads
    assert not re.search(r"url\(|@import|https?://", page)
    assert "&lt;script&gt;" in page


def test_page_contains_the_numbers() -> None:
    """Each chart has a table with its numbers."""
    page = render(summary())
    for text in (
        "2026-05-18",
        "Call, week of 2026-05-18: 2",
        "Tue 00:00, 1",
        "33% of 3",
        "usr_1",
        "Europe/Paris",
    ):
        assert text in page
    assert 5 == page.count("<summary>Show data</summary>")
    assert "The oldest pending change was found at 2026-06-01 12:00 UTC." in page


def test_text_summary(lemcal: Run, sandbox: Sandbox) -> None:
    """The summary includes failing accounts and undelivered changes."""
    lemcal("sync", "--base-url", sandbox.base_url)
    result = lemcal("report", "--tz", "Europe/Paris")
    assert (0, "") == (result.status, result.err)
    assert "Booked                   10, 0 of them upcoming\n" in result.out
    assert "Canceled or disappeared  2 (17%)\n" in result.out
    assert "Undelivered changes      12 pending, 0 parked\n" in result.out
    assert re.search(r"\n  Discovery call +3  #+\n", result.out)
    assert f"\n  {sandbox.user_id}  12 meetings, synchronized 0 min ago\n" in result.out
    emails = {guest["email"] for row in sandbox.meetings() for guest in row["attendees"]}
    assert not [email for email in emails if email in result.out]
    assert "@example" in lemcal("report", "--guests").out
    sandbox.inject(faults.status(400), times=5)
    lemcal("sync", "--base-url", sandbox.base_url)
    assert "failing now" in lemcal("report").out


def test_output_file(lemcal: Run, folder: Path) -> None:
    """The file is replaced atomically, only its owner can read it, and names require ``--guests``."""
    lemcal("sync", "--sandbox")
    out = folder / "report.html"
    out.write_text("old")
    result = lemcal("report", "--sandbox", "--out", "report.html")
    assert (0, "", "lemcal: wrote report.html\n") == (result.status, result.out, result.err)
    assert 0o600 == out.stat().st_mode & 0o777
    assert "@example" not in out.read_text()
    lemcal("report", "--sandbox", "--out", "report.html", "--guests")
    assert "host1@example.com" in out.read_text()
    assert {"report.html", "lemcal-sandbox.db"} == {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tz", "Mars/Olympus"], "--tz Mars/Olympus: unknown time zone"),
        (["--tz", ""], "unknown time zone"),
        (["--tz", "../etc/passwd"], "unknown time zone"),
    ],
)
def test_invalid_options(lemcal: Run, argv: list[str], message: str) -> None:
    """The error is one line that says what to do."""
    lemcal("sync", "--sandbox")
    result = lemcal("report", "--sandbox", *argv)
    assert (2, "", 1) == (result.status, result.out, result.err.count("\n"))
    assert message in result.err


@pytest.mark.parametrize(
    ("out", "problem"),
    [("no/such/report.html", "No such file or directory"), (".", "Is a directory")],
)
def test_unwritable_output_file(lemcal: Run, out: str, problem: str) -> None:
    """A file that cannot be written is status 1."""
    lemcal("sync", "--sandbox")
    result = lemcal("report", "--sandbox", "--out", out)
    assert (1, "", 1) == (result.status, result.out, result.err.count("\n"))
    assert result.err.startswith(f"lemcal: {out} cannot be written: {problem}")


def test_output_to_symbolic_link(lemcal: Run, folder: Path) -> None:
    """A symbolic link stays, and its target is replaced or created."""
    lemcal("sync", "--sandbox")
    (folder / "old.html").write_text("old")
    for name in ("old.html", "new.html"):
        link = folder / f"link-to-{name}"
        link.symlink_to(name)
        assert 0 == lemcal("report", "--sandbox", "--out", link.name).status
        assert link.is_symlink()
        assert (folder / name).read_text().startswith("<!doctype html>")


@posix_only
def test_output_to_pipe(lemcal: Run, folder: Path) -> None:
    """The page is written to a named pipe, which stays a pipe."""
    lemcal("sync", "--sandbox")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        page = pool.submit(pipe.read_text)
        assert 0 == lemcal("report", "--sandbox", "--out", "pipe").status
        assert pipe.is_fifo()  # otherwise, nothing would be written to the pipe
        assert page.result().startswith("<!doctype html>")


def test_page_in_browser(folder: Path) -> None:
    """In a browser, the page fits the screen's width and logs nothing to the console."""
    (folder / "report.html").write_text(render(summary(guests=True)))
    with chromium() as browser:
        for width in (400, 1280):
            for scheme in ("light", "dark"):
                resize(browser, width)
                use_colors(browser, scheme)
                browser.get((folder / "report.html").as_uri())
                assert width >= browser.execute_script("return document.documentElement.scrollWidth")
        assert [] == browser.get_log("browser")
