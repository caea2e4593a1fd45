"""``lemcal sandbox``: a local server that behaves like lemcal, with demo accounts and a web page."""

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemcal_async.cli._calls import read_target_url
from lemcal_async.cli._options import load_sandbox
from lemcal_async.cli._output import ExitStatus, emit, printable
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.sandbox import Delivery, Sandbox, SeenRequest


def sandbox(
    *,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="The port; 0 picks a free one.")
    ] = 0,
    accounts: Annotated[
        int, typer.Option("--accounts", min=1, metavar="N", help="The number of accounts.")
    ] = 1,
    meetings: Annotated[
        int, typer.Option("--meetings", min=0, metavar="N", help="The number of meetings per account.")
    ] = 12,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="The requests allowed per key per 2 seconds.")
    ] = 20,
    no_limit: Annotated[bool, typer.Option("--no-limit", help="Disable the rate limit.")] = False,
    latency: Annotated[
        str,
        typer.Option("--latency", metavar="MS", help="The round-trip time in ms, such as 50 or 40-200."),
    ] = "0",
    hook: Annotated[
        str | None,
        typer.Option("--hook", metavar="URL", help="Post new bookings to this URL, or - for standard input."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The seed of the random demo data.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print a line per request.")] = False,
) -> None:
    """Serve a sandbox with demo data until Ctrl-C.

    The sandbox behaves like lemcal. Open the URL it prints in a browser to watch requests, book and cancel
    meetings, and inject faults.
    """
    options: dict[str, Any] = {
        "accounts": accounts,
        "meetings": meetings,
        "limit": None if no_limit else limit,
        "latency": _parse_latency(latency),
        "seed": seed,
    }
    instance = load_sandbox()(**options)
    from lemcal_async.sandbox import run  # noqa: PLC0415  # in the same extra

    if hook is not None:
        _add_hooks(instance, hook)
    try:
        run(instance, host, port, _print_credentials, None if quiet else ActivityPrinter(instance).print)
    except OSError as error:
        problem = error.strerror
    else:
        raise typer.Exit(ExitStatus.INTERRUPTED)
    raise ConfigurationError(f"cannot listen on host {host}, port {port}: {problem}")


def _parse_latency(milliseconds: str) -> tuple[float, float]:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:-\s*(\d+(?:\.\d+)?))?\s*", milliseconds)
    shortest, longest = (float(found[1]), float(found[2] or found[1])) if found else (1.0, 0.0)
    if shortest > longest:
        raise ConfigurationError("--latency must be milliseconds, such as 50 or 40-200")
    return shortest / 1000, longest / 1000


def _add_hooks(sandbox: "Sandbox", argument: str) -> None:
    target = read_target_url(argument, "--hook")
    for account in range(len(sandbox.accounts)):
        sandbox.add_hook(target.reveal(), account)


def _print_credentials(sandbox: "Sandbox") -> None:
    """Print the sandbox's URL, and for each account a block of lines to paste into a shell."""
    lines = [f"# Sandbox running (Ctrl-C stops it); open {sandbox.url} in a browser"]
    for account in sandbox.accounts:
        lines += [
            f"# {account.email}",
            f"export LEMCAL_USER_ID={account.user_id}",
            f"export LEMCAL_API_KEY={account.api_key}",
            f"export LEMCAL_BASE_URL={sandbox.base_url}",  # or clients would send the key to lemcal
        ]
    lines.append("# Paste an account's export lines into another shell, then try: lemcal me")
    emit("\n".join(lines) + "\n")


class ActivityPrinter:
    """Prints a line for each finished request and hook delivery."""

    def __init__(self, sandbox: "Sandbox") -> None:
        from lemcal_async.sandbox import SeenRequest  # noqa: PLC0415  # another extra

        self._request_type = SeenRequest
        self._emails = {account.user_id: account.email for account in sandbox.accounts}

    def print(self, entry: "SeenRequest | Delivery") -> None:
        """Print a line for the entry."""
        line = self._request(entry) if isinstance(entry, self._request_type) else self._delivery(entry)
        emit(f"{printable(line)}\n")

    def _request(self, entry: "SeenRequest") -> str:
        query = f"?{entry.query}" if entry.query else ""
        email = self._emails.get(entry.user_id or "", "unknown key" if entry.limit is not None else "")
        remaining = "" if entry.limit is None else f"{entry.remaining} of {entry.limit} left"
        fault = f"fault: {entry.fault}" if entry.fault else ""
        details = [email, remaining, fault]
        status = entry.status_code or "no response"
        head = f"{_timestamp(entry.time)} {entry.method:<6} {entry.path}{query} {status} {_ms(entry.seconds)}"
        return "  ".join([head, *filter(None, details)])

    def _delivery(self, entry: "Delivery") -> str:
        outcome = entry.status_code or entry.error
        redelivery = f"  repeats delivery {entry.repeats}" if entry.repeats else ""
        head = f"{_timestamp(entry.time)} HOOK   {entry.target} {outcome} {_ms(entry.seconds)}"
        return f"{head}  {entry.meeting_id}{redelivery}"


def _timestamp(time: datetime | None) -> str:
    return "" if time is None else f"{time.astimezone():%H:%M:%S}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"
