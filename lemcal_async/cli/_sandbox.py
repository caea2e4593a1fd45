"""``lemcal sandbox``: a lemcal on this machine, with invented accounts."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lemcal_async.cli._options import load_sandbox
from lemcal_async.cli._output import emit
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.sandbox import Sandbox


def sandbox(
    *,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")
    ] = 0,
    accounts: Annotated[
        int, typer.Option("--accounts", min=1, metavar="N", help="How many accounts there are.")
    ] = 1,
    meetings: Annotated[
        int, typer.Option("--meetings", min=0, metavar="N", help="How many meetings each account has.")
    ] = 12,
    no_limit: Annotated[bool, typer.Option("--no-limit", help="Without the rate limit.")] = False,
) -> None:
    """Serve a service that behaves as lemcal does, with invented data, until Ctrl-C."""
    make = partial(load_sandbox(), accounts=accounts, meetings=meetings)
    from lemcal_async.sandbox import run  # noqa: PLC0415  # another extra, which is there as it seems

    try:
        run(make(limit=None) if no_limit else make(), host, port, _introduce)
    except OSError as error:
        problem = error.strerror
    else:
        return
    raise ConfigurationError(f"cannot listen on host {host}, port {port}: {problem}")


def _introduce(sandbox: "Sandbox") -> None:
    """Say where it is and who can use it, in lines to be copied into a shell."""
    lines = [f"# The sandbox: lemcal me --base-url {sandbox.base_url}    (Ctrl-C ends it)"]
    for account in sandbox.accounts:
        lines += [
            f"# {account.email}",
            f"export LEMCAL_USER_ID={account.user_id}",
            f"export LEMCAL_API_KEY={account.api_key}",
        ]
    emit("\n".join(lines) + "\n")
