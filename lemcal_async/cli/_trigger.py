"""``lemcal trigger``: book, cancel or move a meeting in a running sandbox."""

import json as json_module
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from email.utils import parseaddr
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import httpx
import typer

from lemcal_async._codec import write_time
from lemcal_async._urls import BASE_URL_VARIABLE, quote_id
from lemcal_async.cli._calls import parse_time
from lemcal_async.cli._output import emit, print_json, printable
from lemcal_async.errors import APIConnectionError, ConfigurationError, MeetingNotFoundError

_TIMEOUT: Final = 30.0

Kind = Literal["booking", "cancel", "move"]

# The options that an action accepts, beside those that all accept.
_OPTIONS: Final[Mapping[Kind, frozenset[str]]] = {
    "booking": frozenset({"--guest", "--start"}),
    "cancel": frozenset({"MEETING_ID"}),
    "move": frozenset({"MEETING_ID", "--start"}),
}


def trigger(
    kind: Annotated[Kind, typer.Argument(metavar="ACTION", help="The action.")],
    meeting_id: Annotated[
        str | None,
        typer.Argument(
            metavar="MEETING_ID", help="For cancel and move. Defaults to the account's meeting booked last."
        ),
    ] = None,
    *,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help=f"The sandbox's URL. Defaults to {BASE_URL_VARIABLE}."),
    ] = None,
    account: Annotated[
        int | None,
        typer.Option(
            "--account", metavar="N", min=1, help="The account's number. Defaults to 1, the first account."
        ),
    ] = None,
    guest: Annotated[
        str | None,
        typer.Option(
            "--guest", metavar="EMAIL", help="For booking: the guest's address, or 'NAME <ADDRESS>'."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--start", metavar="TIME", help="For booking and move: the new start time."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the meeting as JSON.")] = False,
) -> None:
    """Book, cancel or move a meeting in a running sandbox.

    TIME is a date or a time; without an offset it is UTC. Without --start, move postpones the meeting by a
    day.
    """
    for name, value in (("MEETING_ID", meeting_id), ("--guest", guest), ("--start", start)):
        if value is not None and name not in _OPTIONS[kind]:
            raise ConfigurationError(f"{kind} does not accept {name}; omit it")
    if meeting_id is not None and account is not None:
        raise ConfigurationError("MEETING_ID already identifies the account; omit --account")
    if guest is not None and not all(parseaddr(guest)[1].partition("@")):
        raise ConfigurationError(
            "--guest must be an e-mail address, such as ada@example.org or 'Ada <ada@example.org>'"
        )
    start_time = parse_time("--start", start)
    sandbox_url = url or os.environ.get(BASE_URL_VARIABLE, "").strip()
    if not sandbox_url:
        raise ConfigurationError(f"no sandbox URL: pass --url or set {BASE_URL_VARIABLE}")
    with _Control(sandbox_url) as control:
        if kind == "booking":
            options = {
                "account": control.account_index(account),
                "guest": guest,
                "start": start_time and write_time(start_time),
            }
            body = {name: value for name, value in options.items() if value is not None}
            row = control.call("POST", "/bookings", body)
        else:
            if meeting_id is None:
                meeting_id = control.latest_meeting_id(control.account_index(account))
            path = f"/meetings/{quote_id(meeting_id, 'MEETING_ID')}"
            if kind == "cancel":
                row = control.call("POST", f"{path}/cancel", {})
            else:
                meeting = control.call("PATCH", path, {})  # returns the meeting unchanged
                row = control.call("PATCH", path, _new_times(meeting, start_time))
    if json:
        print_json(row)
        return
    verb = {"booking": "booked", "cancel": "canceled", "move": "moved"}[kind]
    emit(printable(f"{verb} {row.get('_id')}, starting at {row.get('start')}") + "\n")


class _Control:
    """A client for the controls of a running sandbox. It sends no credentials."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise ConfigurationError("the sandbox's URL must look like http://127.0.0.1:8080")
        self._root = f"{parts.scheme}://{parts.netloc}"
        self._client = httpx.Client(trust_env=False, timeout=_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def call(self, method: str, path: str, body: Mapping[str, Any]) -> Any:
        """Call a control and return the JSON of its response."""
        try:
            content = None if method == "GET" else json_module.dumps(body)
            response = self._client.request(method, f"{self._root}/_sandbox{path}", content=content)
        except httpx.TransportError as error:
            raise APIConnectionError(
                f"cannot reach a sandbox at {self._root} ({type(error).__name__}); is it running?"
            ) from None
        is_json = response.headers.get("content-type", "").startswith("application/json")
        if response.status_code == 404 and response.text.startswith("there is no meeting"):
            raise MeetingNotFoundError(response.text, status_code=404)
        if response.status_code in (400, 404) and not is_json and len(response.text) < 300:
            raise ConfigurationError(response.text or f"there is no sandbox at {self._root}")
        if not (response.is_success and is_json):
            raise ConfigurationError(f"there is no sandbox at {self._root}")
        return response.json()

    def account_index(self, number: int | None) -> int:
        """Return the index of the account with this number, by default the first, whose number is 1."""
        if number is None:
            return 0
        count = len(self.call("GET", "/accounts", {}))
        if number > count:
            raise ConfigurationError(
                f"there is no account {number}; the sandbox has {count}, and the first is --account 1"
            )
        return number - 1

    def latest_meeting_id(self, account: int) -> str:
        """Return the id of the account's most recently booked meeting that is not canceled."""
        rows: list[dict[str, Any]] = self.call("GET", f"/meetings?account={account}", {})
        booked = [row for row in rows if not row.get("canceledAt")]
        if not booked:
            raise MeetingNotFoundError("the account has no meeting that is not canceled", status_code=404)
        return str(booked[-1]["_id"])


def _new_times(meeting: Mapping[str, Any], start: datetime | None) -> dict[str, str]:
    """Return the new times of a meeting, a day later by default. Its duration does not change."""
    old = [datetime.fromisoformat(meeting[name]) for name in ("start", "end")]
    try:
        new_start = old[0] + timedelta(days=1) if start is None else start
        return {"start": write_time(new_start), "end": write_time(new_start + (old[1] - old[0]))}
    except OverflowError:
        raise ConfigurationError(
            "the meeting's new times are out of range; pass an earlier --start"
        ) from None
