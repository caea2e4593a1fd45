"""The report of a run, how it is summed up, and which failures are logged."""

import logging
from typing import Final, Literal, TypeAlias

import attrs

from lemcal_async.errors import BadRow, LemcalError
from lemcal_async.sync._diff import Counts

logger = logging.getLogger("lemcal_async.sync")

Stage: TypeAlias = Literal["fetch", "store", "delivery"]
"""Where an account failed: at the service, in the store, or in a handler."""

_STAGES: Final[dict[Stage, str]] = {
    "fetch": "its meetings could not be fetched",
    "store": "the store failed",
    "delivery": "the handler failed",
}


@attrs.frozen
class Failure:
    """An account that failed.

    Attributes:
        user_id: The account; None if the client itself cannot tell.
        stage: Where it failed. At ``"delivery"`` a handler raised: the account's meetings are up to date, and
            what the handler did not take stays pending, or is parked.
        error: Why it failed.
    """

    user_id: str | None
    stage: Stage
    error: Exception

    def __str__(self) -> str:
        said = self.error if isinstance(self.error, LemcalError) else error_text(self.error)
        return f"account {self.user_id or 'without a user id'}: {_STAGES[self.stage]}: {said}"


@attrs.frozen
class UnreadableRow:
    """A row of an account's list that was not stored. At most 1,000 of an account are reported.

    Attributes:
        user_id: The account.
        row: The row, and what is wrong with it.
    """

    user_id: str
    row: BadRow


@attrs.frozen
class SyncReport:
    """The outcome of a run.

    Attributes:
        accounts: How many accounts there were.
        failed: How many of them failed.
        created: Meetings that are new.
        changed: Meetings that differ from what they were.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer in the list.
        restored: Meetings that are back.
        unchanged: Meetings that are as they were.
        delivered: Changes that a handler took.
        seconds: How long the run took.
        parked: Changes that were set aside in this run, because the handler raised for them too often.
        failures: What failed, and why.
        unreadable_rows: Rows that were not stored, and why.
    """

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
    parked: int = 0
    failures: tuple[Failure, ...] = ()
    unreadable_rows: tuple[UnreadableRow, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise the error of each failure, if any account failed.

        Raises:
            ExceptionGroup: Of those errors; a note on each names its account.
        """
        if len(self.failures) == 0:
            return
        for failure in self.failures:
            note = f"account {failure.user_id or 'without a user id'}: {_STAGES[failure.stage]}"
            if note not in getattr(failure.error, "__notes__", ()):
                failure.error.add_note(note)
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        raise ExceptionGroup(
            f"{self.failed} of {self.accounts} accounts failed: {self.failures[0]}{more}",
            [failure.error for failure in self.failures],
        )


class ReportBuilder:
    """Sums up a run, or one account's part of it."""

    def __init__(self) -> None:
        self.accounts = 0
        self.failed = 0
        self.delivered = 0
        self.parked = 0
        self.failures: list[Failure] = []
        self.unreadable_rows: list[UnreadableRow] = []
        self.counts = Counts()

    def add(self, account: "ReportBuilder") -> None:
        """Add the outcome of one account."""
        self.accounts += 1
        self.failed += bool(account.failures)
        self.delivered += account.delivered
        self.parked += account.parked
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
            parked=self.parked,
            failures=tuple(self.failures),
            unreadable_rows=tuple(self.unreadable_rows),
        )


class FailureLog:
    """Logs a failure when it is new or has another cause, not in every round of ``watch``.

    An account that fails is a warning, without a traceback if the error says it all; a handler that raises is
    an error with its traceback.
    """

    def __init__(self) -> None:
        self._causes: dict[tuple[object, Stage], object] = {}

    def failed(self, failure: Failure, about: object = None) -> None:
        """Log a failure, and let go of its frames: they hold whole lists, and a run may fail often.

        ``about`` is what else makes it another failure than the last one.
        """
        error = failure.error
        cause = (type(error), getattr(error, "status_code", None), about)
        # Failures without a user id cannot be told apart: each cause counts as an account of its own.
        key = (failure.user_id or cause, failure.stage)
        if self._causes.get(key) != cause:
            self._causes[key] = cause
            level = logging.ERROR if failure.stage == "delivery" else logging.WARNING
            says_it_all = failure.stage != "delivery" and isinstance(error, LemcalError)
            logger.log(level, "%s", failure, exc_info=None if says_it_all else error)
        error.__traceback__ = error.__context__ = error.__cause__ = None

    def finished(self, user_id: str, failures: list[Failure]) -> None:
        """Forget the causes that an account's turn did not meet again."""
        met = {failure.stage for failure in failures}
        gone = [stage for stage in _STAGES if stage not in met and self._causes.pop((user_id, stage), None)]
        if gone and not met:
            logger.info("account %s: synchronized again", user_id)


def error_text(error: Exception) -> str:
    """Return an error in one line of bounded length, with its type."""
    said = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
