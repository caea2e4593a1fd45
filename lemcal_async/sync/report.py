"""What a run has to report, and how it is summed up while the run goes on."""

from typing import Literal, TypeAlias

import attrs

from lemcal_async.errors import BadRow
from lemcal_async.sync.store import Counts

Stage: TypeAlias = Literal["fetch", "store", "delivery"]


@attrs.frozen
class Failure:
    """An account that failed, where, and why. ``user_id`` is None if the client itself cannot tell.

    At "delivery" the account's meetings are up to date, and what the handler did not take stays pending.
    """

    user_id: str | None
    stage: Stage
    error: Exception


@attrs.frozen
class UnreadableRow:
    """A row of an account's list that could not be read. With an ``_id`` it is kept all the same."""

    user_id: str
    row: BadRow


@attrs.frozen
class SyncReport:
    """What a run came to: accounts, meetings by what became of them, changes delivered, seconds."""

    accounts: int
    failed: int
    created: int
    changed: int
    canceled: int
    disappeared: int
    restored: int
    unchanged: int
    delivered: int
    seconds: float
    failures: tuple[Failure, ...] = ()
    unreadable_rows: tuple[UnreadableRow, ...] = ()


class Tally:
    """The sums of a run, or of one account's part in it."""

    def __init__(self) -> None:
        self.accounts = 0
        self.failed = 0
        self.delivered = 0
        self.failures: list[Failure] = []
        self.unreadable_rows: list[UnreadableRow] = []
        self.counts = Counts()

    def fail(self, user_id: str | None, stage: Stage, error: Exception) -> None:
        """Note a failure."""
        # The frames hold whole lists, and a run may have thousands of failures.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self.failures.append(Failure(user_id, stage, error))

    def add(self, account: "Tally") -> None:
        """Add what became of one account."""
        self.accounts += 1
        self.failed += bool(account.failures)
        self.delivered += account.delivered
        self.failures += account.failures
        self.unreadable_rows += account.unreadable_rows
        ours, its = attrs.asdict(self.counts), attrs.asdict(account.counts)
        self.counts = Counts(**{name: ours[name] + its[name] for name in ours})

    def report(self, seconds: float) -> SyncReport:
        """Return the report."""
        return SyncReport(
            accounts=self.accounts,
            failed=self.failed,
            **attrs.asdict(self.counts),
            delivered=self.delivered,
            seconds=seconds,
            failures=tuple(self.failures),
            unreadable_rows=tuple(self.unreadable_rows),
        )
