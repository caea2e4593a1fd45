"""How each field of each model is spelled on the wire, and what type of value it holds there.

A table and no more: what is read and written by it is ``codec.py``'s business.
"""

from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

import attrs

from lemcal_async.models import Attendee, Hook, Meeting, MeetingType, User

EXTRA = "extra"
WIRE_NAMES = "_wire_names"


class Names(NamedTuple):
    """How a field is spelled: as new objects write it, and in the order in which it is looked for."""

    default: str
    spellings: tuple[str, ...]


# Where the wire name is not just the field's in camelCase.
_IRREGULAR = {
    (Hook, "id"): Names("_id", ("_id",)),
    (Meeting, "id"): Names("_id", ("_id",)),
    (MeetingType, "id"): Names("_id", ("_id",)),
    (User, "id"): Names("_id", ("_id",)),
    (Attendee, "is_owner"): Names("owner", ("owner",)),
    (Attendee, "is_primary"): Names("primary", ("primary",)),
    (Meeting, "timezone"): Names("timezone", ("attendeeTimezone", "timezone")),
    (Meeting, "answers"): Names("questions", ("questions", "surveyAnswers")),
}


class Field(NamedTuple):
    """A model's field: its attribute, the type of a value that is there, its names on the wire."""

    attribute: str
    type: Any
    names: Names
    is_list: bool

    @property
    def is_remembered(self) -> bool:
        """Whether the model must keep what the wire said: which spelling, or `[]` rather than nothing."""
        return self.is_list or len(self.names.spellings) > 1


def fields_of(model: Any) -> list[Field]:
    """Return the fields that a model has on the wire, in the order of its own."""
    found: list[Field] = []
    for field in attrs.fields(model):
        if field.name in (EXTRA, WIRE_NAMES):
            continue
        kind = field.type
        if get_origin(kind) is UnionType:  # X | None: None is the absent value, which no hook sees
            kind = next(arm for arm in get_args(kind) if arm is not NoneType)
        head, *tail = field.name.split("_")
        regular = head + "".join(word.capitalize() for word in tail)
        names = _IRREGULAR.get((model, field.name), Names(regular, (regular,)))
        found.append(Field(field.name, kind, names, get_origin(kind) is tuple))
    return found
