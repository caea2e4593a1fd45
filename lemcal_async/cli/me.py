"""``lemcal me``: which account the credentials belong to."""

from lemcal_async.cli.listing import AsJson, short_time
from lemcal_async.cli.output import print_facts, print_json
from lemcal_async.cli.session import AccountName, AccountsFile, BaseUrl, Service, UseSandbox, call
from lemcal_async.client import AsyncLemcal
from lemcal_async.codec import to_wire
from lemcal_async.models import User


def me(
    *,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Show the account that the credentials belong to."""
    service = Service(base_url, sandbox, accounts, account)
    _print(call(service, "Asking who you are", AsyncLemcal.me), as_json=json)


def _print(user: User, *, as_json: bool) -> None:
    if as_json:
        print_json(to_wire(user))
        return
    # Where guests book, as was observed; the pages of the meeting types are below it.
    page = user.public_identifier and f"https://app.lemcal.com/@{user.public_identifier}"
    created = short_time(user.created_at)
    facts = [("User id", user.id), ("E-mail", user.email), ("Booking page", page), ("Since (UTC)", created)]
    print_facts(facts)
