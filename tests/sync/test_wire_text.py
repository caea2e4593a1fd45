"""The stored text of a wire row: every database can read it, and it restores the same value."""

import json

import pytest
from hypothesis import example, given, strategies as st

from lemcal_async.sync._columns import load, storable_json

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # including lone surrogates
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=8,
)


@given(VALUES)
@example("\0")
@example("\\u0000")
@example("\\\0")
@example("\ufffc0000")
@example("\U0001f600\ud83d")
@example("\udfff\ud800")
def test_round_trip(value: object) -> None:
    """Any text survives, and no escape that jsonb rejects is left."""
    text = storable_json(json.dumps(value))
    assert json.loads(json.dumps(value)) == load(text)
    assert text.isascii()
    assert not any(
        character == "\0" or "\ud800" <= character <= "\udfff" for character in strings(json.loads(text))
    )


def strings(value: object) -> str:
    """Return all characters in a JSON value's strings."""
    if isinstance(value, dict):
        return "".join(key + strings(inner) for key, inner in value.items())
    if isinstance(value, list):
        return "".join(map(strings, value))
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("value", ["plain", "Zürich \U0001f600", ["\n"], {"a": 1.5}])
def test_ordinary_text(value: object) -> None:
    """Ordinary text is stored as JSON, as the standard library writes it."""
    assert json.dumps(value) == storable_json(json.dumps(value))
