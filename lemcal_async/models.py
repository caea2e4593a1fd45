"""What the service speaks of, as values: meetings, the people in them, meeting types, hooks, users.

The classes know what their fields mean and nothing of how they travel: wire names, JSON and all
that can be wrong with it live in ``codec.py``. Every field that the service may leave out is None,
or an empty tuple if it is a list; ``extra`` holds the fields that this package does not know, with
their values unchanged. Two models are equal when all of that is; ``extra`` and JSON of unknown
shape, which may be unhashable, do not count for the hash.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import attrs


def in_utc(time: datetime) -> datetime:
    """Return the same instant in UTC.

    Raises ValueError if it is naive, OverflowError if UTC would leave the years 1 to 9999.
    """
    if time.tzinfo is UTC:
        return time
    if time.utcoffset() is None:
        raise ValueError("a time needs a time zone: this datetime is naive")
    return time.astimezone(UTC)


def _in_utc_or_none(time: datetime | None) -> datetime | None:
    return None if time is None else in_utc(time)


def _without_secrets(url: str | None) -> str:
    """Show a URL without what may be secret: user info, the query, the fragment."""
    if url is None:
        return "None"
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises when a password with a reserved character has shifted the parts
    except ValueError:
        return "'...'"
    if not parts.netloc:
        return "'...'"
    host = parts.netloc.rpartition("@")[2]
    tail = "?..." if parts.query or parts.fragment else ""
    return repr(f"{parts.scheme}://{host}{parts.path}{tail}")


@attrs.frozen
class Lead:
    """The contact whom the meeting was booked through; a public booking has none (observed)."""

    email: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Attendee:
    """Someone invited to a meeting, the host included.

    ``is_owner`` marks the host and ``is_primary`` the guest who booked (both observed, and absent
    rather than false on the others).
    """

    email: str | None = None
    name: str | None = None
    type: str | None = None
    response: str | None = None
    is_owner: bool | None = None
    is_primary: bool | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Answer:
    """One question of the booking form, with what the guest answered (observed)."""

    question: str | None = None
    answer: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Meeting:
    """A booked meeting. Times are in UTC; ``timezone`` is the guest's, as the service names it.

    ``provided_infos`` is JSON whose shape is not documented; treat it as read-only.
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
    # The codec's: which spellings and lists came over the wire, to write them back the same way.
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)

    @property
    def guest(self) -> Attendee | Lead | None:
        """Whom the meeting is with: the primary attendee, else the first who is not the owner, else the lead.

        Never simply the first attendee: that is often the host.
        """
        for attendee in self.attendees:
            if attendee.is_primary:
                return attendee
        for attendee in self.attendees:
            if not attendee.is_owner:
                return attendee
        return self.lead

    @property
    def host(self) -> Attendee | None:
        """The attendee who owns the meeting, None if no one is marked as that."""
        return next((attendee for attendee in self.attendees if attendee.is_owner), None)

    @property
    def is_canceled(self) -> bool:
        """Whether the meeting carries a cancellation time.

        A cancelled meeting may also just be missing from the next list (observed).
        """
        return self.canceled_at is not None

    @property
    def duration(self) -> timedelta | None:
        """From start to end, None if either is unknown."""
        if self.start is None or self.end is None:
            return None
        return self.end - self.start


@attrs.frozen
class Hook:
    """A webhook subscription: the service posts new bookings to ``target_url``.

    The URL often carries a secret token, so the repr shows neither its query nor its user info.
    """

    id: str
    target_url: str | None = attrs.field(default=None, repr=_without_secrets)
    meeting_type_id: str | None = None
    any_meeting_type: bool | None = None
    created_at: datetime | None = attrs.field(default=None, converter=_in_utc_or_none)
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class MeetingLocation:
    """Where meetings of a type can take place."""

    id: str | None = None
    provider: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class Question:
    """A question that the booking form of a meeting type asks."""

    id: str | None = None
    answer_type: str | None = None
    enabled: bool | None = None
    question: str | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class RoundRobinUser:
    """A user among whom the meetings of a type are shared out."""

    id: str | None = None
    enabled: bool | None = None
    weight: float | None = None
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class RoundRobin:
    """How the meetings of a type are shared out among users.

    What ``last_cycle`` holds is not documented; its values are JSON, unchanged.
    """

    enabled: bool | None = None
    users: tuple[RoundRobinUser, ...] = ()
    last_cycle: tuple[Any, ...] = attrs.field(default=(), hash=False)
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class MeetingType:
    """A kind of meeting that can be booked, with a booking page of its own.

    ``duration`` is in minutes. ``status`` is documented as enabled or disabled, ``privacy`` as
    public or private; both are kept as the service sends them.
    """

    id: str
    user_id: str | None = None
    name: str | None = None
    description: str | None = None
    meeting_link: str | None = None
    type: str | None = None
    color: str | None = None
    duration: float | None = None
    status: str | None = None
    privacy: str | None = None
    meeting_locations: tuple[MeetingLocation, ...] = ()
    questions: tuple[Question, ...] = ()
    round_robin: RoundRobin | None = None
    _wire_names: tuple[str, ...] = attrs.field(
        default=(), eq=False, repr=False, kw_only=True, alias="_wire_names"
    )
    extra: dict[str, Any] = attrs.field(factory=dict[str, Any], hash=False)


@attrs.frozen
class User:
    """The account that the credentials belong to."""

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
