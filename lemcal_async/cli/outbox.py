"""How a change is shown: the columns for people, and the object for programs."""

from typing import Any

from lemcal_async.cli.listing import short_time, wire_time
from lemcal_async.cli.output import Column
from lemcal_async.sync import Change


def change_object(change: Change) -> dict[str, Any]:
    """Return the object for programs; ``meeting`` is as the service writes it."""
    return {
        "seq": change.seq,
        "user_id": change.user_id,
        "meeting_id": change.meeting_id,
        "kind": change.kind,
        "fields": list(change.fields),
        "found_at": wire_time(change.found_at),
        "delivered_at": wire_time(change.delivered_at),
        "meeting": change.wire,
    }


def _start(change: Change) -> str:
    return str(change.wire.get("start") or "")[:16].replace("T", " ")


COLUMNS = (
    Column[Change]("Found (UTC)", lambda change: short_time(change.found_at), whole=True, if_room=True),
    Column[Change]("Change", lambda change: change.kind, whole=True),
    Column[Change]("Fields", lambda change: ", ".join(change.fields)),
    Column[Change]("Start (UTC)", _start, whole=True, if_room=True),
    Column[Change]("Meeting", lambda change: change.meeting_id, whole=True),
    Column[Change]("Account", lambda change: change.user_id, whole=True, if_room=True),
)
