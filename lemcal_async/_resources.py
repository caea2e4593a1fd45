"""The API's calls, grouped by resource: the route of each call, and how its response is decoded."""

import functools
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, overload

import attrs

from lemcal_async._auth import Secret
from lemcal_async._checks import is_email
from lemcal_async._decoding import decode, find_row, json_of, parse_rows, read_model, read_models, read_rows
from lemcal_async._session import AccountSession, Decode, JSONBody, RawResponse
from lemcal_async._urls import check_target_url, quote_id, with_query
from lemcal_async.errors import CallInfo, ConfigurationError, DuplicateHookError, MeetingNotFoundError
from lemcal_async.models import Hook, Meeting, MeetingType, User, same_email

T = TypeVar("T")


def _model(into: type[T]) -> Decode[T]:
    """Return a decoder for a response that is one object."""

    async def decode_model(response: RawResponse) -> T:
        return read_model(response, into)

    return decode_model


def _models(session: AccountSession, name: str, into: type[T]) -> Decode[list[T]]:
    """Return a decoder for a response that is a list, possibly under the key ``name`` of an object."""
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
    """An unparsed list of meetings: the decompressed response body, and its call."""

    status_code: int
    body: bytes = attrs.field(repr=False)  # personal data
    call: CallInfo

    def rows(self) -> list[Any]:
        """Parse the whole body on this thread. Raises ResponseDecodeError if it is not a list."""
        return parse_rows(self, "meetings")


# Methods that return a list quote the annotation: since Python 3.14, a bare ``list`` resolves to the method
# of that name, and inspect.signature fails.
class Meetings:
    """The booked meetings of an account."""

    def __init__(self, session: AccountSession) -> None:
        self._session = session

    async def rows(self, meeting_type_id: str | None = None) -> "list[Any]":
        """Fetch the booked meetings as plain JSON rows, without validation.

        Args:
            meeting_type_id: List only this meeting type; None for all.

        Raises:
            ResponseDecodeError: If the response is not a list.
        """
        return await self._fetch(meeting_type_id, lambda response: read_rows(response, "meetings"))

    async def _fetch_rows(self, meeting_type_id: str | None = None) -> MeetingRows:
        """Fetch the list unparsed: most of what a synchronization fetches has not changed."""

        async def keep(response: RawResponse) -> MeetingRows:
            return MeetingRows(response.status_code, response.body, response.call)

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

        The service has no pagination and no other filter (documented), so each call fetches the whole list
        and applies the keyword arguments to it. If any is given, the result is sorted by start time.

        Args:
            meeting_type_id: List only this meeting type; None for all.
            starts_after: Only meetings that start at this time or later (an aware datetime).
            starts_before: Only meetings that start before this time (an aware datetime).
            guest_email: Only meetings with the guest who has this e-mail address.
            canceled: True for only canceled meetings, False for only the rest.

        Raises:
            ConfigurationError: If an argument is invalid, such as a datetime without a time zone.
            ResponseDecodeError: If a row has no usable id. The error's ``rows`` holds the other meetings.
        """
        select = selection(starts_after, starts_before, guest_email, canceled=canceled)
        meetings = await self._fetch(meeting_type_id, _models(self._session, "meetings", Meeting))
        set_account_email(meetings, self._session.account)
        return select(meetings)

    async def get(self, meeting_id: str, meeting_type_id: str | None = None) -> Meeting:
        """Fetch one meeting. The service has no endpoint for this, so it fetches the list and searches it.

        Args:
            meeting_id: The meeting's id (``mee_…``).
            meeting_type_id: The meeting's type, if known, to fetch a shorter list.

        Raises:
            MeetingNotFoundError: If the meeting is not in the list.
        """
        quote_id(meeting_id, "meeting_id")

        async def find(response: RawResponse) -> tuple[Meeting | None, int, CallInfo]:
            row, count = await find_row(response, "meetings", meeting_id)
            meeting = None if row is None else decode(Secret(row), Meeting, response)
            return meeting, count, response.call

        meeting, count, call = await self._fetch(meeting_type_id, find)
        if meeting is not None:
            set_account_email([meeting], self._session.account)
            return meeting
        raise MeetingNotFoundError(
            f"{call}: {meeting_id!r} is not among the {count} meetings in the list; check the id "
            "and the account; the meeting may have been removed, or be too new to be listed yet",
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
            MeetingTypeNotFoundError: If no meeting type has this id.
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
        """Subscribe ``target_url`` to new bookings of one meeting type, or of every meeting type.

        Keep the returned id: the API cannot list hooks (documented by absence), so a hook with a lost id
        cannot be deleted. A POST that the server may have processed is never retried; calling again with
        ``exist_ok=True`` is safe.

        Args:
            target_url: URL to post bookings to, including a secret token: see ``webhooks.hook_url``.
            meeting_type_id: Post only bookings of this meeting type.
            any_meeting_type: True to post bookings of every meeting type; excludes ``meeting_type_id``.
            exist_ok: If the target already has a hook, return None instead of raising.

        Raises:
            ConfigurationError: If an argument is invalid.
            DuplicateHookError: If the target already has a hook.
            APIConnectionError: If no response arrived; ``maybe_processed`` tells whether the hook may exist.
        """
        selector = {"anyMeetingType": True} if meeting_type_id is None else {"meetingTypeId": meeting_type_id}
        target, target_url = Secret(target_url), ""  # often contains a token
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
            HookNotFoundError: If no hook has this id, unless an earlier attempt may have deleted it.
        """
        target = f"/hooks/{quote_id(hook_id, 'hook_id')}"
        await self._session.send("DELETE", "/hooks/{id}", target, _decode_nothing)


async def _decode_nothing(response: RawResponse) -> None:
    if response.body.strip():  # documented as an empty 204; an HTML page would come from another server
        json_of(response)


_END_OF_TIME = datetime.max.replace(tzinfo=UTC)  # sorts meetings without a known start last


def selection(
    starts_after: datetime | None,
    starts_before: datetime | None,
    guest_email: str | None,
    *,
    canceled: bool | None,
) -> Callable[[list[Meeting]], list[Meeting]]:
    """Return a function that filters meetings and sorts them by start; without filters, it does nothing.

    Raises ConfigurationError if an argument is invalid.
    """
    if starts_after is None and starts_before is None and guest_email is None and canceled is None:
        return _select_all  # not a closure, because ten thousand waiting calls would each hold one
    _check_time("starts_after", starts_after)
    _check_time("starts_before", starts_before)
    _check("guest_email", guest_email, str, "an e-mail address")
    if guest_email is not None and not is_email(guest_email.strip()):
        raise ConfigurationError("guest_email= must be an e-mail address, such as 'ann@example.com'")
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
        return sorted(filter(is_selected, meetings), key=lambda meeting: meeting.start or _END_OF_TIME)

    return select


def _select_all(meetings: list[Meeting]) -> list[Meeting]:
    return meetings


def set_account_email(meetings: list[Meeting], account: tuple[str, str] | None) -> None:
    """Record the account's e-mail address on its meetings, to tell host from guest among unmarked attendees.

    ``account`` is a user id and an e-mail address, or None if unknown. Modifying frozen meetings is safe
    here, because they are new and no caller has seen them yet.
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
