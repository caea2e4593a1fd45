"""What changed between the meetings stored for an account and the list that the service sends now.

Pure functions on the wire form, so that fields unknown to the SDK count too. Rows are compared by the digest
of a canonical form: a store only loads the old rows whose digest differs. ``plan`` decides what to write, and
``doubt`` whether to believe the list at all; every store follows both.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypeGuard

import attrs

from lemcal_async._codec import MAX_BAD_ROWS
from lemcal_async.errors import BadRow, EmptyListError
from lemcal_async.sync._columns import encoder

Kind: TypeAlias = Literal["created", "changed", "canceled", "disappeared", "restored"]
"""``restored``: it had disappeared or was canceled, and is booked again. A meeting that comes back as a
canceled one is ``canceled``."""

Status: TypeAlias = Literal["booked", "canceled", "disappeared", "pruned"]
"""``pruned``: still listed, but its data were erased here; only the digest is left."""

KINDS: Final[tuple[Kind, ...]] = ("created", "changed", "canceled", "disappeared", "restored")

EMPTY_LIST_GRACE: Final = 3
"""An account with up to this many meetings may lose them all at once: its list is always believed."""

_LONGEST_ID: Final = 255  # characters; those of the service have 20

_UNORDERED: Final = "attendees"  # the service lists them in any order
_NO_ATTENDEES: Final = f'"{_UNORDERED}":[]'
_dumps: Final = encoder((",", ":"), sort_keys=True)


@attrs.frozen
class ListedMeeting:
    """A row of the list with an id of its own; ``index`` is its position, ``text`` its JSON in ASCII."""

    index: int
    id: str
    wire: dict[str, Any] = attrs.field(repr=False)
    digest: str
    text: str = attrs.field(repr=False)


@attrs.frozen
class Snapshot:
    """A list as the service sent it, by meeting id.

    ``bad_rows`` cannot be told apart from others, or cannot be kept; ``present`` holds the ids among them.
    If some row has no usable id, the list is not ``complete``: a missing meeting may be that row.
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
    """A meeting as stored. ``wire`` is only needed for the meetings that ``needed_rows`` names."""

    digest: str
    status: Status
    wire: dict[str, Any] | None = attrs.field(default=None, repr=False)


@attrs.frozen
class Difference:
    """What changed about one meeting. ``wire`` is its row now or, if it disappeared, its last one."""

    meeting_id: str
    kind: Kind
    fields: tuple[str, ...] = ()
    wire: dict[str, Any] = attrs.field(factory=dict[str, Any], repr=False)


@attrs.frozen
class Counts:
    """How many meetings of one account, or of all, were what.

    Attributes:
        created: Meetings that are new.
        changed: Meetings that differ from what they were.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer in the list.
        restored: Meetings that are back.
        unchanged: Meetings that are as they were.
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

    ``listed`` are the rows to insert or replace, ``disappeared`` the ids to mark, and ``dropped`` the ids
    of pruned meetings that are no longer listed, to delete. ``outbox`` are the changes to announce.
    """

    listed: list[Difference]
    disappeared: list[str]
    dropped: list[str]
    outbox: list[Difference]
    counts: Counts


def snapshot(rows: Iterable[Any]) -> Snapshot:
    """Read the rows of a list; raises nothing, whatever they are. Of the bad ones, the first are kept."""

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
            reject(f"row {first.index} has the same _id and other data")
    return Snapshot(found, tuple(bad_rows), frozenset(present), complete)


def doubt(
    stored: Mapping[str, StoredMeeting], now: Snapshot, empty_lists: int, confirm_empty_after: int
) -> EmptyListError | None:
    """Return why not to believe the list yet, or None.

    A list that is suddenly empty, or less than half of what it was, is believed when ``confirm_empty_after``
    such lists came in a row; ``empty_lists`` came before this one. For a new account, nothing is doubtful.
    """
    before = sum(map(_is_listed, stored.values()))
    if before <= EMPTY_LIST_GRACE or 2 * len(now) >= before or not now.complete:
        return None
    if empty_lists + 1 >= confirm_empty_after:
        return None
    listed = f"a list of only {len(now)} meetings" if len(now) else "an empty list"
    return EmptyListError(
        f"GET /meetings: {listed}, while {before} meetings are stored; nothing was changed. It is believed "
        f"after {confirm_empty_after} such lists in a row; if it is wrong, check the account and base_url"
    )


def needed_rows(stored: Mapping[str, StoredMeeting], now: Snapshot) -> list[str]:
    """Return the ids of the stored meetings whose rows ``plan`` has to see."""
    return [
        meeting_id
        for meeting_id, before in stored.items()
        if (before.digest != now.rows[meeting_id].digest if meeting_id in now.rows else _is_listed(before))
    ]


def plan(stored: Mapping[str, StoredMeeting], now: Snapshot, *, announce: bool = True) -> Plan:
    """Return what to write for a list that is believed."""
    differences = compare(stored, now)
    kinds = [difference.kind for difference in differences]
    numbers = {kind: kinds.count(kind) for kind in KINDS}
    listed = [difference for difference in differences if difference.kind != "disappeared"]
    return Plan(
        listed=listed,
        disappeared=[found.meeting_id for found in differences if found.kind == "disappeared"],
        dropped=[
            meeting_id
            for meeting_id, before in stored.items()
            if now.complete and before.status == "pruned" and meeting_id not in now
        ],
        outbox=differences if announce else [],
        counts=Counts(**numbers, unchanged=len(now.rows) - len(listed)),
    )


def compare(stored: Mapping[str, StoredMeeting], now: Snapshot) -> list[Difference]:
    """Return the differences: first the listed meetings in list order, then those that disappeared.

    A missing meeting has disappeared only if the list is complete. Of a pruned meeting it is not known which
    fields changed: all are named.
    """
    differences: list[Difference] = []
    for row in now.rows.values():
        before = stored.get(row.id)
        if before is None:
            differences.append(Difference(row.id, "created", (), row.wire))
        elif difference := _of_listed(before, row):
            differences.append(difference)
    if now.complete:
        differences += [
            Difference(meeting_id, "disappeared", (), before.wire or {"_id": meeting_id})
            for meeting_id, before in stored.items()
            if _is_listed(before) and before.status != "pruned" and meeting_id not in now
        ]
    return differences


def _of_listed(before: StoredMeeting, row: ListedMeeting) -> Difference | None:
    was_missing = before.status == "disappeared"
    if not was_missing and before.digest == row.digest:
        return None
    if before.status == "pruned":  # any field may have changed, so all are named
        return Difference(row.id, "changed", changed_fields({"_id": row.id}, row.wire), row.wire)
    old = before.wire or row.wire  # not loaded if it is the same
    fields = changed_fields(old, row.wire)
    was_booked = status_of(old) == "booked"
    kind: Kind = "changed"
    if status_of(row.wire) == "canceled":
        if was_missing or was_booked:
            kind = "canceled"
    elif was_missing or not was_booked:
        kind = "restored"
    if kind == "changed" and not fields:
        return None  # the same data in another canonical form, as after an upgrade
    return Difference(row.id, kind, fields, row.wire)


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the wire fields that differ. At every depth, null is the same as absent."""
    names = sorted(before.keys() | after.keys())
    return tuple(name for name in names if _canonical(before, (name,)) != _canonical(after, (name,)))


def status_of(wire: Mapping[str, Any]) -> Literal["booked", "canceled"]:
    """Return whether a listed meeting is booked or canceled."""
    return "canceled" if wire.get("canceledAt") else "booked"


def digest(wire: Mapping[str, Any]) -> str:
    """Return the same text for rows that mean the same, whatever the order of keys and attendees."""
    return _digest(_texts(wire)[1])


def _digest(canonical: str) -> str:
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _canonical(wire: Mapping[str, Any], names: Iterable[str]) -> str:
    return _texts({name: value for name in names if (value := wire.get(name)) is not None})[1]


def _texts(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return the JSON of fields, and their canonical form."""
    text, canonical = _encoded(fields)
    if not _is_simple(fields):
        _, canonical = _encoded(_simplified(fields))
    return text, canonical


def _is_simple(fields: Mapping[str, Any]) -> bool:
    """Whether ``_simplified`` surely changes nothing, as in most rows."""
    found: list[Iterable[Any]] = [fields.values()]
    for values in found:  # more are found meanwhile
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
    """Return the JSON of fields twice: with the attendees as they are, and as a sorted list of texts."""
    attendees = fields.get(_UNORDERED)
    if not isinstance(attendees, list):
        text = _dumps(fields)
        return text, text
    texts = list(map(_dumps, attendees))  # pyright: ignore[reportUnknownArgumentType]  # any JSON
    # Encoded without them, and then put together: nothing is encoded twice.
    head, _, tail = _dumps({**fields, _UNORDERED: []}).partition(_NO_ATTENDEES)
    if _NO_ATTENDEES in tail:  # a field inside another one is the same
        return _dumps(fields), _dumps({**fields, _UNORDERED: sorted(texts)})
    name = f'{head}"{_UNORDERED}":'
    return f"{name}[{','.join(texts)}]{tail}", f"{name}{_dumps(sorted(texts))}{tail}"


def _simplified(value: Any) -> Any:
    """Return a JSON value without the nulls of its objects, and with whole numbers as integers."""
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
    """Whether every database can keep it: no NUL, no half of a surrogate pair, short enough for an index."""
    return 0 < len(value) <= _LONGEST_ID and value.isprintable()
