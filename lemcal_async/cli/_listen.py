"""``lemcal listen``: receive lemcal's webhooks on your own machine, without a public URL."""

import json as json_module
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Final, NoReturn

import anyio
import attrs
import httpx
import typer

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._urls import without_secrets
from lemcal_async._version import __version__
from lemcal_async.cli._calls import read_target_url
from lemcal_async.cli._options import (
    AccountName,
    AccountsFile,
    BaseUrl,
    Service,
    UseSandbox,
    connect,
    find_target,
)
from lemcal_async.cli._output import ExitStatus, emit, print_message, printable
from lemcal_async.errors import MeetingNotFoundError
from lemcal_async.sync import Change, MemoryStore, sync_meetings

EVENT_HEADER: Final = "X-Lemcal-Async-Event"
"""The kind of change, sent with --all. lemcal itself announces new bookings only and sends no such header."""

_ATTEMPTS: Final = 5
_FIRST_DELAY: Final = 1.0  # seconds; doubled after each attempt, unless the response has a Retry-After
_MAX_DELAY: Final = 30.0
_TIMEOUT: Final = 30.0
_MAX_POLL_INTERVAL: Final = 60.0  # seconds between polls while the service fails


def listen(
    *,
    forward_to: Annotated[
        str,
        typer.Option("--forward-to", metavar="URL", help="Where to post bookings, or - for standard input."),
    ],
    all_changes: Annotated[
        bool,
        typer.Option(
            "--all",
            help=f"Also post changes, cancellations and disappearances, each with the header {EVENT_HEADER}.",
        ),
    ] = False,
    replay: Annotated[
        str | None, typer.Option("--replay", metavar="MEETING_ID", help="Post this meeting now and exit.")
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="How often to poll for bookings.")
    ] = 5.0,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Forward new bookings to a local service until Ctrl-C.

    The command polls the account's list of meetings with bulk priority and posts each new booking as lemcal's
    webhook would. It needs no public URL and registers no hook. If there is no response, or a 429 or 5xx, it
    retries, up to 5 attempts in all, after the response's Retry-After or after 1, 2, 4 and 8 seconds.
    """
    service = Service(base_url, sandbox, accounts, account)
    target = read_target_url(forward_to, "--forward-to")
    with find_target(service) as service_target:

        async def main() -> ExitStatus:
            async with connect(service_target) as lemcal, _open_forwarder(target, all_changes) as forwarder:
                if replay is not None:
                    return await _replay(lemcal, replay, forwarder)
                return await _watch(lemcal.with_options(priority="bulk"), forwarder, interval)

        if sandbox and replay is None:
            root = service_target.base_url.removesuffix("/api/lemcal")
            print_message(f"the sandbox is at {root}; to book a meeting: lemcal trigger booking --url {root}")
        status = anyio.run(main)
    if status:
        raise typer.Exit(status)


async def _watch(lemcal: AsyncLemcal, forwarder: "_Forwarder", interval: float) -> NoReturn:
    store, failures = MemoryStore(), 0
    await lemcal.me()  # exit if the credentials are wrong; later failures are only reported
    emit(f"{_timestamp()} watching {lemcal.user_id}, posting to {forwarder.display_url}\n")
    while True:
        report = await sync_meetings([lemcal], store, on_change=forwarder.forward, baseline=True)
        for failure in report.failures:
            print_message(f"{_timestamp()} {failure.error}")
        failures = failures + 1 if report.failed else 0
        await anyio.sleep(min(interval * 2 ** min(failures, 10), max(_MAX_POLL_INTERVAL, interval)))


async def _replay(lemcal: AsyncLemcal, meeting_id: str, forwarder: "_Forwarder") -> ExitStatus:
    for row in await lemcal.meetings.rows():
        if isinstance(row, dict) and row.get("_id") == meeting_id:  # pyright: ignore[reportUnknownMemberType]  # JSON
            delivered = await forwarder.post("replay", meeting_id, row)  # pyright: ignore[reportUnknownArgumentType]
            return ExitStatus.OK if delivered else ExitStatus.FAILED
    problem = f"GET /meetings: the list contains no meeting {meeting_id!r}; check the id"
    raise MeetingNotFoundError(problem, status_code=404)


@asynccontextmanager
async def _open_forwarder(target: Secret[str], all_changes: bool) -> AsyncGenerator["_Forwarder"]:  # noqa: FBT001
    # Not a client, which would log the target URL with its token.
    async with httpx.AsyncHTTPTransport(trust_env=False) as transport:
        yield _Forwarder(transport, target, all_changes)


@attrs.frozen
class _Forwarder:
    """Posts meetings to the target, one at a time, and prints a line per attempt."""

    transport: httpx.AsyncBaseTransport
    target: Secret[str]
    all_changes: bool
    sleep: Callable[[float], Any] = anyio.sleep

    @property
    def display_url(self) -> str:
        """The target URL without its token."""
        return without_secrets(self.target.reveal())

    async def forward(self, change: Change) -> None:
        """Post a change if it is a new booking, or if all changes are forwarded."""
        if change.kind == "created" or self.all_changes:
            await self.post(change.kind, change.meeting_id, change.wire)

    async def post(self, kind: str, meeting_id: str, row: Mapping[str, Any]) -> bool:
        """Post a meeting, retrying while that can help; return whether it was accepted."""
        headers = {"Content-Type": "application/json", "User-Agent": f"lemcal-listen/{__version__}"}
        if self.all_changes:
            headers[EVENT_HEADER] = kind
        body = json_module.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
        delay = _FIRST_DELAY
        for attempt in range(1, _ATTEMPTS + 1):
            started = anyio.current_time()
            status, outcome, retry_after = await self._attempt(headers, body)
            duration = f"{(anyio.current_time() - started) * 1000:.0f} ms"
            emit(printable(f"{_timestamp()} {kind} {meeting_id} {outcome} {duration}") + "\n")
            if status is not None and status != 429 and status < 500:
                return status < 300
            if attempt < _ATTEMPTS:
                await self.sleep(min(delay if retry_after is None else retry_after, _MAX_DELAY))
                delay *= 2
        print_message(
            f"gave up on {meeting_id} after {_ATTEMPTS} attempts; send it again with --replay {meeting_id}"
        )
        return False

    async def _attempt(self, headers: Mapping[str, str], body: bytes) -> tuple[int | None, str, float | None]:
        timeout = httpx.Timeout(_TIMEOUT).as_dict()
        request = httpx.Request(
            "POST", self.target.reveal(), content=body, headers=headers, extensions={"timeout": timeout}
        )
        try:
            with anyio.fail_after(_TIMEOUT):
                response = await self.transport.handle_async_request(request)
                await response.aclose()
        except (httpx.TransportError, TimeoutError) as error:
            return None, f"no response ({type(error).__name__})", None
        status = response.status_code
        return status, str(status), _parse_retry_after(response.headers.get("retry-after"))


def _parse_retry_after(retry_after: str | None) -> float | None:
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _timestamp() -> str:
    return f"{datetime.now(UTC).astimezone():%H:%M:%S}"
