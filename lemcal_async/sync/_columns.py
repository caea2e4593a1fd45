r"""How a meeting is stored: columns for analysts to query, and the wire form as text. Pure functions.

A value that cannot be read leaves only its own column empty. The text is JSON that every database can store.
PostgreSQL's ``jsonb`` rejects U+0000 and lone surrogates, which a guest can type into a form: each such
``\uXXXX`` is stored as ``\ufffcXXXX``. U+FFFC, which nobody types, is the marker, and is itself marked.
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from lemcal_async._codec import from_wire
from lemcal_async.models import Meeting

# Characters. RFC 5321 allows no more, and an entry of a PostgreSQL index has at most 2704 bytes.
_MAX_EMAIL_LENGTH: Final = 320


class Columns(NamedTuple):
    """The columns stored beside a meeting's wire row. ``problem`` names the values that cannot be read."""

    meeting_type_id: str | None
    meeting_type_name: str | None
    start_at: datetime | None
    end_at: datetime | None
    guest_email: str | None
    guest_name: str | None
    host_email: str | None
    canceled_at: datetime | None
    created_at: datetime | None
    problem: str | None


def columns_of(wire: Mapping[str, Any]) -> Columns:
    """Return the columns of a row with a usable ``_id``."""
    meeting = from_wire(wire, Meeting)
    guest, host = meeting.guest, meeting.host
    guest_email, problems = guest.email if guest else None, meeting.problems
    if guest_email is not None and len(guest_email) > _MAX_EMAIL_LENGTH:
        guest_email = None
        problems += (f"the guest's e-mail address has over {_MAX_EMAIL_LENGTH} characters",)
    return Columns(
        storable(meeting.meeting_type_id),
        storable(meeting.meeting_type_name),
        meeting.start,
        meeting.end,
        storable(guest_email),
        storable(guest.name) if guest else None,
        storable(host.email) if host else None,
        meeting.canceled_at,
        meeting.created_at,
        storable("; ".join(problems)) if problems else None,
    )


def storable(text: str | None) -> str | None:
    """Replace the characters that PostgreSQL or SQLite cannot store: NUL and lone surrogates.

    Guests choose their names, and no name may stop the synchronization of an account.
    """
    if text is None or text.isprintable():
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


_SUSPECT: Final = re.compile(r"\\u(?:0000|d[89a-f]|fffc)", re.IGNORECASE)
_ESCAPE: Final = re.compile(
    r"\\(?:ud[89ab]..\\ud[c-f]..|u(0000|d[89a-f]..|fffc)|.)",  # a surrogate pair; a rejected escape; any
    re.IGNORECASE,
)
_STORED_ESCAPE: Final = re.compile(r"\\(?:ufffc(....)|.)", re.IGNORECASE)


def encoder(separators: tuple[str, str], *, sort_keys: bool) -> Callable[[Any], str]:
    """Return a function like ``json.JSONEncoder.encode`` that does its setup once, not for each value.

    The setup takes half of the time for the small values here. Values read from JSON are never circular.
    """
    item, key = separators
    plain = json.JSONEncoder(separators=separators, sort_keys=sort_keys, check_circular=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    try:
        chunks = make(
            None,
            plain.default,
            json.encoder.encode_basestring_ascii,
            None,
            key,
            item,
            sort_keys,
            *(False, True),
        )
        "".join(chunks({"": [None]}, 0))
    except TypeError:  # another interpreter, or a later version of CPython
        return plain.encode
    return lambda value: "".join(chunks(value, 0))


def load(text: str) -> Any:
    """Parse a text that ``storable_json`` returned."""
    if "\\ufffc" in text:
        text = _STORED_ESCAPE.sub(_restore, text)
    return json.loads(text)


def storable_json(text: str) -> str:
    """Return an ASCII JSON text in which the escapes that ``jsonb`` rejects are marked."""
    return text if _SUSPECT.search(text) is None else _ESCAPE.sub(_mark, text)


def _mark(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else f"\\ufffc{found[1]}"


def _restore(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else f"\\u{found[1]}"
