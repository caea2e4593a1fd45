"""Slicing long arrays: the slices add up to the whole array, or slicing is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from lemcal_async import _decoding
from lemcal_async._decoding import NotSlicedError, slices_of, unwrapped
from lemcal_async._responses import DECODER

ROWS: list[Any] = [
    {"_id": f"mee_{number}", "attendees": [{"email": "a@example.com"}, {"email": "é😀"}], "n": number}
    for number in range(100)
]


def sliced(body: bytes, size: int) -> list[list[Any]]:
    """Return all slices."""
    return list(slices_of(body, DECODER, size))


def whole(slices: list[list[Any]]) -> list[Any]:
    """Join the slices."""
    return [row for rows in slices for row in rows]


@pytest.mark.parametrize(
    "style", [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": "\t"}, {"ensure_ascii": False}]
)
@pytest.mark.parametrize("size", [1, 200, 1000, 1_000_000])
def test_any_formatting(style: dict[str, Any], size: int) -> None:
    """In any JSON formatting, the cuts are between rows and nowhere else."""
    slices = sliced(json.dumps(ROWS, **style).encode(), size)
    assert ROWS == whole(slices)
    assert (1 if size > 100_000 else len(slices)) == len(slices)
    if size < 1001:
        assert len(slices) > 5


@pytest.mark.parametrize("around", [("\ufeff", ""), (" \r\n\t", " \n"), ("\ufeff\n", "\t")])
def test_surrounding_white_space(around: tuple[str, str]) -> None:
    """A byte order mark and white space around the array are accepted."""
    body = (around[0] + json.dumps(ROWS) + around[1]).encode()
    assert ROWS == whole(sliced(body, 300))


@pytest.mark.parametrize("name", ["meetings", "data"])
@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}])
@pytest.mark.parametrize("around", [("", ""), ("\ufeff\n", " \n")])
def test_envelope(name: str, style: dict[str, Any], around: tuple[str, str]) -> None:
    """An array in an envelope is sliced like any other."""
    body = (around[0] + json.dumps({name: ROWS}, **style) + around[1]).encode()
    assert ROWS == whole(sliced(unwrapped(body, ("meetings", "data")), 300))


@pytest.mark.parametrize(
    "other",
    [{"more": 1}, {"more": [1]}, {"more": [{"_id": "mee_x"}, {"_id": "mee_y"}]}, {"more": {"data": [1]}}],
)
@pytest.mark.parametrize("first", [True, False])
def test_envelope_with_more_members(other: dict[str, Any], *, first: bool) -> None:
    """An envelope with more members is not sliced, so they are never mistaken for rows."""
    data = {**other, "data": ROWS} if first else {"data": ROWS, **other}
    with pytest.raises(NotSlicedError):
        sliced(unwrapped(json.dumps(data).encode(), ("meetings", "data")), 300)


def test_text_that_looks_like_a_row_boundary() -> None:
    """Objects and text inside a row may look like a boundary, but a slice cut there does not parse."""
    inner = [{"_id": "x"}, {"_id": '},{"_id":'}, {"_id": "y", "again": [{"_id": 1}, {"_id": 2}]}]
    rows = [{"_id": str(number), "inner": inner} for number in range(50)]
    for size in range(1, 400, 7):
        assert rows == whole(sliced(json.dumps(rows).encode(), size))


def test_too_many_false_boundaries() -> None:
    """An array is not sliced if a row contains too many false boundaries."""
    rows = [{"_id": 0}, {"_id": 1, "inner": [{"_id": number} for number in range(1000)]}, {"_id": 2}]
    with pytest.raises(NotSlicedError):
        sliced(json.dumps(rows).encode(), 20)
    assert rows == whole(sliced(json.dumps(rows).encode(), 20_000))


def test_rows_of_different_kinds() -> None:
    """Only the first two rows must be of the same kind."""
    rows = [*ROWS[:2], None, 7, [], *ROWS[2:], {"another": 1}, {}, "text"]
    assert rows == whole(sliced(json.dumps(rows).encode(), 300))


@pytest.mark.parametrize("row", [0, None, True, -1.5e3, "a, b", "},{", [], [1, [2]], {}, {"": {}}])
@pytest.mark.parametrize("separators", [(",", ":"), (" , ", ": "), (",\n", ":")])
def test_rows_of_one_kind(row: Any, separators: tuple[str, str]) -> None:
    """Lists of any kind are sliced, so that millions of junk rows never exist at once."""
    slices = sliced(json.dumps([row] * 500, separators=separators).encode(), 100)
    assert [row] * 500 == whole(slices)
    assert len(slices) > 5


@pytest.mark.parametrize("row", ["0", "{}", "[]", '{"b":{}}'])
def test_unsliceable_text_with_too_many_values_is_not_parsed(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed values take up to 24 times the memory of their text, so they are counted first."""
    body = f'[{{"a":[{",".join([row] * 2_000)}]}},{{"a":1}}]'.encode()
    assert 2 == len(whole(sliced(body, 1)))
    monkeypatch.setattr(_decoding, "_MAX_VALUES", 1_000)
    monkeypatch.setattr(_decoding, "_ALWAYS_FEWER", 1_000)
    with pytest.raises(NotSlicedError):
        sliced(body, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[ ]",
        b'[{"a": 1}]',
        b'[{"a": 1}, 2]',
        b'[{}, {"a": 1}]x',
        b'{"data": [{"a": 1}, {"a": 2}]}',
        b"<html>",
        b'[{"a": 1}, {"a": 2}',
        b'[{"a": 1}, {"a": 2},]',
        b'[{"a": 1}, {"a": 2}]]',
        b'[{"a": 1}, {"a": 2}] []',
        b'[{"a": 1}, {"a": 2}],[{"a": 3}, {"a": 4}]',
        b'[{"a": 1}], [{"a": 2}, {"a": 3}]',
        b'[{"a": 1}, {"a": NaN}]',
        b'[{"a": 1}, {"a": 1e999}]',
        b'[{"a": 1}, {"a": "\xff"}]',
        b'[{"a": "\xff"}, {"a": 1}]',
        b'[{"a": 1} {"a": 1}]',
        b'[{"a": 1', b"[{",
        b'[{"a": ' + b"[" * 100_000,
        b'[{"a": 1}, {"a": ' + b"[" * 100_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_not_sliced(body: bytes, size: int) -> None:
    """Text that is too short, of another shape, or not JSON is not sliced."""
    with pytest.raises(NotSlicedError):
        sliced(body, size)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab_,:{}[]"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.sampled_from("ab_"), values, max_size=3) | values, max_size=12),
    st.integers(1, 60),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_slices_add_up_to_the_array(rows: list[Any], size: int, indent: int | None, ascii_only: bool) -> None:  # noqa: FBT001 - drawn
    """For any array, the slices add up to it, or slicing is refused."""
    body = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    try:
        slices = sliced(body, size)
    except NotSlicedError:
        return
    assert repr(json.loads(body)) == repr(whole(slices))


@given(st.data())
def test_damaged_text_is_refused(data: st.DataObject) -> None:
    """If slices of a damaged text parse, the whole text parses as well, with the same result."""
    body = bytearray(json.dumps(ROWS[:6]).encode())
    at = data.draw(st.integers(0, len(body) - 1))
    body[at : at + data.draw(st.sampled_from([1, 1, 10_000]))] = data.draw(
        st.sampled_from([b"", b",", b"]", b"[", b"}", b"{", b'"', b"],[", b"\xff", b"},{"])
    )
    try:
        rows = whole(sliced(bytes(body), data.draw(st.integers(1, 200))))
    except NotSlicedError:
        return
    assert rows == DECODER.decode(body.decode())
