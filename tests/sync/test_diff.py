"""Comparison of a list of wire rows with the stored one."""

import hashlib
import json
from typing import Any

import attrs
import pytest
from hypothesis import example, given, strategies as st

from lemcal_async.sync._diff import (
    KINDS,
    Snapshot,
    StoredMeeting,
    changed_fields,
    compare,
    digest,
    needed_rows,
    snapshot,
    status_of,
)

CANCELED = "2026-01-05T08:00:00.000Z"


def stored_after(now: Snapshot) -> dict[str, StoredMeeting]:
    """Return what a store contains after applying a snapshot."""
    return {row.id: StoredMeeting(row.digest, status_of(row.wire), row.wire) for row in now.rows.values()}


def differences(before: list[Any], after: list[Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the changes between two lists."""
    found = compare(stored_after(snapshot(before)), snapshot(after))
    return [(difference.meeting_id, difference.kind, difference.fields) for difference in found]


def row(meeting_id: str, **fields: Any) -> dict[str, Any]:
    """Return a wire row."""
    return {"_id": meeting_id, **fields}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [row("a")], [("a", "created", ())]),
        ([row("a")], [], [("a", "disappeared", ())]),
        ([row("a", start="x")], [row("a", start="y")], [("a", "changed", ("start",))]),
        ([row("a")], [row("a", brandNew=1)], [("a", "changed", ("brandNew",))]),
        ([row("a", b=1, c=2)], [row("a", c=3, d=4)], [("a", "changed", ("b", "c", "d"))]),
        ([row("a", b={"x": [1]})], [row("a", b={"x": [2]})], [("a", "changed", ("b",))]),
        ([row("a", b=True)], [row("a", b=1)], [("a", "changed", ("b",))]),
        ([row("a", b="1")], [row("a", b=1)], [("a", "changed", ("b",))]),
        ([row("a")], [row("a", canceledAt=CANCELED)], [("a", "canceled", ("canceledAt",))]),
        (
            [row("a", start="x")],
            [row("a", start="y", canceledAt=CANCELED)],
            [("a", "canceled", ("canceledAt", "start"))],
        ),
        ([], [row("a", canceledAt=CANCELED)], [("a", "created", ())]),
        ([row("a", canceledAt=CANCELED)], [row("a")], [("a", "restored", ("canceledAt",))]),
        ([row("a", canceledAt="x")], [row("a", canceledAt="y")], [("a", "changed", ("canceledAt",))]),
        ([row("a", canceledAt=CANCELED)], [], [("a", "disappeared", ())]),
        ([row("a", b=1, c=2)], [{"c": 2, "b": 1, "_id": "a"}], []),
        ([row("a", b=None)], [row("a")], []),
        ([row("a", b={"c": None, "d": [{"e": None}]})], [row("a", b={"d": [{}]})], []),
        ([row("a", attendees=[{"e": 1}])], [row("a", attendees=[{"e": 1, "phone": None}])], []),
        ([row("a", b=[1, None])], [row("a", b=[1])], [("a", "changed", ("b",))]),
        ([row("a", b=5)], [row("a", b=5.0)], []),
        ([row("a", b={"c": [-3.0, 1e3, 2.5]})], [row("a", b={"c": [-3, 1000, 2.5]})], []),
        ([row("a", b=5)], [row("a", b=5.5)], [("a", "changed", ("b",))]),
        ([row("a", b=1.0)], [row("a", b=True)], [("a", "changed", ("b",))]),
        ([row("a", b="x:null")], [row("a", b="x:null")], []),
        ([row("a", b="1.50")], [row("a", b="1.5")], [("a", "changed", ("b",))]),
        ([row("a", attendees=[{"e": 1.0}, {"e": None}])], [row("a", attendees=[{}, {"e": 1}])], []),
        ([row("a", attendees=[{"e": 1}, {"e": 2}])], [row("a", attendees=[{"e": 2}, {"e": 1}])], []),
        (
            [row("a", attendees=[{"e": 1}, {"e": 1}])],
            [row("a", attendees=[{"e": 1}])],
            [("a", "changed", ("attendees",))],
        ),
        ([row("a", questions=[1, 2])], [row("a", questions=[2, 1])], [("a", "changed", ("questions",))]),
        ([row("a", attendees="odd")], [row("a", attendees="odd")], []),
        (
            [row("a", aa={"attendees": [1, 2]}, attendees=[1, 2])],
            [row("a", aa={"attendees": [1, 2]}, attendees=[2, 1])],
            [],
        ),
        ([row("a", b={"attendees": [1]})], [row("a", b={"attendees": [2]})], [("a", "changed", ("b",))]),
        ([row("a"), row("b")], [row("c"), row("b", x=1)], [
            ("c", "created", ()), ("b", "changed", ("x",)), ("a", "disappeared", ()),
        ]),
    ],
)  # fmt: skip
def test_differences(before: list[Any], after: list[Any], expected: list[Any]) -> None:
    """Every kind of change, on known and unknown fields."""
    assert expected == differences(before, after)
    assert {kind for _, kind, _ in expected} <= set(KINDS)


@pytest.mark.parametrize(
    ("status", "last", "after", "expected"),
    [
        ("disappeared", row("a"), row("a"), "restored"),
        ("disappeared", row("a"), row("a", x=1), "restored"),
        ("disappeared", row("a"), row("a", canceledAt=CANCELED), "canceled"),
        ("disappeared", row("a", canceledAt=CANCELED), row("a", canceledAt=CANCELED), "canceled"),
        ("disappeared", row("a", canceledAt=CANCELED), row("a", canceledAt="2026"), "canceled"),
        ("disappeared", row("a", canceledAt=CANCELED), row("a"), "restored"),
        ("pruned", None, row("a", x=1), "changed"),
        ("pruned", None, row("a", canceledAt=CANCELED), "changed"),
    ],
)
def test_reappearing_meeting(
    status: Any, last: dict[str, Any] | None, after: dict[str, Any], expected: str
) -> None:
    """A disappeared meeting can reappear; a pruned one reappears when it changes."""
    before = {"a": StoredMeeting(digest(last or row("a")), status, last)}
    assert [expected] == [found.kind for found in compare(before, snapshot([after]))]


def test_changed_pruned_meeting() -> None:
    """The changed fields are unknown, so all are named."""
    before = {"a": StoredMeeting(digest(row("a", start="x")), "pruned")}
    (found,) = compare(before, snapshot([row("a", start="y", end="z", lead=None)]))
    assert ("changed", ("end", "start")) == (found.kind, found.fields)


def test_meeting_disappears_once() -> None:
    """A meeting disappears once, and a pruned one never."""
    before = {"a": StoredMeeting("x", "disappeared", row("a")), "b": StoredMeeting("x", "pruned")}
    assert [] == compare(before, snapshot([]))
    assert [] == compare({"b": StoredMeeting(digest(row("b")), "pruned")}, snapshot([row("b")]))


def test_row_of_disappeared_meeting() -> None:
    """A disappeared meeting is reported with its last row, or only its id if there is none."""
    (disappeared,) = compare(stored_after(snapshot([row("a", x=1)])), snapshot([]))
    assert row("a", x=1) == disappeared.wire
    (disappeared,) = compare({"a": StoredMeeting("x", "booked")}, snapshot([]))
    assert row("a") == disappeared.wire


def test_different_canonical_form_is_no_change() -> None:
    """A digest of an older version alone is not reported as a change."""
    before = {"a": StoredMeeting("of another time", "booked", row("a", x=1))}
    assert [] == compare(before, snapshot([row("a", x=1)]))


@pytest.mark.parametrize(
    "bad", [None, 1, "a", [], {}, row(""), {"_id": None}, {"_id": 5}, row("a\0"), row("a" * 256)]
)
def test_row_without_id(bad: Any) -> None:
    """The row is reported. Nothing disappears, because the row may be the missing meeting."""
    now = snapshot([row("b", x=1), bad])
    assert ([1], [bad], False) == (
        [b.index for b in now.bad_rows],
        [b.row for b in now.bad_rows],
        now.complete,
    )
    found = compare(stored_after(snapshot([row("b"), row("c")])), now)
    assert [("b", "changed")] == [(difference.meeting_id, difference.kind) for difference in found]


def test_many_bad_rows() -> None:
    """Of millions of bad rows, only the first thousand are kept."""
    now = snapshot([0] * 5_000 + [row("a")])
    assert ((1000, 999), {"a"}) == ((len(now.bad_rows), now.bad_rows[-1].index), set(now.rows))


def test_duplicate_id() -> None:
    """The first row counts; a second one with different data is reported."""
    now = snapshot([row("a", x=1), row("a", x=1), row("a", x=2)])
    assert ["row 0 has the same _id but different data"] == [bad.reason for bad in now.bad_rows]
    assert row("a", x=1) == now.rows["a"].wire
    assert now.complete


def test_deeply_nested_row() -> None:
    """The row cannot be compared, but its meeting counts as present."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    now = snapshot([row("a", x=deep)])
    assert (["it is nested too deeply"], True, {}) == ([b.reason for b in now.bad_rows], "a" in now, now.rows)
    assert [] == compare({"a": StoredMeeting("x", "booked")}, now)
    while deep:  # or its deallocation would recurse as deeply
        deep = deep[0]


@pytest.mark.parametrize(
    "value", ["é", 1, 2.5, True, None, [], [None], {"b": "\ud800", "a": {"d": 1, "c": ""}}]
)
def test_row_text(value: Any) -> None:
    """The text is JSON in ASCII, with sorted keys."""
    text = snapshot([row("a", x=value)]).rows["a"].text
    assert json.dumps(row("a", x=value), sort_keys=True, separators=(",", ":")) == text


ids = st.sampled_from("abcdef")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(0, 3)
    | st.sampled_from([1.0, 2.5, -0.0])
    | st.sampled_from(["x", "é", "\ud800", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("kl"), inner),
    max_leaves=5,
)
bodies = st.dictionaries(st.sampled_from(["start", "canceledAt", "attendees", "unknown"]), values)
lists = st.dictionaries(ids, bodies).map(lambda rows: [row(key, **body) for key, body in rows.items()])


@given(lists, lists)
def test_each_difference_is_reported_once(before: list[Any], after: list[Any]) -> None:
    """Each meeting has at most one difference, and none once the list is stored."""
    first, second = snapshot(before), snapshot(after)
    found = {difference.meeting_id: difference for difference in compare(stored_after(first), second)}
    disappeared = {difference.meeting_id for difference in found.values() if difference.kind == "disappeared"}
    created = {difference.meeting_id for difference in found.values() if difference.kind == "created"}
    assert first.rows.keys() - second.rows.keys() == disappeared
    assert second.rows.keys() - first.rows.keys() == created
    for meeting_id in first.rows.keys() & second.rows.keys():
        old, new = first.rows[meeting_id], second.rows[meeting_id]
        assert (old.digest == new.digest) is (meeting_id not in found)
        assert bool(changed_fields(old.wire, new.wire)) is (meeting_id in found)
    assert [] == compare(stored_after(second), second)


@given(lists, lists)
def test_needed_rows_suffice(before: list[Any], after: list[Any]) -> None:
    """The rows that ``needed_rows`` names are enough for the comparison."""
    now, everything = snapshot(after), stored_after(snapshot(before))
    needed = needed_rows(everything, now)
    sparse = {
        key: meeting if key in needed else attrs.evolve(meeting, wire=None)
        for key, meeting in everything.items()
    }
    assert compare(everything, now) == compare(sparse, now)


@given(bodies, st.randoms())
def test_digest_ignores_order(body: dict[str, Any], rng: Any) -> None:
    """The order of keys and attendees and a round trip through JSON do not change the digest."""
    shuffled = json.loads(json.dumps(body))
    if isinstance(shuffled.get("attendees"), list):
        rng.shuffle(shuffled["attendees"])
    keys = list(shuffled)
    rng.shuffle(keys)
    assert digest(body) == digest({key: shuffled[key] for key in keys})


# Attendees at other depths and in strings, where they have no special meaning.
odd_values = st.recursive(
    scalars | st.sampled_from(['"attendees":[]', '"attendees":0', ":null,1.0,[2e3]", 1e16, 1e-7, 10**20]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["attendees", "k"]), inner),
    max_leaves=8,
)
odd_rows = st.dictionaries(st.sampled_from(["a", "attendees", "z"]), odd_values)


@given(odd_rows)
@example({"attendees": []})
@example({"attendees": None})
@example({"attendees": [], "a": {"attendees": []}})
@example({"attendees": [1], "z": {"attendees": 0}})
@example({"attendees": [{"k": None}, [None], None, "", 1.0]})
def test_digest_is_stable(body: dict[str, Any]) -> None:
    """Databases contain digests: if they changed, every meeting would be compared again."""
    simple = simplified(body)
    if isinstance(simple.get("attendees"), list):
        simple["attendees"] = sorted(map(compact, simple["attendees"]))
    expected = hashlib.blake2b(compact(simple).encode(), digest_size=16).hexdigest()
    now = snapshot([row("m", **body)])
    assert expected == digest(body)
    assert digest(row("m", **body)) == now.rows["m"].digest
    assert compact(row("m", **body)) == now.rows["m"].text


def test_digest_of_version_1() -> None:
    """The digest equals the one that a database of version 1 contains."""
    attendees = [{"email": "b@example.com", "primary": True, "x": None}, {"email": "a@example.com"}]
    assert "e6bb8473bf0514880203ea50f45db786" == digest(
        row("mee_1", attendees=attendees, weight=2.0, name="Zoë")
    )


def simplified(value: Any) -> Any:
    """Return a JSON value with integral floats as integers, and without nulls in its objects."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]  # any JSON
    if kind is dict:
        return {key: simplified(inner) for key, inner in value.items() if inner is not None}
    if kind is list:
        return list(map(simplified, value))
    return int(value) if kind is float and value.is_integer() else value


def compact(value: Any) -> str:
    """Return a value as JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
