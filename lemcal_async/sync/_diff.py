"""Compares the meetings stored for an account with the list that the service sends now.

Pure functions on the wire form, so that fields unknown to the SDK count as well. Rows are compared by the
digest of a canonical form, so a store only loads the old rows whose digest differs. ``plan`` decides what to
write, and ``empty_list_error`` whether to reject the list; every store follows both.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypeGuard

import attrs

from lemcal_async._codec import MAX_BAD_ROWS
from lemcal_async.errors import BadRow, EmptyListError
from lemcal_async.sync._columns import encoder

Kind: TypeAlias = Literal["created", "changed", "canceled", "disappeared", "restored"]
"""``restored``: the meeting had disappeared or was canceled, and is booked again. A meeting that reappears as
canceled is ``canceled``."""

Status: TypeAlias = Literal["booked", "canceled", "disappeared", "pruned"]
"""``pruned``: still listed, but its stored data was erased; only the digest is left."""

# A new kind also needs a field in Counts, in SyncReport and in events.AccountSynced.
KINDS: Final[tuple[Kind, ...]] = ("created", "changed", "canceled", "disappeared", "restored")

MAX_LOST_AT_ONCE: Final = 3
"""An account with up to this many meetings may lose them all at once: its list is always accepted."""

_MAX_ID_LENGTH: Final = 255  # characters; the service's ids have 20

_UNORDERED: Final = "attendees"  # the service lists them in any order
_NO_ATTENDEES: Final = f'"{_UNORDERED}":[]'
_dumps: Final = encoder((",", ":"), sort_keys=True)


@attrs.frozen
class ListedMeeting:
    """A row of the list with a unique id. ``index`` is its position, ``text`` its JSON in ASCII."""

    index: int
    id: str
    wire: dict[str, Any] = attrs.field(repr=False)
    digest: str
    text: str = attrs.field(repr=False)


@attrs.frozen
class Snapshot:
    """A list as the service sent it, by meeting id.

    ``bad_rows`` have no unique id or cannot be stored; ``present`` contains the usable ids of the latter.
    If a row has no usable id, the list is not ``complete``: a missing meeting may be that row.
    """

    rows: dict[str, ListedMeeting]
    bad_rows: tuple[BadRow, ...] = ()
    present: frozenset[str] = frozenset()
    complete: bool = True

    def __contains__(self, meeting_id: str) -> bool:
        return meeting_id in self.rows or meeting_id in self.present

    def __len__(self) -> int:
        return len(self.rows) + len(self.present)


@attrs.frozen
class StoredMeeting:
    """A stored meeting. ``wire`` is only needed for the meetings that ``needed_rows`` returns."""

    digest: str
    status: Status
    wire: dict[str, Any] | None = attrs.field(default=None, repr=False)


@attrs.frozen
class Difference:
    """A change of one meeting. ``wire`` is its current row or, if it disappeared, its last one."""

    meeting_id: str
    kind: Kind
    fields: tuple[str, ...] = ()
    wire: dict[str, Any] = attrs.field(factory=dict[str, Any], repr=False)


@attrs.frozen
class Counts:
    """The number of meetings of each kind, for one account or for all.

    Attributes:
        created: Meetings that are new.
        changed: Meetings that were changed.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer in the list.
        restored: Meetings that had disappeared or were canceled, and are booked again.
        unchanged: Meetings that were not changed.
    """

    created: int = 0
    changed: int = 0
    canceled: int = 0
    disappeared: int = 0
    restored: int = 0
    unchanged: int = 0


@attrs.frozen
class Plan:
    """What a store has to write for a list.

    ``listed`` contains the rows to insert or replace, ``disappeared`` the ids to mark, ``dropped`` the ids
    of pruned meetings to delete because they are no longer listed, and ``outbox`` the changes to announce.
    """

    listed: list[Difference]
    disappeared: list[str]
    dropped: list[str]
    outbox: list[Difference]
    counts: Counts


def snapshot(rows: Iterable[Any]) -> Snapshot:
    """Read the rows of a list. Never raises because of a row; only the first bad rows are kept."""

    def reject(reason: str) -> None:
        if len(bad_rows) < MAX_BAD_ROWS:
            bad_rows.append(BadRow(index, wire, reason))

    found: dict[str, ListedMeeting] = {}
    bad_rows: list[BadRow] = []
    present: set[str] = set()
    complete = True
    for index, wire in enumerate(rows):
        meeting_id: object = wire.get("_id") if _is_object(wire) else None
        if not isinstance(meeting_id, str) or not _is_id(meeting_id):
            complete = False
            reject("it has no usable _id")
            continue
        try:
            text, canonical = _texts(wire)
            row = ListedMeeting(index, meeting_id, wire, _digest(canonical), text)
        except RecursionError:
            present.add(meeting_id)
            reject("it is nested too deeply")
            continue
        first = found.setdefault(meeting_id, row)
        if first.digest != row.digest:
            reject(f"row {first.index} has the same _id but different data")
    return Snapshot(found, tuple(bad_rows), frozenset(present), complete)


def empty_list_error(
    stored: Mapping[str, StoredMeeting], current: Snapshot, empty_lists: int, confirm_empty_after: int
) -> EmptyListError | None:
    """Return an error if the list is not accepted yet, or None.

    A list that is suddenly empty, or less than half its previous length, is accepted once
    ``confirm_empty_after`` such lists arrived in a row; ``empty_lists`` of them came before this one. A new
    account's list is always accepted.
    """
    before = sum(map(_is_listed, stored.values()))
    if before <= MAX_LOST_AT_ONCE or 2 * len(current) >= before or not current.complete:
        return None
    if empty_lists + 1 >= confirm_empty_after:
        return None
    listed = f"a list of only {len(current)} meetings" if len(current) else "an empty list"
    return EmptyListError(
        f"GET /meetings: {listed}, while {before} meetings are stored; nothing was changed. It is accepted "
        f"after {confirm_empty_after} such lists in a row; if it is wrong, check the account and base_url"
    )


def needed_rows(stored: Mapping[str, StoredMeeting], current: Snapshot) -> list[str]:
    """Return the ids of the stored meetings whose rows ``plan`` needs."""
    return [
        meeting_id
        for meeting_id, before in stored.items()
        if (
            before.digest != current.rows[meeting_id].digest
            if meeting_id in current.rows
            else _is_listed(before)
        )
    ]


def plan(stored: Mapping[str, StoredMeeting], current: Snapshot, *, announce: bool = True) -> Plan:
    """Return what to write for an accepted list."""
    differences = compare(stored, current)
    kinds = [difference.kind for difference in differences]
    numbers = {kind: kinds.count(kind) for kind in KINDS}
    listed = [difference for difference in differences if difference.kind != "disappeared"]
    return Plan(
        listed=listed,
        disappeared=[found.meeting_id for found in differences if found.kind == "disappeared"],
        dropped=[
            meeting_id
            for meeting_id, before in stored.items()
            if current.complete and before.status == "pruned" and meeting_id not in current
        ],
        outbox=differences if announce else [],
        counts=Counts(**numbers, unchanged=len(current.rows) - len(listed)),
    )


def compare(stored: Mapping[str, StoredMeeting], current: Snapshot) -> list[Difference]:
    """Return the differences: first the listed meetings in list order, then those that disappeared.

    A missing meeting has disappeared only if the list is complete. It is unknown which fields of a pruned
    meeting changed, so all are named.
    """
    differences: list[Difference] = []
    for row in current.rows.values():
        before = stored.get(row.id)
        if before is None:
            differences.append(Difference(row.id, "created", (), row.wire))
        elif difference := _difference(before, row):
            differences.append(difference)
    if current.complete:
        differences += [
            Difference(meeting_id, "disappeared", (), before.wire or {"_id": meeting_id})
            for meeting_id, before in stored.items()
            if _is_listed(before) and before.status != "pruned" and meeting_id not in current
        ]
    return differences


def _difference(before: StoredMeeting, row: ListedMeeting) -> Difference | None:
    was_missing = before.status == "disappeared"
    if not was_missing and before.digest == row.digest:
        return None
    if before.status == "pruned":  # any field may have changed, so all are named
        return Difference(row.id, "changed", changed_fields({"_id": row.id}, row.wire), row.wire)
    old = before.wire or row.wire  # not loaded if unchanged
    fields = changed_fields(old, row.wire)
    was_booked = status_of(old) == "booked"
    kind: Kind = "changed"
    if status_of(row.wire) == "canceled":
        if was_missing or was_booked:
            kind = "canceled"
    elif was_missing or not was_booked:
        kind = "restored"
    if kind == "changed" and not fields:
        return None  # the same data in a different canonical form, as after an upgrade
    return Difference(row.id, kind, fields, row.wire)


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the wire fields that differ. At every depth, null equals absent."""
    names = sorted(before.keys() | after.keys())
    return tuple(name for name in names if _canonical(before, (name,)) != _canonical(after, (name,)))


def status_of(wire: Mapping[str, Any]) -> Literal["booked", "canceled"]:
    """Return whether a listed meeting is booked or canceled."""
    return "canceled" if wire.get("canceledAt") else "booked"


def digest(wire: Mapping[str, Any]) -> str:
    """Return a digest that is equal for equivalent rows, whatever the order of keys and attendees."""
    return _digest(_texts(wire)[1])


def _digest(canonical: str) -> str:
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _canonical(wire: Mapping[str, Any], names: Iterable[str]) -> str:
    return _texts({name: value for name in names if (value := wire.get(name)) is not None})[1]


def _texts(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return fields as JSON, and in canonical form."""
    text, canonical = _encoded(fields)
    if not _is_simple(fields):
        _, canonical = _encoded(_simplified(fields))
    return text, canonical


def _is_simple(fields: Mapping[str, Any]) -> bool:
    """Whether ``_simplified`` is certain to change nothing, as for most rows."""
    found: list[Iterable[Any]] = [fields.values()]
    for values in found:  # grows during the iteration
        for value in values:
            kind = type(value)  # pyright: ignore[reportUnknownVariableType]  # any JSON
            if kind is dict:
                found.append(value.values())
            elif kind is list:
                found.append(value)
            elif not (kind is str or kind is bool or kind is int):
                return False
    return True


def _encoded(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return fields as JSON twice: with the attendees in their order, and as a sorted list of texts."""
    attendees = fields.get(_UNORDERED)
    if not isinstance(attendees, list):
        text = _dumps(fields)
        return text, text
    texts = list(map(_dumps, attendees))  # pyright: ignore[reportUnknownArgumentType]  # any JSON
    # Encode the other fields alone and insert the attendees, so that nothing is encoded twice.
    head, _, tail = _dumps({**fields, _UNORDERED: []}).partition(_NO_ATTENDEES)
    if _NO_ATTENDEES in tail:  # a nested field looks the same
        return _dumps(fields), _dumps({**fields, _UNORDERED: sorted(texts)})
    name = f'{head}"{_UNORDERED}":'
    return f"{name}[{','.join(texts)}]{tail}", f"{name}{_dumps(sorted(texts))}{tail}"


def _simplified(value: Any) -> Any:
    """Return a JSON value without nulls in its objects, and with integral floats as integers."""
    if _is_object(value):
        return {name: _simplified(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return list(map(_simplified, value))  # pyright: ignore[reportUnknownArgumentType]  # any JSON
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_listed(meeting: StoredMeeting) -> bool:
    return meeting.status != "disappeared"


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_id(value: str) -> bool:
    """Whether every database can store an id: no NUL, no lone surrogate, short enough for an index."""
    return 0 < len(value) <= _MAX_ID_LENGTH and value.isprintable()
