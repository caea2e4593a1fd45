"""``lemcal hooks``: have new bookings posted to a URL, and stop it.

The URL usually carries a token, so it can be read from standard input, and is never printed whole.
"""

import sys
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

import attrs
import typer

from lemcal_async.cli.exits import tell, without_secrets
from lemcal_async.cli.listing import AsJson, short_time
from lemcal_async.cli.output import emit, print_facts, print_json
from lemcal_async.cli.session import AccountName, AccountsFile, BaseUrl, Service, UseSandbox, call
from lemcal_async.client import AsyncLemcal
from lemcal_async.codec import to_wire
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Hook
from lemcal_async.urls import check_target_url

app = typer.Typer(help="Have new bookings posted to a URL, and stop it.")


@app.command()
def create(
    target_url: Annotated[
        str, typer.Argument(metavar="TARGET_URL", help="Where new bookings are posted to, or -.")
    ],
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="For this meeting type (met_...).")
    ] = None,
    any_type: Annotated[bool, typer.Option("--any", help="For any meeting type.")] = False,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Do not fail if the target has such a hook already.")
    ] = False,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Create a hook. Keep the id that is printed: hooks cannot be listed, and only the id deletes one.

    With - as TARGET_URL, the URL is read from standard input. Do that if it carries a token: other users
    of this machine can see arguments. What is printed leaves the token out, with --json too.
    """
    if (meeting_type is None) == (not any_type):
        raise ConfigurationError("choose the meetings: either --type ID or --any")
    service = Service(base_url, sandbox, accounts, account)
    target = _target(target_url)

    async def created(lemcal: AsyncLemcal) -> Hook | None:
        return await lemcal.hooks.create(
            target, meeting_type_id=meeting_type, any_meeting_type=any_type, exist_ok=exist_ok
        )

    _print(call(service, "Creating the hook", created), as_json=json)


@app.command()
def delete(
    hook_id: Annotated[
        str, typer.Argument(metavar="HOOK_ID", help="The id that 'create' printed (hoo_...).")
    ],
    *,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Delete a hook."""
    service = Service(base_url, sandbox, accounts, account)

    async def deleted(lemcal: AsyncLemcal) -> str:
        await lemcal.hooks.delete(hook_id)
        return f"Hook {hook_id} is deleted.\n"

    emit(call(service, "Deleting the hook", deleted))


def _target(argument: str) -> str:
    """Return the checked target, from standard input if the argument says so."""
    if argument == "-":
        return check_target_url(_line_of_input())
    target = check_target_url(argument)
    if any(value for _, value in parse_qsl(urlsplit(target).query)):
        tell(
            "warning: the URL has a query, and other users of this machine can see arguments; "
            "if that is a token, give - and the URL on standard input"
        )
    return target


def _line_of_input() -> str:
    if sys.stdin.isatty():
        tell("the target URL, then Enter:")
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError:
        return ""  # refused as no URL


def _print(hook: Hook | None, *, as_json: bool) -> None:
    """Print the hook, None if there was one already, without what may be secret in its target."""
    target = without_secrets((hook and hook.target_url) or "")
    if as_json:
        print_json(hook and to_wire(attrs.evolve(hook, target_url=target or None)))
    elif hook is None:
        emit("There is such a hook already. Its id cannot be looked up.\n")
    else:
        print_facts(
            [
                ("Hook id", f"{hook.id}  (keep it: it cannot be listed)"),
                ("Target", target),
                ("Meetings", "of any type" if hook.any_meeting_type else hook.meeting_type_id),
                ("Created (UTC)", short_time(hook.created_at)),
            ]
        )
