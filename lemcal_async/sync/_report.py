"""The report of a run, how it is built, and which failures are logged."""

import logging
from typing import Final, Literal, TypeAlias

import attrs

from lemcal_async.errors import BadRow, EmptyListError, LemcalError
from lemcal_async.sync._diff import Counts

logger = logging.getLogger("lemcal_async.sync")

Stage: TypeAlias = Literal["fetch", "store", "delivery"]
"""The step that failed: fetching an acceptable list, the store, or a handler."""

_STAGES: Final[dict[Stage, str]] = {
    "fetch": "its meetings could not be fetched",
    "store": "the store failed",
    "delivery": "the handler failed",
}


@attrs.frozen
class Failure:
    """An account that failed.

    Attributes:
        user_id: The account's user id; None if the client cannot determine it.
        stage: The step that failed. ``"fetch"`` means that there was no list, or one that is not accepted yet
            (``EmptyListError``). ``"delivery"`` means that a handler raised: the account's meetings are up to
            date, and the changes that the handler did not accept stay pending or are parked.
        error: The exception.
    """

    user_id: str | None
    stage: Stage
    error: Exception

    def __str__(self) -> str:
        text = self.error if isinstance(self.error, LemcalError) else error_text(self.error)
        return f"{_summary(self)}: {text}"


def _summary(failure: Failure) -> str:
    """Return the account and what failed, without the error's message."""
    is_rejected = isinstance(failure.error, EmptyListError)
    what = "its list was not accepted" if is_rejected else _STAGES[failure.stage]
    return f"account {failure.user_id or 'without a user id'}: {what}"


@attrs.frozen
class UnreadableRow:
    """A row of an account's list that was not stored. At most 1,000 per account are reported.

    Attributes:
        user_id: The account's user id.
        row: The row, and the reason.
    """

    user_id: str
    row: BadRow


@attrs.frozen
class SyncReport:
    """The outcome of a run.

    Attributes:
        accounts: Accounts in the run.
        failed: Accounts that failed.
        created: Meetings that are new.
        changed: Meetings that were changed.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer in the list.
        restored: Meetings that had disappeared or were canceled, and are booked again.
        unchanged: Meetings that were not changed.
        delivered: Changes that a handler accepted.
        seconds: The duration of the run.
        parked: Changes parked in this run, because the handler raised for them too often.
        failures: Every failure, with its error.
        unreadable_rows: Rows that were not stored, with the reason.
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
        """Raise the errors of all failures, if any account failed.

        Raises:
            ExceptionGroup: The error of each failure, with a note that names its account.
        """
        if len(self.failures) == 0:
            return
        for failure in self.failures:
            note = _summary(failure)
            if note not in getattr(failure.error, "__notes__", ()):
                failure.error.add_note(note)
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        raise ExceptionGroup(
            f"{self.failed} of {self.accounts} accounts failed: {self.failures[0]}{more}",
            [failure.error for failure in self.failures],
        )


class ReportBuilder:
    """Accumulates the report of a run, or of one account."""

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
        total, added = attrs.asdict(self.counts), attrs.asdict(account.counts)
        self.counts = Counts(**{name: total[name] + added[name] for name in total})

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
    """Logs a failure when it is new or its cause changes, rather than in every round of ``watch``.

    A failed account is logged as a warning, without a traceback for this package's own errors. A handler that
    raises is logged as an error with its traceback.
    """

    def __init__(self) -> None:
        self._causes: dict[tuple[object, Stage], object] = {}

    def failed(self, failure: Failure, about: object = None) -> None:
        """Log a failure and clear its traceback: the frames hold whole lists, and many accounts may fail.

        ``about`` is part of the cause: a failure that differs in it is logged again.
        """
        error = failure.error
        cause = (type(error), getattr(error, "status_code", None), about)
        # Accounts without a user id cannot be distinguished: each cause counts as one account.
        key = (failure.user_id or cause, failure.stage)
        if self._causes.get(key) != cause:
            self._causes[key] = cause
            level = logging.ERROR if failure.stage == "delivery" else logging.WARNING
            is_expected = failure.stage != "delivery" and isinstance(error, LemcalError)
            logger.log(level, "%s", failure, exc_info=None if is_expected else error)
        error.__traceback__ = error.__context__ = error.__cause__ = None

    def finished(self, user_id: str, failures: list[Failure]) -> None:
        """Forget the causes of failures that did not recur in an account's turn."""
        failed = {failure.stage for failure in failures}
        recovered = [
            stage for stage in _STAGES if stage not in failed and self._causes.pop((user_id, stage), None)
        ]
        if recovered and not failed:
            logger.info("account %s: synchronized again", user_id)


def error_text(error: Exception) -> str:
    """Return the type and message of an error in one line of bounded length."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
