"""Equivalent models in pydantic and msgspec, to compare decoding with."""

from datetime import datetime
from typing import Any

import msgspec
from pydantic import AliasChoices, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter


class _Base(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)  # keeps unknown fields, as this package's models do


class PydanticLead(_Base):
    """A lead."""

    email: str | None = None
    first_name: str | None = Field(None, alias="firstName")
    last_name: str | None = Field(None, alias="lastName")


class PydanticAttendee(_Base):
    """An attendee."""

    email: str | None = None
    name: str | None = None
    type: str | None = None
    response: str | None = None
    is_owner: bool | None = Field(None, alias="owner")
    is_primary: bool | None = Field(None, alias="primary")


class PydanticAnswer(_Base):
    """An answer."""

    question: str | None = None
    answer: str | None = None


class PydanticMeeting(_Base):
    """A meeting."""

    id: str = Field(alias="_id")
    user_id: str | None = Field(None, alias="userId")
    meeting_type_id: str | None = Field(None, alias="meetingTypeId")
    meeting_type_name: str | None = Field(None, alias="meetingTypeName")
    provided_infos: Any = Field(None, alias="providedInfos")
    event_id: str | None = Field(None, alias="eventId")
    start: AwareDatetime | None = None
    end: AwareDatetime | None = None
    lead: PydanticLead | None = None
    attendees: tuple[PydanticAttendee, ...] = ()
    answers: tuple[PydanticAnswer, ...] = Field(
        (), validation_alias=AliasChoices("questions", "surveyAnswers")
    )
    timezone: str | None = Field(None, validation_alias=AliasChoices("attendeeTimezone", "timezone"))
    canceled_at: AwareDatetime | None = Field(None, alias="canceledAt")
    created_at: AwareDatetime | None = Field(None, alias="createdAt")


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)


class MsgspecLead(msgspec.Struct, rename="camel"):
    """A lead; unknown fields are dropped."""

    email: str | None = None
    first_name: str | None = None
    last_name: str | None = None


class MsgspecAttendee(msgspec.Struct, rename={"is_owner": "owner", "is_primary": "primary"}):
    """An attendee."""

    email: str | None = None
    name: str | None = None
    type: str | None = None
    response: str | None = None
    is_owner: bool | None = None
    is_primary: bool | None = None


class MsgspecAnswer(msgspec.Struct):
    """An answer."""

    question: str | None = None
    answer: str | None = None


class MsgspecMeeting(msgspec.Struct, rename=lambda name: "_id" if name == "id" else _camel(name)):
    """A meeting; supports only one of the alternative spellings."""

    id: str
    user_id: str | None = None
    meeting_type_id: str | None = None
    meeting_type_name: str | None = None
    provided_infos: Any = None
    event_id: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    lead: MsgspecLead | None = None
    attendees: tuple[MsgspecAttendee, ...] = ()
    questions: tuple[MsgspecAnswer, ...] = ()
    timezone: str | None = None
    canceled_at: datetime | None = None
    created_at: datetime | None = None


with_pydantic = TypeAdapter(list[PydanticMeeting]).validate_json
with_msgspec = msgspec.json.Decoder(list[MsgspecMeeting]).decode


def read_all(meetings: list[Any]) -> None:
    """Read every field, because some libraries defer work until then."""
    for meeting in meetings:
        _ = (meeting.id, meeting.user_id, meeting.meeting_type_id, meeting.meeting_type_name)
        _ = (meeting.provided_infos, meeting.event_id, meeting.start, meeting.end, meeting.timezone)
        _ = (meeting.canceled_at, meeting.created_at)
        if meeting.lead is not None:
            _ = (meeting.lead.email, meeting.lead.first_name, meeting.lead.last_name)
        for attendee in meeting.attendees:
            _ = (attendee.email, attendee.name, attendee.type, attendee.response)
            _ = (attendee.is_owner, attendee.is_primary)
        for answer in meeting.answers if hasattr(meeting, "answers") else meeting.questions:
            _ = (answer.question, answer.answer)
