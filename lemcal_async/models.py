"""The objects you work with: meetings and the people in them, meeting types, hooks, users.

The models are frozen attrs classes, equal by value and hashable. Fields that lemcal may omit are None, or an
empty tuple for a list. Every model has ``extra``, which holds unknown JSON fields and unreadable values, both
unchanged, and ``problems``, which describes the unreadable values. The hash ignores ``extra`` and free-form
JSON.
"""

# _codec.py converts the models to and from JSON; _codegen.py has the names of their fields in JSON,
# _pydantic.py their schema, and sync/_columns.py their columns.

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias
from urllib.parse import quote, urlsplit

import attrs

__all__ = [
    "Answer",
    "Attendee",
    "Hook",
    "Lead",
    "Meeting",
    "MeetingLocation",
    "MeetingType",
    "Model",
    "Question",
    "RoundRobin",
    "RoundRobinUser",
    "User",
]

BOOKING_PAGES: Final = "https://app.lemcal.com"


def in_utc(time: datetime) -> datetime:
    """Return the same instant in UTC.

    Raises ValueError if it is naive, OverflowError if the UTC time is outside the years 1 to 9999.
    """
    if time.tzinfo is UTC:
        return time
    if time.utcoffset() is None:
        raise ValueError("the datetime is naive; it must have a time zone")
    return time.astimezone(UTC)


def _in_utc_or_none(time: datetime | None) -> datetime | None:
    return None if time is None else in_utc(time)


def _without_secrets(url: str | None) -> str:
    """Return the repr of a URL without the parts that may contain a secret: user info, query and fragment."""
    if url is None:
        return "None"
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if a reserved character in a password misled urlsplit
    except ValueError:
        return "'...'"
    if not parts.netloc:
        return "'...'"
    host = parts.netloc.rpartition("@")[2]
    tail = "?..." if parts.query or parts.fragment else ""
    return repr(f"{parts.scheme}://{host}{parts.path}{tail}")


def same_email(left: str | None, right: str | None) -> bool:
    """Whether both e-mail addresses are given and equal, ignoring case."""
    return left is not None and right is not None and left.strip().casefold() == right.strip().casefold()


@attrs.frozen
class _Model:
    """The base class of all models."""

    _problems: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_problems"
    )

    @property
    def problems(self) -> tuple[str, ...]:
        """Descriptions of unreadable values, such as ``attendees[1].name: expected a string, got int``.

        An unreadable field is None, and ``extra`` holds its value unchanged. An unreadable list item is
        omitted, and ``extra`` holds the whole list. Problems of nested models are included.
        """
        return self._problems

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from lemcal_async._pydantic import schema_of  # noqa: PLC0415 - only pydantic calls this

        return schema_of(cls, handler)


@attrs.frozen
class Lead(_Model):
    """The contact that the meeting was booked with. A public booking has none (observed).

    Attributes:
        email: E-mail address of the contact.
        first_name: First name of the contact.
        last_name: Last name of the contact.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    email: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)

    @property
    def name(self) -> str | None:
        """First and last name, or whichever is known."""
        return " ".join(filter(None, (self.first_name, self.last_name))) or None


@attrs.frozen
class Attendee(_Model):
    """Someone invited to a meeting, including the host.

    Attributes:
        email: E-mail address of the attendee.
        name: Full name of the attendee.
        type: Kind of attendance, such as "required".
        response: Reply to the invitation, such as "accepted".
        is_owner: Whether this is the host. Only true or absent (observed).
        is_primary: Whether this is the guest who booked. Only true or absent (observed).
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    email: str | None = None
    name: str | None = None
    type: str | None = None
    response: str | None = None
    is_owner: bool | None = None
    is_primary: bool | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Answer(_Model):
    """A question of the booking form and the guest's answer (observed).

    Attributes:
        question: Text of the question.
        answer: The guest's answer: text, or other JSON, such as a list for check boxes.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    question: str | None = None
    answer: Any = attrs.field(default=None, hash=False)
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Meeting(_Model):
    """A booked meeting. All times are in UTC.

    Attributes:
        id: Id of the meeting (``mee_…``).
        user_id: Id of the account that the meeting belongs to (``usr_…``).
        meeting_type_id: Id of the meeting type that was booked (``met_…``).
        meeting_type_name: Name of that meeting type.
        provided_infos: Information from the guest when booking: JSON of undocumented shape; do not modify.
        event_id: Id of the event in the host's calendar.
        start: When the meeting starts.
        end: When the meeting ends.
        lead: The contact that the meeting was booked with.
        attendees: Everyone invited, including the host, in no particular order.
        answers: Answers to the questions of the booking form.
        timezone: Time zone of the guest, as the service names it.
        canceled_at: When the meeting was canceled.
        created_at: When the meeting was booked.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str
    user_id: str | None = None
    meeting_type_id: str | None = None
    meeting_type_name: str | None = None
    provided_infos: Any = attrs.field(default=None, hash=False)
    event_id: str | None = None
    start: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    end: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    lead: Lead | None = None
    attendees: tuple[Attendee, ...] = ()
    answers: tuple[Answer, ...] = ()
    timezone: str | None = None
    canceled_at: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    created_at: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    # For the codec: spellings and empty lists found on the wire, to write them back the same way.
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    # The account's e-mail address, if the client knows it, to tell host from guest among unmarked attendees.
    _account_email: str | None = attrs.field(
        default=None, eq=False, repr=False, kw_only=True, alias="_account_email"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)

    @property
    def guest(self) -> Attendee | Lead | None:
        """The person the host meets. Never simply the first attendee, who is often the host.

        This is the attendee marked as primary, unless that attendee is the owner. Without such a mark, it is
        the attendee with the lead's e-mail address, or else the lead. Without a lead, it is the first
        attendee who neither is the owner nor has the account's address, known after ``lemcal.me()``.
        """
        others = [attendee for attendee in self.attendees if not attendee.is_owner]
        for attendee in others:
            if attendee.is_primary:
                return attendee
        lead = self.lead
        if lead is not None and (lead.email or lead.name):
            return next((each for each in others if same_email(each.email, lead.email)), lead)
        return next((each for each in others if not same_email(each.email, self._account_email)), None)

    @property
    def host(self) -> Attendee | None:
        """The attendee marked as owner, or else the one with the account's e-mail address, if known."""
        for attendee in self.attendees:
            if attendee.is_owner:
                return attendee
        return next((each for each in self.attendees if same_email(each.email, self._account_email)), None)

    @property
    def is_canceled(self) -> bool:
        """Whether the meeting has a cancellation time, even an unreadable one.

        A canceled meeting may also simply disappear from the list (observed).
        """
        return self.canceled_at is not None or bool(self.extra.get("canceledAt"))

    @property
    def duration(self) -> timedelta | None:
        """The time from start to end, or None if either is unknown."""
        if self.start is None or self.end is None:
            return None
        return self.end - self.start


@attrs.frozen
class Hook(_Model):
    """A webhook subscription: lemcal posts new bookings to ``target_url``.

    The URL often carries a secret token, so the repr hides its query and its user info.

    Attributes:
        id: Id of the hook (``hoo_…``), required to delete it.
        target_url: URL that new bookings are posted to.
        meeting_type_id: Id of the only meeting type whose bookings are posted.
        any_meeting_type: Whether bookings of every meeting type are posted.
        created_at: When the hook was created.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str
    target_url: str | None = attrs.field(default=None, repr=_without_secrets)
    meeting_type_id: str | None = None
    any_meeting_type: bool | None = None
    created_at: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class MeetingLocation(_Model):
    """A place where meetings of a type can be held.

    Attributes:
        id: Id of the location.
        provider: Service or medium, such as "googleMeet" or "phone".
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str | None = None
    provider: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Question(_Model):
    """A question on the booking form of a meeting type.

    Attributes:
        id: Id of the question.
        answer_type: Kind of answer expected, such as "text".
        enabled: Whether the form asks it.
        question: Text of the question.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str | None = None
    answer_type: str | None = None
    enabled: bool | None = None
    question: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class RoundRobinUser(_Model):
    """A user who takes a share of a type's meetings.

    Attributes:
        id: Id of the user (``usr_…``).
        enabled: Whether the user takes part.
        weight: Share of the meetings, relative to the other users.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str | None = None
    enabled: bool | None = None
    weight: float | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class RoundRobin(_Model):
    """How the meetings of a type are distributed among users.

    Attributes:
        enabled: Whether meetings are distributed.
        users: Users who take part.
        last_cycle: State of the distribution: JSON of undocumented shape.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    enabled: bool | None = None
    users: tuple[RoundRobinUser, ...] = ()
    last_cycle: tuple[Any, ...] = attrs.field(default=(), hash=False)
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class MeetingType(_Model):
    """A kind of meeting that can be booked, with its own booking page.

    Attributes:
        id: Id of the meeting type (``met_…``).
        user_id: Id of the account that offers the meeting type (``usr_…``).
        name: Name of the meeting type.
        description: Text on the booking page.
        meeting_link: Last part of the booking page's URL.
        type: Kind of meeting type, such as "roundRobin".
        color: Color in the calendar, such as "#EC6181".
        duration: Length of a meeting; a number of minutes in JSON.
        status: Documented as "enabled" or "disabled".
        privacy: Documented as "public" or "private".
        meeting_locations: Places where the meetings can be held.
        questions: Questions on the booking form.
        round_robin: How the meetings are distributed among users.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str
    user_id: str | None = None
    name: str | None = None
    description: str | None = None
    meeting_link: str | None = None
    type: str | None = None
    color: str | None = None
    duration: timedelta | None = None
    status: str | None = None
    privacy: str | None = None
    meeting_locations: tuple[MeetingLocation, ...] = ()
    questions: tuple[Question, ...] = ()
    round_robin: RoundRobin | None = None
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)

    def booking_url(self, user: "User", *, name: str | None = None, email: str | None = None) -> str:
        """Return the URL of the booking page, prefilled with the guest's name and e-mail address if given.

        The form of these URLs is observed, not documented.

        Args:
            user: The account that offers the meeting type, as ``lemcal.me()`` returns it.
            name: The guest's name.
            email: The guest's e-mail address.

        Raises:
            ValueError: If the account has no public identifier, or the meeting type has no link.
        """
        if not user.public_identifier:
            raise ValueError(f"the user {user.id} has no public_identifier, so there is no booking page")
        if not self.meeting_link:
            raise ValueError(f"the meeting type {self.id} has no meeting_link, so there is no booking page")
        page = (
            f"{BOOKING_PAGES}/@{quote(user.public_identifier, safe='')}/{quote(self.meeting_link, safe='')}"
        )
        guest = {key: value for key, value in (("name", name), ("email", email)) if value is not None}
        if not guest:
            return page
        infos = json.dumps(guest, ensure_ascii=False, separators=(",", ":"))
        return f"{page}?guestInfos={quote(infos, safe='')}"


@attrs.frozen
class User(_Model):
    """The account that the credentials belong to.

    Attributes:
        id: Id of the account (``usr_…``).
        email: E-mail address of the account.
        public_identifier: Name of the account in the URLs of its booking pages.
        created_at: When the account was created.
        extra: Fields without an attribute here, and values that could not be read, unchanged.
    """

    id: str
    email: str | None = None
    public_identifier: str | None = None
    created_at: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


Model: TypeAlias = (
    Answer
    | Attendee
    | Hook
    | Lead
    | Meeting
    | MeetingLocation
    | MeetingType
    | Question
    | RoundRobin
    | RoundRobinUser
    | User
)
"""Any of the models."""
