"""What callers pass to the controls, checked: meetings, guests, times, wire fields. Pure."""

import json
from collections.abc import Mapping
from datetime import datetime
from email.utils import parseaddr
from typing import Any, cast

from lemcal_async.sandbox._demo import Guest, wire_time


def meeting_id_of(meeting: object) -> str:
    """Return the id of a meeting: of an id, a row as ``book`` returns it, or a model."""
    found, kind = meeting, type(meeting).__name__
    if isinstance(meeting, Mapping):
        found = cast("Mapping[str, object]", meeting).get("_id")
    elif not isinstance(meeting, str):
        found = getattr(meeting, "id", None)
    if not isinstance(found, str):
        raise TypeError(f"pass the id of a meeting, a row as book() returns it, or a Meeting, not {kind}")
    return found


def guest_of(guest: object) -> Guest | None:
    """Return the guest of ``ada@example.org`` or ``Ada Lovelace <ada@example.org>``; None stays None."""
    if guest is None:
        return None
    name, email = parseaddr(guest) if isinstance(guest, str) else ("", "")
    if not all(email.partition("@")):
        raise ValueError(
            f"guest={guest!r}: pass an e-mail address, such as 'ada@example.org' or 'Ada <ada@example.org>'"
        )
    return Guest(name or email.partition("@")[0].replace(".", " ").title(), email)


def start_of(start: object) -> datetime | None:
    """Return the moment: of an aware datetime, or of ISO 8601 with an offset; None stays None."""
    if start is None:
        return None
    moment = start
    if isinstance(start, str):
        try:
            moment = datetime.fromisoformat(start)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(f"start={start!r}: pass an aware datetime, or '2026-03-02T09:00:00.000Z'")
    return moment


def wire_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for a meeting in the wire format; datetimes become the service's text.

    TypeError for names of the models in place of the wire's, and for values that JSON does not have.
    """
    for name in fields:
        if "_" in name.strip("_"):
            first, *others = name.split("_")
            wire_name = first + "".join(map(str.capitalize, others))
            raise TypeError(f"{name}= is not a field of the wire format; did you mean {wire_name}=?")
        if name in ("id", "email"):
            raise TypeError(
                f"{name}= is not a field of a meeting; did you mean {'_id' if name == 'id' else 'guest'}=?"
            )
    try:
        converted: dict[str, Any] = json.loads(json.dumps(fields, default=_time))
    except ValueError as error:  # a cycle
        raise TypeError(str(error)) from None
    return converted


def _time(value: object) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"a field of a meeting must be JSON or a datetime, not {type(value).__name__}")
    if value.tzinfo is None:
        raise TypeError(f"{value!r} is not an aware datetime; add tzinfo=UTC, or another zone")
    return wire_time(value)
