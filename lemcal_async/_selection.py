"""Choosing from a list of meetings what the service has no filter for. Pure."""

from collections.abc import Callable
from datetime import UTC, datetime

from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting, same_email

_AT_THE_END = datetime.max.replace(tzinfo=UTC)  # meetings whose start is not known


def selection(
    starts_after: datetime | None,
    starts_before: datetime | None,
    guest_email: str | None,
    *,
    canceled: bool | None,
) -> Callable[[list[Meeting]], list[Meeting]]:
    """Return a function that selects meetings and sorts them by start, or leaves them alone without filters.

    Raises ConfigurationError for arguments that cannot be meant.
    """
    _check_time("starts_after", starts_after)
    _check_time("starts_before", starts_before)
    _check("guest_email", guest_email, str, "an e-mail address")
    _check("canceled", canceled, bool, "True, False or None")
    if all(each is None for each in (starts_after, starts_before, guest_email, canceled)):
        return _leave_alone  # no closure: ten thousand calls may wait, each with its own

    def is_selected(meeting: Meeting) -> bool:
        if starts_after is not None and not (meeting.start and meeting.start >= starts_after):
            return False
        if starts_before is not None and not (meeting.start and meeting.start < starts_before):
            return False
        if guest_email is not None and not (meeting.guest and same_email(meeting.guest.email, guest_email)):
            return False
        return canceled is None or meeting.is_canceled == canceled

    def select(meetings: list[Meeting]) -> list[Meeting]:
        return sorted(filter(is_selected, meetings), key=lambda meeting: meeting.start or _AT_THE_END)

    return select


def _leave_alone(meetings: list[Meeting]) -> list[Meeting]:
    return meetings


def tell_account(meetings: list[Meeting], account: tuple[str, str] | None) -> None:
    """Note the account's own address in its meetings: where nobody is marked, it tells host from guest.

    ``account`` is a user id and an e-mail address, None if they are not known. The meetings are new, so
    nobody can have seen them without it.
    """
    if account is None:
        return
    user_id, email = account
    for meeting in meetings:
        if meeting.user_id in (None, user_id):
            object.__setattr__(meeting, "_account_email", email)


def _check_time(name: str, value: object) -> None:
    _check(name, value, datetime, "an aware datetime, such as datetime.now(UTC)")
    if isinstance(value, datetime) and value.utcoffset() is None:
        raise ConfigurationError(f"{name}={value!r}: it must have a time zone, such as datetime.now(UTC)")


def _check(name: str, value: object, kind: type, wanted: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name}= must be {wanted}, not {type(value).__name__}")
