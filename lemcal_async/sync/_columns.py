"""The columns that an analyst queries, taken from a wire row. Pure.

A value that cannot be read leaves its column empty, and no other.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import attrs

from lemcal_async._codec import from_wire
from lemcal_async.models import Meeting


@attrs.frozen
class Columns:
    """What is kept of a meeting beside its wire row; ``problem`` names what of it cannot be read."""

    meeting_type_id: str | None = None
    meeting_type_name: str | None = None
    start_at: datetime | None = None
    end_at: datetime | None = None
    guest_email: str | None = None
    guest_name: str | None = None
    host_email: str | None = None
    canceled_at: datetime | None = None
    created_at: datetime | None = None
    problem: str | None = None


def columns_of(wire: Mapping[str, Any]) -> Columns:
    """Return the columns of a row with a usable ``_id``."""
    meeting = from_wire(wire, Meeting)
    guest, host = meeting.guest, meeting.host
    return Columns(
        meeting_type_id=storable(meeting.meeting_type_id),
        meeting_type_name=storable(meeting.meeting_type_name),
        start_at=meeting.start,
        end_at=meeting.end,
        guest_email=storable(guest.email if guest else None),
        guest_name=storable(guest.name if guest else None),
        host_email=storable(host.email if host else None),
        canceled_at=meeting.canceled_at,
        created_at=meeting.created_at,
        problem=storable("; ".join(meeting.problems)) or None,
    )


def storable(text: str | None) -> str | None:
    """Return the text without what PostgreSQL or SQLite cannot keep: NUL, and halves of surrogate pairs.

    Guests choose their names; no name may stop the synchronization of an account.
    """
    if text is None or text.isprintable():
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
