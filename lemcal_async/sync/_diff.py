"""What changed between what is known of an account's meetings and the list that the service sends now.

Pure, and on the wire form: fields that the SDK does not know count too. Rows are compared by the digest of
a canonical form, so that a store has to bring only the old rows that differ. Where they are kept, and who
is told, is left to others.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypeGuard

import attrs

from lemcal_async.errors import BadRow

Kind: TypeAlias = Literal["created", "changed", "canceled", "disappeared", "restored"]
"""``restored``: it had disappeared or was cancelled, and is booked again."""

Status: TypeAlias = Literal["booked", "canceled", "disappeared", "pruned"]
"""``pruned``: still in the list, but its data were erased here; only the digest is left."""

KINDS: Final[tuple[Kind, ...]] = ("created", "changed", "canceled", "disappeared", "restored")

_UNORDERED: Final = "attendees"  # the service lists them in any order
_dumps: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@attrs.frozen
class ListedMeeting:
    """A row of the list that has an id of its own; ``index`` is its place."""

    index: int
    id: str
    wire: dict[str, Any] = attrs.field(repr=False)
    digest: str


@attrs.frozen
class Snapshot:
    """A list as the service sent it, by id.

    ``bad_rows`` are those that cannot be told apart from others or cannot be kept; ``present`` are the ids
    among them. Not ``complete``: some row has no usable id, so what is missing may be there all the same.
    """

    rows: dict[str, ListedMeeting]
    bad_rows: tuple[BadRow, ...] = ()
    present: frozenset[str] = frozenset()
    complete: bool = True

    def __contains__(self, meeting_id: str) -> bool:
        return meeting_id in self.rows or meeting_id in self.present


@attrs.frozen
class StoredMeeting:
    """What is known of a meeting. ``wire`` is needed only of those that ``needed_rows`` names."""

    digest: str
    status: Status
    wire: dict[str, Any] | None = attrs.field(default=None, repr=False)


@attrs.frozen
class Difference:
    """One meeting's difference. ``wire`` is the row as it is now or, if it disappeared, as it last was."""

    meeting_id: str
    kind: Kind
    fields: tuple[str, ...] = ()
    wire: dict[str, Any] = attrs.field(factory=dict[str, Any], repr=False)


def snapshot(rows: Iterable[Any]) -> Snapshot:
    """Read the rows of a list; whatever they are, this raises nothing."""
    found: dict[str, ListedMeeting] = {}
    bad_rows: list[BadRow] = []
    present: set[str] = set()
    complete = True
    for index, wire in enumerate(rows):
        meeting_id: object = wire.get("_id") if _is_object(wire) else None
        if not _is_object(wire) or not isinstance(meeting_id, str) or not _is_id(meeting_id):
            complete = False
            bad_rows.append(BadRow(index, wire, "it has no _id that can be used"))
            continue
        try:
            row = ListedMeeting(index, meeting_id, wire, digest(wire))
        except RecursionError:
            present.add(meeting_id)
            bad_rows.append(BadRow(index, wire, "it is nested too deeply"))
            continue
        first = found.setdefault(meeting_id, row)
        if first.digest != row.digest:
            bad_rows.append(BadRow(index, wire, f"row {first.index} has the same _id and other data"))
    return Snapshot(found, tuple(bad_rows), frozenset(present), complete)


def needed_rows(known: Mapping[str, StoredMeeting], now: Snapshot) -> list[str]:
    """Return the ids of the known meetings whose rows ``compare`` has to see."""
    return [
        meeting_id
        for meeting_id, before in known.items()
        if (before.digest != now.rows[meeting_id].digest if meeting_id in now.rows else _is_listed(before))
    ]


def compare(known: Mapping[str, StoredMeeting], now: Snapshot) -> list[Difference]:
    """Return the differences: those of listed meetings in the list's order, then the disappeared ones.

    A meeting that is missing has disappeared only if the list is complete. Of one whose old row was
    erased, it is not known which fields changed: none are named.
    """
    differences: list[Difference] = []
    for row in now.rows.values():
        before = known.get(row.id)
        if before is None:
            differences.append(Difference(row.id, "created", (), row.wire))
        elif difference := _of_listed(before, row):
            differences.append(difference)
    if now.complete:
        differences += [
            Difference(meeting_id, "disappeared", (), before.wire or {"_id": meeting_id})
            for meeting_id, before in known.items()
            if _is_listed(before) and before.status != "pruned" and meeting_id not in now
        ]
    return differences


def _of_listed(before: StoredMeeting, row: ListedMeeting) -> Difference | None:
    status = status_of(row.wire)
    if before.status != "disappeared" and before.digest == row.digest:
        return None
    fields = changed_fields(before.wire or row.wire, row.wire)
    was_canceled = status_of(before.wire or row.wire) == "canceled"
    kind: Kind = "changed"
    if status == "canceled" and not was_canceled and before.status != "pruned":
        kind = "canceled"
    elif before.status == "disappeared" or (was_canceled and status == "booked"):
        kind = "restored"
    elif not fields and before.wire is not None:
        return None  # another canonical form, as after an upgrade, of the same data
    return Difference(row.id, kind, fields, row.wire)


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the wire fields that differ. Null is the same as absent."""
    names = sorted(before.keys() | after.keys())
    return tuple(name for name in names if _canonical(before, (name,)) != _canonical(after, (name,)))


def status_of(wire: Mapping[str, Any]) -> Literal["booked", "canceled"]:
    """Return whether a listed meeting is booked or cancelled."""
    return "canceled" if wire.get("canceledAt") else "booked"


def digest(wire: Mapping[str, Any]) -> str:
    """Return what is the same for rows that mean the same, whatever the order of keys and attendees."""
    return hashlib.blake2b(_canonical(wire, wire).encode(), digest_size=16).hexdigest()


def _canonical(wire: Mapping[str, Any], names: Iterable[str]) -> str:
    fields = {name: value for name in names if (value := wire.get(name)) is not None}
    if isinstance(attendees := fields.get(_UNORDERED), list):
        fields[_UNORDERED] = sorted(map(_dumps, attendees))  # pyright: ignore[reportUnknownArgumentType]  # any JSON
    return _dumps(fields)


def _is_listed(known: StoredMeeting) -> bool:
    return known.status != "disappeared"


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_id(value: str) -> bool:
    """Whether every database can keep it: no NUL, no half of a surrogate pair."""
    return bool(value) and value.isprintable()
