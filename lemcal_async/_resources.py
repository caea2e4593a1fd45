"""The calls of the API, by resource: the route of each, and what becomes of its answer."""

import functools
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, overload

import attrs

from lemcal_async._auth import Secret
from lemcal_async._decoding import decode, find_row, json_of, parse_rows, read_model, read_models, read_rows
from lemcal_async._session import AccountSession, Decode, JSONBody, RawResponse
from lemcal_async._urls import check_target_url, quote_id, with_query
from lemcal_async.errors import CallInfo, ConfigurationError, DuplicateHookError, MeetingNotFoundError
from lemcal_async.models import Hook, Meeting, MeetingType, User, same_email

T = TypeVar("T")


def _model(into: type[T]) -> Decode[T]:
    """Return what decodes an answer that is one object."""

    async def decode_model(answer: RawResponse) -> T:
        return read_model(answer, into)

    return decode_model


def _models(session: AccountSession, name: str, into: type[T]) -> Decode[list[T]]:
    """Return what decodes an answer that is a list; ``name`` is that of its envelope."""
    skip = session.options.skip_bad_rows
    return functools.partial(read_models, name=name, into=into, skip_bad_rows=skip)


async def me(session: AccountSession) -> User:
    """Fetch the account itself."""
    user = await session.send("GET", "/me", "/me", _model(User))
    if user.email:
        session.account = (user.id, user.email)
    return user


@attrs.frozen
class MeetingRows:
    """A list of meetings as it was sent: the decoded body, and the call that it answers."""

    status_code: int
    body: bytes = attrs.field(repr=False)  # personal data
    call: CallInfo

    def rows(self) -> list[Any]:
        """Parse the body at once, on this thread; ResponseDecodeError if it holds no list."""
        return parse_rows(self, "meetings")


# What returns a list is annotated in quotes: since Python 3.14, the bare name is looked up in the class,
# where it is a method, and inspect.signature fails.
class Meetings:
    """The booked meetings of an account."""

    def __init__(self, session: AccountSession) -> None:
        self._session = session

    async def rows(self, meeting_type_id: str | None = None) -> "list[Any]":
        """Fetch the list as ``list`` does, and return its rows as plain JSON, whatever they hold.

        Args:
            meeting_type_id: The only meeting type to list; None for all.

        Raises:
            ResponseDecodeError: If the answer is not a list.
        """
        return await self._fetch(meeting_type_id, lambda answer: read_rows(answer, "meetings"))

    async def _fetch_rows(self, meeting_type_id: str | None = None) -> MeetingRows:
        """Fetch the list unparsed: most of what a synchronization fetches is what it has already."""

        async def keep(answer: RawResponse) -> MeetingRows:
            return MeetingRows(answer.status_code, answer.body, answer.call)

        return await self._fetch(meeting_type_id, keep)

    async def list(
        self,
        meeting_type_id: str | None = None,
        *,
        starts_after: datetime | None = None,
        starts_before: datetime | None = None,
        guest_email: str | None = None,
        canceled: bool | None = None,
    ) -> "list[Meeting]":
        """Fetch the booked meetings: all of them, or those of one meeting type.

        The service has no pages and no other filter (documented), so each call fetches the whole list, and
        the keyword arguments choose from it. With any of them, the result is sorted by start.

        Args:
            meeting_type_id: The only meeting type to list; None for all.
            starts_after: Only meetings that start then or later (an aware datetime).
            starts_before: Only meetings that start before then (an aware datetime).
            guest_email: Only the meetings of this guest.
            canceled: Only the canceled meetings (True), or the others (False).

        Raises:
            ConfigurationError: For arguments that cannot be meant, such as a time without a time zone.
            ResponseDecodeError: If rows have no usable id; all others are in its ``rows``.
        """
        select = selection(starts_after, starts_before, guest_email, canceled=canceled)
        found = await self._fetch(meeting_type_id, _models(self._session, "meetings", Meeting))
        tell_account(found, self._session.account)
        return select(found)

    async def get(self, meeting_id: str, meeting_type_id: str | None = None) -> Meeting:
        """Fetch one meeting. The service has no call for that, so this fetches the list and looks for it.

        Args:
            meeting_id: The meeting's id (``mee_…``).
            meeting_type_id: The meeting's type, if you know it: makes the list shorter.

        Raises:
            MeetingNotFoundError: If the meeting is not in the list.
        """
        quote_id(meeting_id, "meeting_id")

        async def find(answer: RawResponse) -> tuple[Meeting | None, int, CallInfo]:
            row, count = await find_row(answer, "meetings", meeting_id)
            meeting = None if row is None else decode(Secret(row), Meeting, answer)
            return meeting, count, answer.call

        meeting, count, call = await self._fetch(meeting_type_id, find)
        if meeting is not None:
            tell_account([meeting], self._session.account)
            return meeting
        raise MeetingNotFoundError(
            f"{call}: {meeting_id!r} is not among the {count} meetings in the list; check the id "
            "and the account, and that it was not removed; a new booking can take a moment to show",
            call=call,
            status_code=404,
        )

    def _fetch(self, meeting_type_id: str | None, decode: Decode[T]) -> Coroutine[Any, Any, T]:
        if meeting_type_id is not None:
            quote_id(meeting_type_id, "meeting_type_id")
        target = with_query("/meetings", {"meetingTypeId": meeting_type_id})
        return self._session.send("GET", "/meetings", target, decode)


class MeetingTypes:
    """The meeting types that an account offers."""

    def __init__(self, session: AccountSession) -> None:
        self._session = session

    async def list(self) -> "list[MeetingType]":
        """Fetch all meeting types.

        Raises:
            ResponseDecodeError: As ``meetings.list`` does.
        """
        decode_types = _models(self._session, "meetingTypes", MeetingType)
        return await self._session.send("GET", "/meetingTypes", "/meetingTypes", decode_types)

    async def get(self, meeting_type_id: str) -> MeetingType:
        """Fetch one meeting type.

        Args:
            meeting_type_id: The meeting type's id (``met_…``).

        Raises:
            MeetingTypeNotFoundError: If there is none with that id.
        """
        target = f"/meetingTypes/{quote_id(meeting_type_id, 'meeting_type_id')}"
        return await self._session.send("GET", "/meetingTypes/{id}", target, _model(MeetingType))


class Hooks:
    """The webhooks of an account: URLs that lemcal posts new bookings to."""

    def __init__(self, session: AccountSession) -> None:
        self._session = session

    @overload
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: Literal[False] = False,
    ) -> Hook: ...
    @overload
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: bool,
    ) -> Hook | None: ...
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: bool = False,
    ) -> Hook | None:
        """Have new bookings of one meeting type, or of any, posted to ``target_url``.

        Keep the id: no call lists hooks (documented by absence), so a hook whose id is lost cannot be
        deleted. A POST that may have been processed is never repeated; calling again with ``exist_ok=True``
        is safe.

        Args:
            target_url: Where bookings are posted to, with a secret token in it: see ``webhooks.hook_url``.
            meeting_type_id: The meeting type whose bookings are posted.
            any_meeting_type: True for the bookings of every meeting type, in place of ``meeting_type_id``.
            exist_ok: Whether to return None if the target has a hook already, instead of raising.

        Raises:
            ConfigurationError: For arguments that cannot work.
            DuplicateHookError: If the target has a hook already.
            APIConnectionError: If no answer came; ``maybe_processed`` says whether there may be a hook now.
        """
        selector = {"anyMeetingType": True} if meeting_type_id is None else {"meetingTypeId": meeting_type_id}
        target, target_url = Secret(target_url), ""  # it often carries a token
        check_target_url(target)
        if (meeting_type_id is None) == (not any_meeting_type):
            raise ConfigurationError("hooks.create() takes either meeting_type_id= or any_meeting_type=True")
        if meeting_type_id is not None:
            quote_id(meeting_type_id, "meeting_type_id")
        body = JSONBody(Secret({"targetUrl": target.reveal(), **selector}))
        try:
            return await self._session.send("POST", "/hooks", "/hooks", _model(Hook), body)
        except DuplicateHookError:
            if exist_ok:
                return None
            raise

    async def delete(self, hook_id: str) -> None:
        """Delete a hook.

        Args:
            hook_id: The hook's id (``hoo_…``).

        Raises:
            HookNotFoundError: If there is none with that id, unless an earlier attempt may have deleted it.
        """
        target = f"/hooks/{quote_id(hook_id, 'hook_id')}"
        await self._session.send("DELETE", "/hooks/{id}", target, _nothing)


async def _nothing(answer: RawResponse) -> None:
    if answer.body.strip():  # documented as 204 and empty; a page would be another server's answer
        json_of(answer)


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
    if starts_after is None and starts_before is None and guest_email is None and canceled is None:
        return _leave_alone  # no closure: ten thousand calls may wait, each with its own
    _check_time("starts_after", starts_after)
    _check_time("starts_before", starts_before)
    _check("guest_email", guest_email, str, "an e-mail address")
    _check("canceled", canceled, bool, "True, False or None")

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
