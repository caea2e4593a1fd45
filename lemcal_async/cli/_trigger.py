"""``lemcal trigger``: book, cancel or move a meeting in a running sandbox."""

import json as json_module
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import quote, urlsplit

import httpx
import typer

from lemcal_async._codec import write_time
from lemcal_async._urls import BASE_URL_VARIABLE
from lemcal_async.cli._output import emit, print_json, printable
from lemcal_async.errors import APIConnectionError, ConfigurationError, MeetingNotFoundError

_TIMEOUT: Final = 30.0

Kind = Literal["booking", "cancel", "move"]


def trigger(
    kind: Annotated[Kind, typer.Argument(metavar="booking|cancel|move", help="The action.")],
    meeting_id: Annotated[
        str | None, typer.Argument(metavar="[MEETING_ID]", help="Defaults to the meeting booked last.")
    ] = None,
    *,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help=f"The sandbox's URL. Defaults to {BASE_URL_VARIABLE}."),
    ] = None,
    account: Annotated[
        int, typer.Option("--account", metavar="N", min=1, help="The account's number; the first is 1.")
    ] = 1,
    guest: Annotated[
        str | None, typer.Option("--guest", metavar="EMAIL", help="The guest's address, or 'NAME <ADDRESS>'.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--start", metavar="TIME", help="The start time (ISO 8601)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the meeting as JSON.")] = False,
) -> None:
    """Book, cancel or move a meeting in a running sandbox.

    Without --start, move postpones the meeting by a day.
    """
    sandbox_url = url or os.environ.get(BASE_URL_VARIABLE, "").strip()
    if not sandbox_url:
        raise ConfigurationError(f"no sandbox URL: pass --url or set {BASE_URL_VARIABLE}")
    with _Control(sandbox_url) as control:
        if kind == "booking":
            options = {"account": account - 1, "guest": guest, "start": start}
            body = {name: value for name, value in options.items() if value is not None}
            row = control.call("POST", "/bookings", body)
        else:
            chosen_id = meeting_id or control.latest_meeting_id(account - 1)
            path = f"/meetings/{quote(chosen_id, safe='')}"
            if kind == "cancel":
                row = control.call("POST", f"{path}/cancel", {})
            else:
                row = control.call("PATCH", path, control.new_times(chosen_id, account - 1, start))
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

    def latest_meeting_id(self, account: int) -> str:
        """Return the id of the account's most recently booked meeting that is not canceled."""
        booked = [row for row in self._meetings(account) if not row.get("canceledAt")]
        if not booked:
            raise MeetingNotFoundError("the account has no meeting that is not canceled", status_code=404)
        return str(booked[-1]["_id"])

    def new_times(self, meeting_id: str, account: int, start: str | None) -> dict[str, str]:
        """Return the new times of a meeting, a day later by default. Its duration does not change."""
        rows = {row["_id"]: row for row in self._meetings(account)}
        if meeting_id not in rows:
            raise MeetingNotFoundError(f"there is no meeting {meeting_id}", status_code=404)
        old = [datetime.fromisoformat(rows[meeting_id][name]) for name in ("start", "end")]
        new_start = old[0] + timedelta(days=1) if start is None else _parse_start(start)
        new_end = new_start + (old[1] - old[0])
        return {"start": write_time(new_start), "end": write_time(new_end)}

    def _meetings(self, account: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.call("GET", f"/meetings?account={account}", {})
        return rows


def _parse_start(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise ConfigurationError("--start must be ISO 8601 with an offset, such as 2026-03-02T09:00:00Z")
    return time
