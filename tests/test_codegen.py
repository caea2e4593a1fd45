"""The generated readers agree with the general reader, and handle all rows of the usual shape."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from cattrs import Converter
from hypothesis import example, given, strategies as st

from lemcal_async import _codec
from lemcal_async._codec import from_wire
from lemcal_async._codegen import fast_reader, fields_of
from lemcal_async.models import Attendee, Meeting, Model, User
from lemcal_async.sandbox._demo import make_account

DATA = Path(__file__).parent / "data"


class _UnusualError(Exception):
    """The row was passed to the general reader."""


def _refuse(_: Any, __: Any) -> Any:
    raise _UnusualError


@pytest.fixture
def usual_only() -> Any:
    """Return a function that reads only rows of the usual shape."""
    converter = Converter()
    converter.register_structure_hook(datetime, _refuse)
    converter.register_structure_hook(float, _codec.read_number)
    converter.register_structure_hook(timedelta, _codec.read_minutes)
    converter.register_structure_hook_factory(
        frozenset(get_args(Model)).__contains__,
        lambda model: fast_reader(model, fields_of(model), _refuse, _UnusualError, converter),
    )
    return lambda row, model: converter.get_structure_hook(model)(row, model)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.json")), ids=lambda path: path.name)
def test_samples_are_read_by_generated_readers(path: Path, usual_only: Any) -> None:
    """Samples with unknown fields, empty lists and nulls take the fast path."""
    model = {"hook": "Hook", "user": "User", "meeting": "Meeting"}.get(path.stem.split("_")[0], "")
    model = "MeetingType" if path.stem == "meeting_type" else model
    into = {model.__name__: model for model in get_args(Model)}[model]
    row = json.loads(path.read_text(encoding="utf-8"))
    assert from_wire(row, into) == usual_only(row, into)


def test_sandbox_rows_are_read_by_generated_readers(usual_only: Any) -> None:
    """The rows that the benchmarks use take the fast path."""
    rows = make_account(1, 0, 200).meetings
    assert [from_wire(row, Meeting) for row in rows] == [usual_only(row, Meeting) for row in rows]


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        {},
        {"_id": ""},
        {"_id": 7},
        {"_id": "m", "userId": 7},
        {"_id": "m", "canceledAt": ""},
        {"_id": "m", "start": "2021-02-16"},
        {"_id": "m", "start": "2021-13-16T08:02:42.000Z"},
        {"_id": "m", "attendees": {}},
        {"_id": "m", "attendees": [None]},
        {"_id": "m", "attendees": [{"owner": 1}]},
        {"_id": "m", "lead": []},
        {"_id": "m", "timezone": "A", "attendeeTimezone": "B"},
        {"_id": "m", "timezone": None, "attendeeTimezone": "B"},
        {"_id": "m", "timezone": "A", "attendeeTimezone": None},
        {"_id": "m", "questions": [], "surveyAnswers": []},
    ],
)
def test_unusual_rows(row: Any, usual_only: Any) -> None:
    """An unusual row is passed to the general reader, whether it is valid or not."""
    with pytest.raises(_UnusualError):
        usual_only(row, Meeting)


@pytest.mark.parametrize("into", get_args(Model))
def test_result_is_a_regular_model(into: Any) -> None:
    """The result is frozen, exactly of the model's class, and equal to a model created in Python."""
    row = {"_id": "x"} if "id" in attrs.fields_dict(into) else {}
    model = from_wire(row, into)
    assert into is type(model)
    assert repr(model) == repr(attrs.evolve(model))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        model.extra = {}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        del model.extra


class _Text(str):
    """A string subclass."""

    __slots__ = ()


def test_subclasses_of_json_types() -> None:
    """The general reader accepts subclasses of the JSON types."""
    assert Attendee(name="a", is_owner=True) == from_wire({"owner": True, "name": _Text("a")}, Attendee)


def test_models_share_no_state() -> None:
    """Two models share no mutable state."""
    first, second = from_wire([{"_id": "a"}, {"_id": "b"}], list[User])
    first.extra["new"] = 1
    assert {} == second.extra


USUAL = "2021-02-16T08:02:42.123Z"


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(USUAL) - 1),
            st.sampled_from("0123456789-:.,+ TtWZz\0\u0663é") | st.characters(),
        ),
        min_size=1,
        max_size=3,
    )
)
@example([(0, "\uff12")])
@example([(5, "W")])
@example([(22, "a")])
def test_almost_usual_times(changes: list[tuple[int, str]]) -> None:
    """Both readers agree on whether a slightly damaged time is valid."""
    text = list(USUAL)
    for place, character in changes:
        text[place] = character
    assert _read(User, "".join(text)) == _general("".join(text))


def _read(into: Any, text: str) -> Any:
    return from_wire({"_id": "u", "createdAt": text}, into).created_at


def _general(text: str) -> Any:
    try:
        return _codec.read_time(text, None)
    except _codec.MismatchError:
        return None
