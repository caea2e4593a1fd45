"""The HTML page of ``lemcal report``: renders the numbers as one file with SVG charts, without I/O.

It contains no scripts and loads no resources, so it can be sent by e-mail and archived. Below each chart, a
table shows its numbers.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

    from lemcal_async.cli._report import AccountFacts, Report

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

_STYLE: Final = files("lemcal_async.cli").joinpath("report.css").read_text(encoding="utf-8")


def render(facts: "Report") -> str:
    """Return the page."""
    made = f"{facts.made_at:%Y-%m-%d %H:%M} UTC"
    sections = [
        _bookings(facts),
        _hours(facts),
        _ahead(facts),
        _canceled(facts),
        _people("Hosts", facts.hosts, "Names are shown only with --guests." if facts.guests is None else ""),
        "" if facts.guests is None else _people("Guests", facts.guests, ""),
        _accounts(facts),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>lemcal report, {made}</title><style>{_STYLE}</style></head>
<body><header><h1>lemcal meetings</h1>
<p class="soft">As of {made}. Days and hours are in the time zone {escape(facts.zone)}.</p></header>
<main>{_tiles(facts)}{"".join(sections)}</main></body></html>
"""


def _tiles(facts: "Report") -> str:
    tiles = [
        (f"{facts.total:,}", "meetings"),
        (f"{facts.upcoming:,}", "upcoming"),
        (f"{facts.share_canceled:.0%}", f"canceled or disappeared ({facts.canceled + facts.gone:,})"),
        (f"{facts.pending:,}", "pending changes"),
        (f"{facts.parked:,}", "parked changes"),
    ]
    oldest = ""
    if facts.oldest_pending:
        found = f"{facts.oldest_pending:%Y-%m-%d %H:%M}"
        oldest = f'<p class="soft">The oldest pending change was found at {found} UTC.</p>'
    boxes = "".join(f"<p><b>{number}</b>{label}</p>" for number, label in tiles)
    return f'<section class="wide" aria-label="Totals"><div class="tiles">{boxes}</div>{oldest}</section>'


def _bookings(facts: "Report") -> str:
    if not facts.weeks:
        return _section("Bookings per week", '<p class="soft">No bookings yet.</p>', wide=True)
    width, height, left, floor = 760, 220, 34, 190
    totals = [sum(column) for column in zip(*facts.bookings.values(), strict=True)]
    scale = (floor - 10) / max(*totals, 1)
    step = (width - left) / len(facts.weeks)
    parts = [_axis(left, width, floor, max(totals), scale)]
    tops = [0] * len(facts.weeks)
    for color, (name, numbers) in enumerate(facts.bookings.items()):
        for index, number in enumerate(numbers):
            if number:
                y = floor - (tops[index] + number) * scale
                label = f"{name}, week of {facts.weeks[index]}: {number}"
                x = left + index * step + step * 0.1
                parts.append(_rect(f"c{color}", x, y, step * 0.8, number * scale, label))
                tops[index] += number
    every = -(-len(facts.weeks) // 9)
    for index in range(0, len(facts.weeks), every):
        x = left + (index + 0.5) * step
        label = f"{facts.weeks[index]:%b %d}"
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{label}</text>')
    key = "".join(
        f'<li><svg viewBox="0 0 9 9" aria-hidden="true"><rect class="c{color}" width="9" height="9"/></svg>'
        f"{escape(name)}</li>"
        for color, name in enumerate(facts.bookings)
    )
    picture = _svg(width, height, "Bookings per week, by meeting type", parts)
    rows = [
        (str(week), *(str(counts[index]) for counts in facts.bookings.values()))
        for index, week in enumerate(facts.weeks)
    ]
    table = _numbers(("Week of", *facts.bookings), rows)
    return _section("Bookings per week", f'{picture}<ul class="key">{key}</ul>{table}', wide=True)


def _axis(left: int, width: int, floor: int, most: int, scale: float) -> str:
    marks = sorted({0, most // 2, most})
    return "".join(
        f'<line class="axis" x1="{left}" x2="{width}" y1="{floor - mark * scale:.1f}" '
        f'y2="{floor - mark * scale:.1f}"/><text x="{left - 6}" y="{floor - mark * scale + 4:.1f}" '
        f'text-anchor="end">{mark}</text>'
        for mark in marks
    )


def _hours(facts: "Report") -> str:
    used = [hour for hour in range(24) if any(row[hour] for row in facts.hours)]
    if not used:
        return _section("Hours of the week", '<p class="soft">No meetings yet.</p>')
    first, last = max(min(used) - 1, 0), min(max(used) + 1, 23)
    columns = last - first + 1
    width, left, top, size_y = 380, 34, 6, 24
    step = (width - left) / columns
    most = max(max(row) for row in facts.hours)
    parts: list[str] = []
    for day, row in enumerate(facts.hours):
        y = top + day * size_y
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_DAYS[day]}</text>')
        for column in range(columns):
            hour, number = first + column, row[first + column]
            label = f"{_DAYS[day]} {hour:02}:00, {number}"
            x = left + column * step
            parts.append(_rect("track", x + 1, y + 1, step - 2, size_y - 2, label, 0.35))
            if number:
                parts.append(
                    _rect("c0", x + 1, y + 1, step - 2, size_y - 2, label, 0.25 + 0.75 * number / most)
                )
    every = -(-columns // 8)
    for column in range(0, columns, every):
        x = left + (column + 0.5) * step
        y = top + 7 * size_y + 13
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{first + column}</text>')
    picture = _svg(width, top + 7 * size_y + 20, "Meetings by weekday and start hour", parts)
    rows = [
        (_DAYS[day], *(str(row[first + c]) for c in range(columns))) for day, row in enumerate(facts.hours)
    ]
    return _section("Hours of the week", picture + _numbers(("", *map(str, range(first, last + 1))), rows))


def _ahead(facts: "Report") -> str:
    return _section("Days booked in advance", _bars(facts.ahead, "Meetings by days from booking to start"))


def _canceled(facts: "Report") -> str:
    shares = [
        (name, canceled / total, f"{canceled / total:.0%} of {total}")
        for name, (canceled, total) in facts.canceled_by_type.items()
    ]
    picture = _horizontal(shares, 1.0, "Share canceled or disappeared, by meeting type")
    rows = [(name, str(canceled), str(total)) for name, (canceled, total) in facts.canceled_by_type.items()]
    table = _numbers(("Meeting type", "Canceled or disappeared", "Total"), rows)
    return _section("Share canceled", picture + table)


def _people(title: str, people: Sequence[tuple[str, int]], note: str) -> str:
    text = f'<p class="soft">{note}</p>' if note else ""
    return _section(title, text + _bars(people, f"Meetings by {title.lower()}"))


def _accounts(facts: "Report") -> str:
    rows = "".join(
        f"<tr><td>{escape(account.user_id)}</td><td>{account.meetings:,}</td>"
        f"<td{' class=bad' if account.failing else ''}>{age(account, facts.made_at)}</td></tr>"
        for account in facts.accounts
    )
    head = "<tr><th>Account</th><th>Meetings</th><th>Last synchronization</th></tr>"
    return _section("Accounts", f'<div class="scroll"><table>{head}{rows}</table></div>', wide=True)


def age(account: "AccountFacts", now: "datetime") -> str:
    """Return the age of an account's data in words."""
    if account.synced_at is None:
        return "never synchronized"
    minutes = max(int((now - account.synced_at).total_seconds() // 60), 0)
    if minutes < 120:
        ago = f"{minutes} min ago"
    else:
        ago = f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // 1440} days ago"
    return f"synchronized {ago}{', failing now' if account.failing else ''}"


def _bars(counts: Sequence[tuple[str, int]], title: str) -> str:
    most = max((count for _, count in counts), default=0)
    if not most:
        return '<p class="soft">No meetings yet.</p>'
    picture = _horizontal([(name, count / most, f"{count:,}") for name, count in counts], 1.0, title)
    return picture + _numbers(("", "Meetings"), [(name, str(count)) for name, count in counts])


def _horizontal(rows: Sequence[tuple[str, float, str]], most: float, title: str) -> str:
    """Return horizontal bars, each below its name, so that long names fit."""
    width, step = 380, 34
    parts: list[str] = []
    for index, (name, share, label) in enumerate(rows):
        y = index * step
        shown = name if len(name) <= 46 else f"{name[:45]}\u2026"
        parts.append(f'<text x="0" y="{y + 12}">{escape(shown)}</text>')
        parts.append(f'<text x="{width}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        parts.append(_rect("track", 0, y + 17, width, 9, "", 0.5))
        parts.append(_rect("c0", 0, y + 17, width * share / most, 9, f"{name}: {label}"))
    return _svg(width, max(len(rows), 1) * step, title, parts)


def _rect(  # noqa: PLR0917  # SVG's order
    color: str, x: float, y: float, width: float, height: float, label: str, opacity: float = 1
) -> str:
    title = f"<title>{escape(label)}</title>" if label else ""
    return (
        f'<rect class="{color}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
        f'height="{max(height, 0):.1f}" opacity="{opacity:.2f}" rx="1.5">{title}</rect>'
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><tr>{first}</tr>{body}</table>"
    return f'<details><summary>Show data</summary><div class="scroll">{table}</div></details>'


def _section(title: str, content: str, *, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{content}</section>"
