"""``lemcal hooks``: have new bookings posted to a URL, and stop it.

The URL usually carries a token, so it can be read from standard input, and is never printed whole.
"""

import sys
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

import attrs
import typer

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import to_wire
from lemcal_async._urls import check_target_url, is_loopback, without_secrets
from lemcal_async.cli._options import (
    AccountName,
    AccountsFile,
    AsJson,
    BaseUrl,
    Service,
    UseSandbox,
    call,
)
from lemcal_async.cli._output import emit, print_facts, print_json, short_time, tell
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Hook

hooks_app = typer.Typer(help="Create and delete webhooks, which post new bookings to a URL.")


@hooks_app.command()
def create(
    target_url: Annotated[
        str, typer.Argument(metavar="TARGET_URL", help="Where to post new bookings, or - for standard input.")
    ],
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="For this meeting type (met_...).")
    ] = None,
    any_type: Annotated[bool, typer.Option("--any", help="For any meeting type.")] = False,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Do not fail if there is already such a hook.")
    ] = False,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Create a hook. Keep the id that it prints: hooks cannot be listed, and only the id deletes one.

    With - as TARGET_URL, the URL is read from standard input. Do that if it carries a token: other users
    of this machine can see command-line arguments. The output leaves the token out, with --json too.
    """
    if (meeting_type is None) == (not any_type):
        raise ConfigurationError("choose the meetings: either --type ID or --any")
    service = Service(base_url, sandbox, accounts, account)
    target = target_url_of(target_url)

    async def created(lemcal: AsyncLemcal) -> Hook | None:
        return await lemcal.hooks.create(
            target.reveal(), meeting_type_id=meeting_type, any_meeting_type=any_type, exist_ok=exist_ok
        )

    _print_hook(call(service, "Creating the hook", created), as_json=json)


@hooks_app.command()
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


def target_url_of(argument: str, name: str = "target_url") -> Secret[str]:
    """Return the checked target, from standard input if the argument is ``-``."""
    if argument == "-":
        return check_target_url(Secret(_line_of_input()), name)
    target = check_target_url(Secret(argument), name)
    is_local = is_loopback(urlsplit(target.reveal()).hostname or "")
    if not is_local and any(value for _, value in parse_qsl(urlsplit(target.reveal()).query)):
        tell(
            "warning: the URL has a query, and other users of this machine can see command-line arguments; "
            "if that is a token, pass - and give the URL on standard input"
        )
    return target


def _line_of_input() -> str:
    if sys.stdin.isatty():
        tell("type the target URL, then Enter:")
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError:
        return ""  # rejected as not a URL


def _print_hook(hook: Hook | None, *, as_json: bool) -> None:
    """Print the hook (None: it existed before), without what may be secret in its target."""
    target = without_secrets((hook and hook.target_url) or "")
    if as_json:
        print_json(hook and to_wire(attrs.evolve(hook, target_url=target or None)))
    elif hook is None:
        emit("There is already such a hook. Its id cannot be looked up.\n")
    else:
        print_facts(
            [
                ("Hook id", f"{hook.id}  (keep it: it cannot be listed)"),
                ("Target", target),
                ("Meetings", "of any type" if hook.any_meeting_type else hook.meeting_type_id),
                ("Created (UTC)", short_time(hook.created_at)),
            ]
        )
