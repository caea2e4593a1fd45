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

    from lemcal_async.cli._report import AccountRow, Report

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

_STYLE: Final = files("lemcal_async.cli").joinpath("report.css").read_text(encoding="utf-8")


def render(report: "Report") -> str:
    """Return the page."""
    generated = f"{report.generated_at:%Y-%m-%d %H:%M} UTC"
    sections = [
        _bookings(report),
        _hours(report),
        _ahead(report),
        _canceled(report),
        _people(
            "Hosts", report.hosts, "Names are shown only with --guests." if report.guests is None else ""
        ),
        "" if report.guests is None else _people("Guests", report.guests, ""),
        _accounts(report),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>lemcal report, {generated}</title><style>{_STYLE}</style></head>
<body><header><h1>lemcal meetings</h1>
<p class="soft">As of {generated}. Days and hours are in the time zone {escape(report.zone)}.</p></header>
<main>{_tiles(report)}{"".join(sections)}</main></body></html>
"""


def _tiles(report: "Report") -> str:
    tiles = [
        (f"{report.total:,}", "meetings"),
        (f"{report.upcoming:,}", "upcoming"),
        (
            f"{report.canceled_share:.0%}",
            f"canceled or disappeared ({report.canceled + report.disappeared:,})",
        ),
        (f"{report.pending:,}", "pending changes"),
        (f"{report.parked:,}", "parked changes"),
    ]
    oldest = ""
    if report.oldest_pending:
        found = f"{report.oldest_pending:%Y-%m-%d %H:%M}"
        oldest = f'<p class="soft">The oldest pending change was found at {found} UTC.</p>'
    boxes = "".join(f"<p><b>{number}</b>{label}</p>" for number, label in tiles)
    return f'<section class="wide" aria-label="Totals"><div class="tiles">{boxes}</div>{oldest}</section>'


def _bookings(report: "Report") -> str:
    if not report.weeks:
        return _section("Bookings per week", '<p class="soft">No bookings yet.</p>', wide=True)
    width, height, left, baseline = 760, 220, 34, 190
    totals = [sum(column) for column in zip(*report.bookings.values(), strict=True)]
    scale = (baseline - 10) / max(*totals, 1)
    step = (width - left) / len(report.weeks)
    parts = [_axis(left, width, baseline, max(totals), scale)]
    tops = [0] * len(report.weeks)
    for color, (name, numbers) in enumerate(report.bookings.items()):
        for index, number in enumerate(numbers):
            if number:
                y = baseline - (tops[index] + number) * scale
                label = f"{name}, week of {report.weeks[index]}: {number}"
                x = left + index * step + step * 0.1
                parts.append(_rect(f"c{color}", x, y, step * 0.8, number * scale, label))
                tops[index] += number
    label_step = -(-len(report.weeks) // 9)
    for index in range(0, len(report.weeks), label_step):
        x = left + (index + 0.5) * step
        label = f"{report.weeks[index]:%b %d}"
        parts.append(f'<text x="{x:.1f}" y="{baseline + 16}" text-anchor="middle">{label}</text>')
    key = "".join(
        f'<li><svg viewBox="0 0 9 9" aria-hidden="true"><rect class="c{color}" width="9" height="9"/></svg>'
        f"{escape(name)}</li>"
        for color, name in enumerate(report.bookings)
    )
    chart = _svg(width, height, "Bookings per week, by meeting type", parts)
    rows = [
        (str(week), *(str(counts[index]) for counts in report.bookings.values()))
        for index, week in enumerate(report.weeks)
    ]
    table = _data_table(("Week of", *report.bookings), rows)
    return _section("Bookings per week", f'{chart}<ul class="key">{key}</ul>{table}', wide=True)


def _axis(left: int, width: int, baseline: int, maximum: int, scale: float) -> str:
    marks = sorted({0, maximum // 2, maximum})
    return "".join(
        f'<line class="axis" x1="{left}" x2="{width}" y1="{baseline - mark * scale:.1f}" '
        f'y2="{baseline - mark * scale:.1f}"/><text x="{left - 6}" y="{baseline - mark * scale + 4:.1f}" '
        f'text-anchor="end">{mark}</text>'
        for mark in marks
    )


def _hours(report: "Report") -> str:
    used = [hour for hour in range(24) if any(row[hour] for row in report.hours)]
    if not used:
        return _section("Hours of the week", '<p class="soft">No meetings yet.</p>')
    first, last = max(min(used) - 1, 0), min(max(used) + 1, 23)
    columns = last - first + 1
    width, left, top, size_y = 380, 34, 6, 24
    step = (width - left) / columns
    maximum = max(max(row) for row in report.hours)
    parts: list[str] = []
    for day, row in enumerate(report.hours):
        y = top + day * size_y
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_DAYS[day]}</text>')
        for column in range(columns):
            hour, number = first + column, row[first + column]
            label = f"{_DAYS[day]} {hour:02}:00, {number}"
            x = left + column * step
            parts.append(_rect("track", x + 1, y + 1, step - 2, size_y - 2, label, 0.35))
            if number:
                parts.append(
                    _rect("c0", x + 1, y + 1, step - 2, size_y - 2, label, 0.25 + 0.75 * number / maximum)
                )
    label_step = -(-columns // 8)
    for column in range(0, columns, label_step):
        x = left + (column + 0.5) * step
        y = top + 7 * size_y + 13
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{first + column}</text>')
    chart = _svg(width, top + 7 * size_y + 20, "Meetings by weekday and start hour", parts)
    rows = [
        (_DAYS[day], *(str(row[first + c]) for c in range(columns))) for day, row in enumerate(report.hours)
    ]
    return _section("Hours of the week", chart + _data_table(("", *map(str, range(first, last + 1))), rows))


def _ahead(report: "Report") -> str:
    return _section(
        "Days booked in advance", _bars_with_data(report.days_ahead, "Meetings by days from booking to start")
    )


def _canceled(report: "Report") -> str:
    shares = [
        (name, canceled / total, f"{canceled / total:.0%} of {total}")
        for name, (canceled, total) in report.canceled_by_type.items()
    ]
    chart = _bar_chart(shares, 1.0, "Share canceled or disappeared, by meeting type")
    rows = [(name, str(canceled), str(total)) for name, (canceled, total) in report.canceled_by_type.items()]
    table = _data_table(("Meeting type", "Canceled or disappeared", "Total"), rows)
    return _section("Share canceled", chart + table)


def _people(title: str, people: Sequence[tuple[str, int]], note: str) -> str:
    text = f'<p class="soft">{note}</p>' if note else ""
    return _section(title, text + _bars_with_data(people, f"Meetings by {title.lower()}"))


def _accounts(report: "Report") -> str:
    rows = "".join(
        f"<tr><td>{escape(account.user_id)}</td><td>{account.meetings:,}</td>"
        f"<td{' class=bad' if account.failing else ''}>{describe_age(account, report.generated_at)}</td></tr>"
        for account in report.accounts
    )
    head = "<tr><th>Account</th><th>Meetings</th><th>Last synchronization</th></tr>"
    return _section("Accounts", f'<div class="scroll"><table>{head}{rows}</table></div>', wide=True)


def describe_age(account: "AccountRow", now: "datetime") -> str:
    """Return the age of an account's data in words."""
    if account.synced_at is None:
        return "never synchronized"
    minutes = max(int((now - account.synced_at).total_seconds() // 60), 0)
    if minutes < 120:
        ago = f"{minutes} min ago"
    else:
        ago = f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // 1440} days ago"
    return f"synchronized {ago}{', failing now' if account.failing else ''}"


def _bars_with_data(counts: Sequence[tuple[str, int]], title: str) -> str:
    maximum = max((count for _, count in counts), default=0)
    if not maximum:
        return '<p class="soft">No meetings yet.</p>'
    chart = _bar_chart([(name, count / maximum, f"{count:,}") for name, count in counts], 1.0, title)
    return chart + _data_table(("", "Meetings"), [(name, str(count)) for name, count in counts])


def _bar_chart(rows: Sequence[tuple[str, float, str]], maximum: float, title: str) -> str:
    """Return horizontal bars, each below its name, so that long names fit."""
    width, step = 380, 34
    parts: list[str] = []
    for index, (name, share, label) in enumerate(rows):
        y = index * step
        short_name = name if len(name) <= 46 else f"{name[:45]}\u2026"
        parts.append(f'<text x="0" y="{y + 12}">{escape(short_name)}</text>')
        parts.append(f'<text x="{width}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        parts.append(_rect("track", 0, y + 17, width, 9, "", 0.5))
        parts.append(_rect("c0", 0, y + 17, width * share / maximum, 9, f"{name}: {label}"))
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


def _data_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><tr>{first}</tr>{body}</table>"
    return f'<details><summary>Show data</summary><div class="scroll">{table}</div></details>'


def _section(title: str, content: str, *, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{content}</section>"
