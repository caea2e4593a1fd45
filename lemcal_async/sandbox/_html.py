"""Renders the page's HTML. Pure functions; all values are escaped.

Styles and scripts are in ``static/``. The script replaces parts of the page with fragments rendered here.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final, cast

import attrs

from lemcal_async._urls import without_secrets
from lemcal_async.sandbox._demo import SandboxAccount
from lemcal_async.sandbox._hooks import Delivery
from lemcal_async.sandbox._log import SeenRequest

MEETINGS_SHOWN: Final = 200


@attrs.frozen
class FaultChoice:
    """A kind of fault in the page's form: its label and its option, if it has one."""

    label: str
    option: str = ""
    value: str = ""
    number: bool = False


FAULTS: Final[Mapping[str, FaultChoice]] = {
    "too_many_requests": FaultChoice("429 Too Many Requests", "retry_after", "0.5"),
    "status": FaultChoice("Plain-text error", "code", "503", number=True),
    "html_error": FaultChoice("HTML error page", "code", "502", number=True),
    "json_error": FaultChoice("JSON error, status 400", "error", "Something is wrong"),
    "unsuccessful": FaultChoice("success: false, status 500", "error", "Something is wrong"),
    "not_ok": FaultChoice("ok: false, status 403", "message", "Not allowed"),
    "html_200": FaultChoice("200 with an HTML page"),
    "empty_200": FaultChoice("200 with an empty body"),
    "empty_string_200": FaultChoice("200 with an empty string"),
    "json": FaultChoice("200 with unexpected JSON", "data", "surprise"),
    "redirect": FaultChoice("Redirect", "location", "/elsewhere"),
    "slow": FaultChoice("Slow response, seconds", "seconds", "3", number=True),
    "truncated": FaultChoice("Truncated body"),
    "reset_before_processing": FaultChoice("Connection reset, before processing"),
    "reset_after_processing": FaultChoice("Connection reset, after processing"),
}
_FIXED_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "json_error": {"code": 400},
    "unsuccessful": {"code": 500},
    "not_ok": {"code": 403},
}
_PATHS: Final = ("/me", "/meetings", "/meetingTypes", "/meetingTypes/*", "/hooks", "/hooks/*")


@attrs.frozen
class View:
    """The data that the page shows, for one of the sandbox's accounts."""

    base_url: str
    accounts: Sequence[SandboxAccount]
    account: int
    meetings: Sequence[Mapping[str, Any]]
    meeting_types: Sequence[Mapping[str, Any]]
    hooks: Sequence[Mapping[str, Any]]
    faults: Sequence[str]
    requests: Sequence[SeenRequest]  # newest first
    deliveries: Sequence[Delivery]
    stream: str  # the position at which the live stream continues

    @property
    def selected_account(self) -> SandboxAccount:
        """The account whose data is shown."""
        return self.accounts[self.account]


def page(view: View) -> str:
    """Return the whole page."""
    emails = {account.user_id: account.email for account in view.accounts}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>lemcal sandbox</title>
<link rel="icon" href="_sandbox/static/icon.svg">
<link rel="stylesheet" href="_sandbox/static/page.css">
<script src="_sandbox/static/page.js" defer></script>
</head>
<body data-account="{view.account}" data-stream="{escape(view.stream)}">
<header>
<h1>lemcal <span>sandbox</span></h1>
<code>{escape(view.base_url)}</code>
<p id="live" role="status">connecting</p>
</header>
<noscript><p class="notice">Without JavaScript, the page does not update after loading.</p></noscript>
<main>
<div class="column">
{_limit_section()}
{_requests_section(view, emails)}
{_deliveries_section(view)}
</div>
<div class="column">
{_account_section(view)}
{_book_section(view)}
<section aria-labelledby="meetings-title"><h2 id="meetings-title">Meetings</h2>
<div id="meetings">{meetings(view)}</div></section>
{_fault_section()}
<section aria-labelledby="hooks-title"><h2 id="hooks-title">Hooks</h2>
<div id="hooks">{hooks(view)}</div></section>
<section aria-labelledby="types-title"><h2 id="types-title">Meeting types</h2>
{_meeting_types(view)}</section>
</div>
</main>
<p id="message" role="status" aria-live="polite"></p>
</body>
</html>
"""


def _limit_section() -> str:
    return """<section aria-labelledby="limit-title"><h2 id="limit-title">Rate limit</h2>
<p class="hint" id="limit-hint">Each dot is a request, each box a rate limit window.</p>
<div id="strips"></div></section>"""


def _requests_section(view: View, emails: Mapping[str, str]) -> str:
    account = view.selected_account
    rows = "".join(request_row(entry, emails) for entry in view.requests)
    more = view.requests[-1].number > 1 if view.requests else False
    return f"""<section aria-labelledby="requests-title"><h2 id="requests-title">Requests</h2>
<div class="empty" id="no-requests"{" hidden" if rows else ""}><p>No requests yet. Try one of these:</p>
<pre>{escape(_environment(account))}
lemcal meetings --base-url {escape(view.base_url)}</pre>
<pre>curl -u {escape(account.user_id)}:{escape(account.api_key)} {escape(view.base_url)}/me</pre></div>
<ol id="requests" class="log" tabindex="0" aria-label="Requests, newest first">{rows}</ol>
<button type="button" id="older"{"" if more else " hidden"}>Show older requests</button></section>"""


def request_row(entry: SeenRequest, emails: Mapping[str, str]) -> str:
    """Return a request's row in the log. Opening the row loads the details."""
    query = f"?{entry.query}" if entry.query else ""
    refused = entry.status_code == 429 or entry.status_code is None
    if entry.status_code is not None:
        status = str(entry.status_code)
    else:
        status = "no response" if entry.seconds is not None else "\u2026"
    who = emails.get(entry.user_id or "", "unknown key" if entry.limit is not None else "")
    left = "" if entry.limit is None else f"{entry.remaining} left"
    cells = [
        f"<time>{_clock(entry.time)}</time>",
        f'<b class="method">{escape(entry.method)}</b>',
        f'<span class="path">{escape(entry.path + query)}</span>',
        f'<span class="status s{(entry.status_code or 0) // 100}">{status}</span>',
        f'<span class="ms">{_milliseconds(entry.seconds)}</span>',
        f'<span class="who">{escape(who)}</span>',
        f'<span class="left">{left}</span>',
    ]
    if entry.fault:
        cells.append(f'<span class="fault">fault: {escape(entry.fault)}</span>')
    return (
        f'<li id="r{entry.number}"{" class=refused" if refused else ""}><details>'
        f"<summary>{' '.join(cells)}</summary><div></div></details></li>"
    )


def request_details(entry: SeenRequest) -> str:
    """Return a request's headers and bodies, shown when its row is opened."""
    headers = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entry.headers.items()
    )
    return (
        f'<dl class="headers">{headers}</dl>'
        f"{_body('Request body', entry.request_body)}{_body('Response body', entry.response_body)}"
    )


def _body(title: str, body: str | None) -> str:
    if body is None:
        return f"<h3>{title}</h3><p class=hint>not available</p>"
    if not body:
        return f"<h3>{title}</h3><p class=hint>empty</p>"
    with contextlib.suppress(ValueError):  # not JSON or truncated: shown unchanged
        body = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    return f'<h3>{title}</h3><pre tabindex="0">{escape(body)}</pre>'


def _deliveries_section(view: View) -> str:
    rows = "".join(map(delivery_row, view.deliveries))
    return f"""<section aria-labelledby="deliveries-title"><h2 id="deliveries-title">Hook deliveries</h2>
<p class="empty" id="no-deliveries"{" hidden" if rows else ""}>None yet. Add a hook, then book a meeting.</p>
<ol id="deliveries" class="log" aria-label="Hook deliveries, newest first">{rows}</ol></section>"""


def delivery_row(entry: Delivery) -> str:
    """Return a delivery's row."""
    outcome = str(entry.status_code) if entry.status_code is not None else escape(entry.error or "")
    again = f" \u00b7 repeat of {entry.repeats}" if entry.repeats else ""
    title = escape(entry.response[:500])
    return (
        f'<li id="d{entry.number}"><div class="line"><time>{_clock(entry.time)}</time> '
        f'<span class="path">{escape(entry.target)}</span> '
        f'<span class="status s{(entry.status_code or 0) // 100}" title="{title}">{outcome}</span> '
        f'<span class="ms">{_milliseconds(entry.seconds)}</span> '
        f'<span class="who">{escape(entry.meeting_id)}{again}</span> '
        f'<form data-method="POST" data-url="deliveries/{entry.number}/repeat" data-done="Queued again.">'
        f"<button>Deliver again</button></form></div></li>"
    )


def _account_section(view: View) -> str:
    choices = "".join(
        f"<option value={index}{' selected' * (index == view.account)}>{escape(account.email)}</option>"
        for index, account in enumerate(view.accounts)
    )
    return f"""<section aria-labelledby="account-title"><h2 id="account-title">Account</h2>
<label>Account <select id="account">{choices}</select></label>
<pre id="environment">{escape(_environment(view.selected_account))}
export LEMCAL_BASE_URL={escape(view.base_url)}</pre>
<button type="button" data-copy="environment">Copy</button></section>"""


def _environment(account: SandboxAccount) -> str:
    return f"export LEMCAL_USER_ID={account.user_id}\nexport LEMCAL_API_KEY={account.api_key}"


def _book_section(view: View) -> str:
    types = "".join(
        f'<option value="{escape(row["_id"])}">{escape(row["name"])}</option>' for row in view.meeting_types
    )
    return f"""<section aria-labelledby="book-title"><h2 id="book-title">Book a meeting</h2>
<form id="book" class="fields" data-method="POST" data-url="bookings" data-done="Booked.">
<input type="hidden" name="account" value="{view.account}" data-number>
<label>Guest <input name="guest" placeholder="Ada Lovelace &lt;ada@example.org&gt;"></label>
<label>Meeting type <select name="meetingTypeId">{types}</select></label>
<label>Start <input type="datetime-local" name="start"></label>
<button class="primary">Book</button></form>
<p class="hint">Empty fields get made-up values.</p></section>"""


def meetings(view: View) -> str:
    """Return the list of meetings, latest booking first."""
    if not view.meetings:
        return '<p class="empty">No meetings. Book one.</p>'
    shown = list(reversed(view.meetings))[:MEETINGS_SHOWN]
    more = len(view.meetings) - len(shown)
    rest = f'<p class="hint">and {more} older meetings</p>' if more else ""
    return f'<ul class="rows" tabindex="0" aria-label="Meetings">{"".join(map(_meeting, shown))}</ul>{rest}'


def _meeting(row: Mapping[str, Any]) -> str:
    meeting_id, start = str(row["_id"]), _text(row.get("start"))
    kind = _text(row.get("meetingTypeName"))
    infos = row.get("providedInfos")
    guest = cast("dict[str, object]", infos).get("email") if isinstance(infos, dict) else None
    path = f"meetings/{escape(meeting_id)}"
    canceled = bool(row.get("canceledAt"))
    label = escape(f"{_text(guest)} on {start[:16]}")
    cancel = (
        '<span class="tag">canceled</span>'
        if canceled
        else f'<form data-method="POST" data-url="{path}/cancel" data-done="Canceled.">'
        f'<button aria-label="Cancel {label}">Cancel</button></form>'
    )
    return (
        f'<li id="{escape(meeting_id)}"{" class=canceled" if canceled else ""}>'
        f"<p><b>{escape(start[:16].replace('T', ' '))}</b> {escape(_text(guest))}<br>"
        f'<span class="hint">{escape(kind)} \u00b7 {escape(meeting_id)}</span></p>'
        f'<div class="actions">{cancel}'
        f'<details class="move"><summary aria-label="Move {label}">Move</summary>'
        f'<form data-method="PATCH" data-url="{path}" data-done="Moved." data-move="{_minutes(row)}">'
        f'<label>New start <input type="datetime-local" name="start" required></label>'
        f"<button>Move</button></form></details>"
        f'<form data-method="DELETE" data-url="{path}" data-done="Removed from the list.">'
        f'<button aria-label="Remove {label}">Remove</button></form></div></li>'
    )


def _minutes(row: Mapping[str, Any]) -> int:
    try:
        start, end = datetime.fromisoformat(row["start"]), datetime.fromisoformat(row["end"])
        return round((end - start).total_seconds() / 60)
    except (KeyError, TypeError, ValueError):  # a test may set any value
        return 30


def hooks(view: View) -> str:
    """Return the list of hooks, without their tokens, and the form that adds one."""
    rows = "".join(
        f'<li><p>{escape(without_secrets(_text(hook.get("targetUrl"))))}<br><span class="hint">'
        f"{'any meeting type' if hook.get('anyMeetingType') else escape(_text(hook.get('meetingTypeId')))}"
        f'</span></p><div class="actions"><form data-method="DELETE" data-url="hooks/{escape(hook["_id"])}" '
        f'data-done="Hook deleted."><button>Delete</button></form></div></li>'
        for hook in view.hooks
    )
    listed = f'<ul class="rows">{rows}</ul>' if rows else '<p class="empty">No hooks.</p>'
    return f"""{listed}
<form class="fields" data-method="POST" data-url="hooks" data-done="Hook added.">
<input type="hidden" name="account" value="{view.account}" data-number>
<label>Post new bookings to <input name="targetUrl" type="url" required
placeholder="http://localhost:8000/webhooks/lemcal?token=\u2026"></label><button>Add hook</button></form>"""


def _meeting_types(view: View) -> str:
    rows = "".join(
        f"<li><p>{escape(_text(row.get('name')))}, {escape(_text(row.get('duration')))} min<br>"
        '<span class="hint">'
        f"{escape(_text(row.get('_id')))} \u00b7 {escape(_text(row.get('status')))}</span></p></li>"
        for row in view.meeting_types
    )
    return f'<ul class="rows">{rows}</ul>'


def _fault_section() -> str:
    kinds = "".join(
        f'<option value="{name}" data-option="{choice.option}" data-value="{escape(choice.value)}"'
        f"{' data-number' if choice.number else ''} data-fixed='{_fixed(name)}'>{choice.label}</option>"
        for name, choice in FAULTS.items()
    )
    paths = "".join(f"<option>{path}</option>" for path in _PATHS)
    return f"""<section aria-labelledby="faults-title"><h2 id="faults-title">Inject a fault</h2>
<form id="fault" class="fields" data-method="POST" data-url="faults" data-done="Fault injected.">
<label>Fault <select name="fault">{kinds}</select></label>
<label><span id="option-label">retry_after</span> <input id="option" value="0.5"></label>
<label>Path <select name="path"><option value="">any</option>{paths}</select></label>
<label>Times <input name="times" type="number" min="1" value="1" data-number></label>
<button class="primary">Inject</button></form>
<div id="faults"></div></section>"""


def _fixed(name: str) -> str:
    return escape(json.dumps(_FIXED_OPTIONS.get(name, {})))


def faults(lines: Iterable[str]) -> str:
    """Return the list of pending faults."""
    rows = "".join(f"<li>{escape(line)}</li>" for line in lines)
    if not rows:
        return '<p class="hint">No pending faults.</p>'
    return (
        f'<ul class="rows plain">{rows}</ul>'
        '<form data-method="DELETE" data-url="faults" data-done="Cleared."><button>Clear</button></form>'
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _clock(time: datetime | None) -> str:
    if time is None:
        return ""
    return f"{time.astimezone(UTC):%H:%M:%S}.{time.microsecond // 1000:03d}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"
