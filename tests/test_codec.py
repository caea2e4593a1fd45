"""The wire format: how each shape is read and written back, and the messages for what is refused."""

import copy
import gc
import json
import pickle
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, assert_type, get_args

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from lemcal_async import _codec
from lemcal_async._codec import RowReader, from_wire, to_wire
from lemcal_async.errors import BadRow, ResponseDecodeError
from lemcal_async.models import (
    Answer,
    Attendee,
    Hook,
    Lead,
    Meeting,
    MeetingLocation,
    MeetingType,
    Model,
    Question,
    RoundRobin,
    RoundRobinUser,
    User,
)

DATA = Path(__file__).parent / "data"
SAMPLES: dict[str, Any] = {
    "hook.json": Hook,
    "hook_any.json": Hook,
    "meeting_campaign.json": Meeting,
    "meeting_canceled.json": Meeting,
    "meeting_public.json": Meeting,
    "meeting_type.json": MeetingType,
    "user.json": User,
}
SECRET = "not to be seen"
AT = datetime(2021, 2, 16, 8, 2, 42, tzinfo=UTC)


def sample(name: str) -> Any:
    """Read a sample response of the service."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def exact(data: Any) -> str:
    """Return data as text in which 1, 1.0 and true differ, but the order of fields does not matter."""
    return json.dumps(data, sort_keys=True)


def meaning(data: Any) -> Any:
    """Return data without null fields, and with a single form for 5, 5.0 and "5"."""
    if isinstance(data, dict):
        return {name: meaning(value) for name, value in data.items() if value is not None}
    if isinstance(data, list):
        return [meaning(item) for item in data]
    if isinstance(data, str) and re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", data, re.ASCII):
        return meaning(json.loads(data))
    return int(data) if isinstance(data, float) and data.is_integer() else data


def refusal(data: Any, into: Any) -> str:
    """Return the error message for data, after checking that it pickles and has no cause or context."""
    with pytest.raises(ResponseDecodeError) as caught:
        from_wire(data, into)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    message = str(caught.value)
    assert message == str(pickle.loads(pickle.dumps(caught.value)))
    return message


def problems_of(wire: Any, into: Any) -> list[str]:
    """Return the problems of a model, after checking that it and its copies are written back unchanged."""
    before = repr(wire)
    model = from_wire(wire, into)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), attrs.evolve(model)):
        back = to_wire(copied)
        assert exact(wire) == exact(back)
        assert model.problems == copied.problems
    assert before == repr(wire)
    return list(model.problems)


# --- The samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_written_back_unchanged(name: Any) -> None:
    """Sample responses are written back unchanged, and the data passed in is not modified."""
    wire = sample(name)
    model = from_wire(wire, SAMPLES[name])
    assert exact(sample(name)) == exact(to_wire(model))
    assert exact(sample(name)) == exact(wire)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, attrs.evolve, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_are_written_back_unchanged(name: Any, copied: Any) -> None:
    """A copy keeps the spellings and empty lists of the original."""
    model = copied(from_wire(sample(name), SAMPLES[name]))
    assert exact(sample(name)) == exact(to_wire(model))


def test_fields_of_a_public_booking() -> None:
    """Every field of the sample is read into its attribute."""
    expected = Meeting(
        id="mee_Gk2sVq8ZtXw4Lb7Rn",
        user_id="usr_BuDuyx4chjoNfcmzM",
        meeting_type_id="met_9hTfQx3YpLd6Wk2Zs",
        meeting_type_name="Product tour",
        provided_infos={"name": "Ada Example", "email": "ada@example.com", "company": "Example Ltd"},
        event_id="7a1c9e0f4b2d48d6a3b5",
        start=datetime(2021, 2, 16, 8, 0, tzinfo=UTC),
        end=datetime(2021, 2, 16, 8, 30, tzinfo=UTC),
        attendees=(
            Attendee(
                email="host@example.org",
                name="Hal Host",
                type="required",
                response="accepted",
                is_owner=True,
            ),
            Attendee(
                email="ada@example.com",
                name="Ada Example",
                type="required",
                response="needsAction",
                is_primary=True,
            ),
        ),
        answers=(Answer(question="What would you like to see?", answer="The calendar"),),
        timezone="Europe/Paris",
        created_at=datetime(2021, 2, 15, 17, 41, 9, 402000, tzinfo=UTC),
    )
    assert expected == from_wire(sample("meeting_public.json"), Meeting)


def test_fields_of_a_meeting_type() -> None:
    """Every field of the sample is read into its attribute, or into extra if unknown."""
    expected = MeetingType(
        id="met_9hTfQx3YpLd6Wk2Zs",
        user_id="usr_BuDuyx4chjoNfcmzM",
        name="Product tour",
        description="Half an hour with the product.",
        meeting_link="product-tour",
        type="roundRobin",
        color="#EC6181",
        duration=timedelta(minutes=30),
        status="enabled",
        privacy="public",
        meeting_locations=(
            MeetingLocation(id="loc_1", provider="googleMeet"),
            MeetingLocation(id="loc_2", provider="phone", extra={"number": "+10000000000"}),
        ),
        questions=(
            Question(id="q1", answer_type="text", enabled=True, question="What would you like to see?"),
        ),
        round_robin=RoundRobin(
            enabled=True,
            users=(
                RoundRobinUser(id="usr_BuDuyx4chjoNfcmzM", enabled=True, weight=1),
                RoundRobinUser(id="usr_Jm4Tz8QyWc2Xn6Vbd", enabled=False, weight=0.5),
            ),
        ),
        extra={"bufferBefore": 10},
    )
    assert expected == from_wire(sample("meeting_type.json"), MeetingType)


# --- Spellings, lists, unknown fields ---------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "timezone_", "extra"),
    [
        ({"timezone": "A"}, "A", {}),
        ({"attendeeTimezone": "A"}, "A", {}),
        ({"attendeeTimezone": "A", "timezone": "B"}, "A", {"timezone": "B"}),
        ({"timezone": "B", "attendeeTimezone": "A"}, "A", {"timezone": "B"}),
        ({"attendeeTimezone": "A", "timezone": None}, "A", {"timezone": None}),
        ({"attendeeTimezone": "A", "timezone": 7}, "A", {"timezone": 7}),
        ({"attendeeTimezone": None, "timezone": "B"}, "B", {"attendeeTimezone": None}),
        ({"attendeeTimezone": "", "timezone": "B"}, "", {"timezone": "B"}),
        ({"attendeeTimezone": 7, "timezone": "B"}, "B", {"attendeeTimezone": 7}),
        ({"attendeeTimezone": 7, "timezone": None}, None, {"attendeeTimezone": 7, "timezone": None}),
    ],
)
def test_spellings_of_the_time_zone(wire: Any, timezone_: Any, extra: Any) -> None:
    """The first spelling that is not null and can be read is used; both are written back unchanged."""
    model = from_wire({"_id": "m", **wire}, Meeting)
    assert (timezone_, extra) == (model.timezone, model.extra)
    assert {"_id": "m", **wire} == to_wire(model)


@pytest.mark.parametrize(
    ("wire", "answers", "extra"),
    [
        ({"questions": [{"answer": "a"}]}, (Answer(answer="a"),), {}),
        ({"surveyAnswers": [{"answer": "a"}]}, (Answer(answer="a"),), {}),
        ({"surveyAnswers": []}, (), {}),
        (
            {"surveyAnswers": [{"answer": "b"}], "questions": [{"answer": "a"}]},
            (Answer(answer="a"),),
            {"surveyAnswers": [{"answer": "b"}]},
        ),
        ({"surveyAnswers": [{"answer": "b"}], "questions": []}, (), {"surveyAnswers": [{"answer": "b"}]}),
        ({"surveyAnswers": [{"answer": "b"}], "questions": None}, (Answer(answer="b"),), {"questions": None}),
    ],
)
def test_spellings_of_the_answers(wire: Any, answers: Any, extra: Any) -> None:
    """Answers are read from ``questions`` or ``surveyAnswers``, and written back under the same name."""
    model = from_wire({"_id": "m", **wire}, Meeting)
    assert (answers, extra) == (model.answers, model.extra)
    assert {"_id": "m", **wire} == to_wire(model)


def test_two_null_spellings() -> None:
    """If both spellings are null, the field is absent."""
    wire = {"_id": "m", "attendeeTimezone": None, "timezone": None, "questions": None, "surveyAnswers": None}
    assert Meeting(id="m") == from_wire(wire, Meeting)
    assert to_wire(Meeting(id="m")) == to_wire(from_wire(wire, Meeting))


def test_new_objects_use_the_default_spelling() -> None:
    """A meeting created in Python is written with ``timezone`` and ``questions``."""
    meeting = Meeting(id="m", timezone="UTC", answers=(Answer(answer="a"),))
    expected = {"_id": "m", "timezone": "UTC", "questions": [{"answer": "a"}]}
    assert expected == to_wire(meeting)


def test_a_changed_meeting_keeps_its_spelling() -> None:
    """New values are written under the spellings of the old ones."""
    wire = {"_id": "m", "attendeeTimezone": "A", "surveyAnswers": [], "attendees": [{"name": "a"}]}
    changed = attrs.evolve(
        from_wire(wire, Meeting), timezone="B", answers=(Answer(answer="b"),), attendees=()
    )
    expected = {"_id": "m", "attendeeTimezone": "B", "surveyAnswers": [{"answer": "b"}], "attendees": []}
    assert expected == to_wire(changed)


@pytest.mark.parametrize(
    ("into", "name"),
    [
        (Meeting, "attendees"),
        (Meeting, "questions"),
        (Meeting, "surveyAnswers"),
        (MeetingType, "meetingLocations"),
        (MeetingType, "questions"),
    ],
)
def test_empty_list_differs_from_an_absent_one(into: Any, name: Any) -> None:
    """``[]`` is written back as ``[]``; absent and null lists are omitted."""
    empty, null, absent = {"_id": "m", name: []}, {"_id": "m", name: None}, {"_id": "m"}
    assert empty == to_wire(from_wire(empty, into))
    assert absent == to_wire(from_wire(null, into))
    assert absent == to_wire(from_wire(absent, into))


@pytest.mark.parametrize("wire", [{}, {"users": []}, {"lastCycle": []}, {"lastCycle": [None, {"a": 1}]}])
def test_lists_of_a_nested_model(wire: Any) -> None:
    """Nested models also distinguish empty from absent lists, and keep free-form items."""
    assert {"_id": "m", "roundRobin": wire} == to_wire(
        from_wire({"_id": "m", "roundRobin": wire}, MeetingType)
    )


@pytest.mark.parametrize("name", ["id", "user_id", "userid", "isOwner", "extra", "_wire_names", "", "self"])
def test_attribute_names_are_unknown_on_the_wire(name: Any) -> None:
    """Only wire names are known. Any other name goes to extra, even the name of an attribute."""
    wire = {"_id": "m", name: None, "lead": {name: [1, None]}, "attendees": [{name: {"a": 1.0}}]}
    model = from_wire(wire, Meeting)
    assert ({name: None}, {name: [1, None]}) == (model.extra, model.lead and model.lead.extra)
    assert (Attendee(extra={name: {"a": 1.0}}),) == model.attendees
    assert exact(wire) == exact(to_wire(model))


def test_extra_does_not_override_a_field() -> None:
    """If extra contains the name of a field, the field takes precedence."""
    meeting = Meeting(id="m", timezone="A", extra={"_id": "other", "timezone": "B", "new": 1})
    expected = {"_id": "m", "timezone": "A", "new": 1}
    assert expected == to_wire(meeting)


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, [[[]]], {"a": {"b": [1.5, None, "x"]}}])
def test_provided_infos_may_be_any_json(value: Any) -> None:
    """The shape of providedInfos is not documented, so any JSON is accepted."""
    model = from_wire({"_id": "m", "providedInfos": value}, Meeting)
    assert exact(value) == exact(model.provided_infos)
    assert exact({"_id": "m"} | ({} if value is None else {"providedInfos": value})) == exact(to_wire(model))


# --- Primitives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "instant", "written"),
    [
        ("2021-02-16T08:02:42.000Z", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T08:02:42Z", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T08:02Z", AT.replace(second=0), "2021-02-16T08:02:00.000Z"),
        ("20210216T080242Z", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T08:02:42.5Z", AT.replace(microsecond=500000), "2021-02-16T08:02:42.500Z"),
        ("2021-02-16T08:02:42,5Z", AT.replace(microsecond=500000), "2021-02-16T08:02:42.500Z"),
        (
            "2021-02-16T08:02:42.123456Z",
            AT.replace(microsecond=123456),
            "2021-02-16T08:02:42.123456Z",
        ),
        (
            f"2021-02-16T08:02:42.{'9' * 4000}Z",
            AT.replace(microsecond=999999),
            "2021-02-16T08:02:42.999999Z",
        ),
        ("2021-02-16T09:02:42+01:00", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T09:02:42+0100", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T09:02:42.000+01", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-15T20:32:42-11:30", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T08:02:42-00:00", AT, "2021-02-16T08:02:42.000Z"),
        ("2021-02-16T08:12:02+00:09:20", AT, "2021-02-16T08:02:42.000Z"),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC), "0001-01-01T00:00:00.000Z"),
        (
            "9999-12-31T23:59:59.999999Z",
            datetime.max.replace(tzinfo=UTC),
            "9999-12-31T23:59:59.999999Z",
        ),
    ],
)
def test_valid_times(text: Any, instant: Any, written: Any) -> None:
    """Any ISO 8601 time with an offset is read as UTC; microseconds are written only if nonzero."""
    model = from_wire({"_id": "u", "createdAt": text}, User)
    assert User(id="u", created_at=instant) == model
    assert model.created_at is not None
    assert UTC is model.created_at.tzinfo
    assert {"_id": "u", "createdAt": written} == to_wire(model)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "now",
        "2021-02-16",
        "2021-02-16Z",
        "2021-02-16T",
        "2021-02-16T08:02:42",  # naive
        "2021-02-16T08:02:42.000",
        "2021-02-16T08:02.5Z",  # a fraction of a minute
        "2021-02-16T08:02:42.Z",
        "2021-02-16T08:02:42.12a4Z",
        "2021-02-16T08:02:42 Z",
        "2021-02-16T08:02:42\0Z",
        "2021-02-16T08:02:42Z\n",
        " 2021-02-16T08:02:42Z",
        "2021-02-16x08:02:42Z",
        "2021-02-16T08:02:42+",
        "2021-02-16T08:02:42+1",
        "2021-02-16T08:02:42+01:60",
        "2021-02-16T08:02:42+24:00",
        "2021-02-16T08:02:42Z+01:00",
        "2021-02-30T08:02:42Z",
        "2021-13-01T08:02:42Z",
        "2021-02-16T25:02:42Z",
        "2021-02-16T08:02:61Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "\uff12021-02-16T08:02:42Z",
        "2021-02-16T08:02:42\ud800",
        "Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)",
        1613462562000,
        1.5,
        True,
        [],
        {},
    ],
)
def test_invalid_times(value: Any) -> None:
    """Naive times, dates without a time, junk and years out of range are not instants."""
    got = "text that is not one" if isinstance(value, str) else type(value).__name__
    problem = f"createdAt: expected an ISO 8601 time with an offset, got {got}"
    wire = {"_id": "u", "createdAt": value}
    assert [problem] == problems_of(wire, User)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (30, 30),
        (0, 0),
        (-5, -5),
        (30.0, 30.0),
        (30.5, 30.5),
        (10**400, 10**400),
        ("30", 30),
        ("0", 0),
        ("-5", -5),
        ("30.0", 30.0),
        ("30.5", 30.5),
        ("3e1", 30.0),
        ("-3.5E-1", -0.35),
        ("1" * 300, int("1" * 300)),
        (f"0.{'0' * 5000}", 0.0),
    ],
)
def test_valid_numbers(value: Any, number: Any) -> None:
    """Numbers are read unchanged, or from a string that is a JSON number; integers stay integers."""
    model = from_wire({"weight": value}, RoundRobinUser)
    assert exact(number) == exact(model.weight)
    assert exact({"weight": number}) == exact(to_wire(model))


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " 30",
        "30\n",
        "+30",
        "030",
        "30.",
        ".5",
        "3e",
        "0x1e",
        "1_000",
        "1,5",
        "nan",
        "NaN",
        "inf",
        "Infinity",
        "-",
        "1e999",
        "9" * 400,
        "9" * 100_000,
        "\u0663\u0660",
        "half an hour",
        [],
        {},
    ],
)
def test_invalid_numbers(value: Any) -> None:
    """Booleans, other strings, and values beyond a double are not numbers."""
    got = "text that is not one" if isinstance(value, str) else type(value).__name__
    problem = f"weight: expected a finite number, got {got}"
    assert [problem] == problems_of({"weight": value}, RoundRobinUser)


@pytest.mark.parametrize(
    ("value", "duration", "written"),
    [
        (30, timedelta(minutes=30), 30),
        (30.0, timedelta(minutes=30), 30),
        (30.5, timedelta(minutes=30, seconds=30), 30.5),
        ("45", timedelta(minutes=45), 45),
        (0, timedelta(0), 0),
        (-5, timedelta(minutes=-5), -5),
        (0.1, timedelta(seconds=6), 0.1),
    ],
)
def test_valid_durations(value: Any, duration: Any, written: Any) -> None:
    """A number of minutes, or a string with one, is read as a timedelta and written as minutes."""
    model = from_wire({"_id": "t", "duration": value}, MeetingType)
    assert duration == model.duration
    assert exact({"_id": "t", "duration": written}) == exact(to_wire(model))


@pytest.mark.parametrize(
    "value", [1e-9, 10**400, 1e300, -(10**20), True, "PT30M", {"minutes": 30}, float("nan")]
)
def test_invalid_durations(value: Any) -> None:
    """A value that a timedelta would round or cannot hold is kept unchanged."""
    model = from_wire({"_id": "t", "duration": value}, MeetingType)
    assert (None, 1) == (model.duration, len(model.problems))
    assert repr({"_id": "t", "duration": value}) == repr(to_wire(model))


@pytest.mark.parametrize("value", [0, 1, 1.5, True, [], {}, ["a"]])
def test_only_strings_are_read_as_strings(value: Any) -> None:
    """No other type is converted to a string."""
    assert [f"email: expected a string, got {type(value).__name__}"] == problems_of({"email": value}, Lead)


@pytest.mark.parametrize("value", [0, 1, "true", "false", "", [], {}])
def test_only_booleans_are_read_as_booleans(value: Any) -> None:
    """No other type is converted to a boolean: "false" would become true."""
    assert [f"owner: expected a boolean, got {type(value).__name__}"] == problems_of(
        {"owner": value}, Attendee
    )


@pytest.mark.parametrize("into", [Hook, Meeting, MeetingType, User])
@pytest.mark.parametrize(
    ("wire", "problem"),
    [
        ({}, "_id: expected a non-empty string, got null"),
        ({"id": "x"}, "_id: expected a non-empty string, got null"),
        ({"_id": None}, "_id: expected a non-empty string, got null"),
        ({"_id": ""}, "_id: expected a non-empty string, got str"),
        ({"_id": 7}, "_id: expected a string, got int"),
        ({"_id": 0}, "_id: expected a string, got int"),
        ({"_id": ["x"]}, "_id: expected a string, got list"),
    ],
)
def test_missing_or_invalid_id(into: Any, wire: Any, problem: Any) -> None:
    """Without a usable ``_id`` there is no model."""
    assert problem == refusal(wire, into)


# --- Unreadable values ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [], "", 7, Meeting(id="m")])
def test_only_objects_are_read_as_models(data: Any) -> None:
    """Any other JSON is refused."""
    got = "null" if data is None else type(data).__name__
    assert f"expected an object, got {got}" == refusal(data, Meeting)


@pytest.mark.parametrize(
    ("wire", "problems"),
    [
        ({"eventId": 7}, ["eventId: expected a string, got int"]),
        (
            {"canceledAt": ""},
            ["canceledAt: expected an ISO 8601 time with an offset, got text that is not one"],
        ),
        ({"canceledAt": False}, ["canceledAt: expected an ISO 8601 time with an offset, got bool"]),
        (
            {"start": "soon", "end": 7},
            [
                "start: expected an ISO 8601 time with an offset, got text that is not one",
                "end: expected an ISO 8601 time with an offset, got int",
            ],
        ),
        ({"lead": []}, ["lead: expected an object, got list"]),
        ({"lead": {"firstName": 7, "email": "a"}}, ["lead.firstName: expected a string, got int"]),
        ({"attendees": {}}, ["attendees: expected a list, got dict"]),
        ({"attendees": "none"}, ["attendees: expected a list, got str"]),
        ({"attendees": [None]}, ["attendees[0]: expected an object, got null"]),
        ({"attendees": [{"name": "a"}, [], {}]}, ["attendees[1]: expected an object, got list"]),
        (
            {"attendees": [{}, {"email": 7, "primary": 1}]},
            [
                "attendees[1].email: expected a string, got int",
                "attendees[1].primary: expected a boolean, got int",
            ],
        ),
        ({"surveyAnswers": [{"question": 7}]}, ["surveyAnswers[0].question: expected a string, got int"]),
        ({"questions": 7, "surveyAnswers": []}, ["questions: expected a list, got int"]),
        ({"attendeeTimezone": 7, "timezone": "A"}, ["attendeeTimezone: expected a string, got int"]),
    ],
)
def test_unreadable_value_affects_only_its_field(wire: Any, problems: Any) -> None:
    """The value is kept, its path is reported, and the rest of the row is read."""
    rest = {"meetingTypeName": "Tour", "createdAt": "2021-02-16T08:02:42.000Z", "new": [1]}
    assert problems == problems_of({"_id": "m", **wire, **rest}, Meeting)
    model = from_wire({"_id": "m", **wire, **rest}, Meeting)
    assert ("Tour", AT, [1]) == (model.meeting_type_name, model.created_at, model.extra["new"])


def test_unreadable_value_in_a_nested_model() -> None:
    """The path leads through objects and lists, and only the innermost field is lost."""
    wire = {"_id": "t", "roundRobin": {"users": [{"weight": 1}, {"weight": "heavy", "id": "u"}]}}
    problem = "expected a finite number, got text that is not one"
    assert [f"roundRobin.users[1].weight: {problem}"] == problems_of(wire, MeetingType)
    round_robin = from_wire(wire, MeetingType).round_robin
    assert round_robin is not None
    assert (f"users[1].weight: {problem}",) == round_robin.problems
    assert RoundRobinUser(id="u", extra={"weight": "heavy"}) == round_robin.users[1]
    assert (f"weight: {problem}",) == round_robin.users[1].problems


def test_list_with_unreadable_items() -> None:
    """A null attendee does not hide the guest, and an unmodified list is written back whole."""
    wire = {"_id": "m", "attendees": [None, {"email": "g", "primary": True}, 7]}
    model = from_wire(wire, Meeting)
    assert (Attendee(email="g", is_primary=True),) == model.attendees
    assert model.attendees[0] == model.guest
    assert wire == to_wire(model)
    assert {"_id": "m", "attendees": [{"email": "h"}]} == to_wire(
        attrs.evolve(model, attendees=(Attendee(email="h"),))
    )
    assert wire | {"attendees": []} == to_wire(attrs.evolve(model, attendees=(), extra={}))


def test_new_value_replaces_the_unreadable_one() -> None:
    """A field that is set after reading takes precedence over the value in extra."""
    model = from_wire({"_id": "m", "canceledAt": "", "attendeeTimezone": 7}, Meeting)
    changed = attrs.evolve(model, canceled_at=AT, timezone="B")
    back = from_wire(to_wire(changed), Meeting)
    assert (AT, "B") == (back.canceled_at, back.timezone)


@pytest.mark.parametrize("answer", ["text", ["a", "b"], True, 7, 1.5, {"other": "x"}, "", [], False])
def test_an_answer_may_be_any_json(answer: Any) -> None:
    """An answer can be a list for check boxes, or a boolean for a switch."""
    wire = {"_id": "m", "questions": [{"question": "Which?", "answer": answer}]}
    model = from_wire(wire, Meeting)
    assert ((), exact(answer)) == (model.problems, exact(model.answers[0].answer))
    assert exact(wire) == exact(to_wire(model))
    hash(model)


def test_many_problems() -> None:
    """The first hundred problems are described, the rest only counted, to limit the cost of hostile lists."""
    wire = {"_id": "m", "attendees": [0] * 100_000, "eventId": 7}
    model = from_wire(wire, Meeting)
    assert (101, "attendees[98]: expected an object, got int") == (len(model.problems), model.problems[99])
    assert "and 99901 more" == model.problems[100]
    assert wire == to_wire(model)


def test_each_unreadable_field_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning is logged per model and field, without the value, however many rows have it."""
    monkeypatch.setattr(_codec, "_logged", set())
    rows = [{"_id": f"m{i}", "eventId": SECRET, "attendees": [{"primary": SECRET}] * 3} for i in range(5)]
    rows = [row | {"eventId": [SECRET]} for row in rows]
    with caplog.at_level("WARNING", "lemcal_async"):
        from_wire(rows, list[Meeting])
        from_wire(rows, list[Meeting])
    advice = "the value is kept in .extra (logged once per field)"
    assert [
        f"cannot read Meeting.eventId: expected a string, got list; {advice}",
        f"cannot read Attendee.primary: expected a boolean, got str; {advice}",
    ] == caplog.messages


@pytest.mark.parametrize(
    "wire",
    [
        {"_id": "m", "start": SECRET},
        {"_id": "m", "lead": SECRET},
        {"_id": "m", "attendees": [SECRET]},
        {"_id": "m", SECRET: 1, "end": SECRET},
        {"_id": "m", "lead": {SECRET: {}, "email": [SECRET]}},
    ],
)
def test_problems_show_no_data(wire: Any) -> None:
    """Problems name fields and types, never values."""
    problems = from_wire(wire, Meeting).problems
    assert problems
    assert SECRET not in "".join(problems)


def test_error_shows_no_data() -> None:
    """Neither the message nor the pickled error contains values from the data."""
    with pytest.raises(ResponseDecodeError) as caught:
        from_wire({"_id": [SECRET]}, Meeting)
    assert SECRET not in repr(caught.value)
    assert SECRET.encode() not in pickle.dumps(caught.value)


# --- Lists ------------------------------------------------------------------------------------


def test_lists_of_models() -> None:
    """A list of models is read and written; nested lists and tuples are written as lists."""
    rows = [{"_id": "a"}, {"_id": "b"}]
    models = [Meeting(id="a"), Meeting(id="b")]
    assert models == from_wire(rows, list[Meeting])
    assert rows == to_wire(models)
    assert [rows, [[]], {"_id": "u"}] == to_wire((models, ([],), User(id="u")))
    assert not from_wire([], list[Meeting])


def test_error_holds_the_good_rows() -> None:
    """The error for a list holds the models of the good rows, and says which rows are bad and why."""
    rows = [{"_id": "a"}, {"_id": ""}, None, {"_id": 7, "lead": {"email": 7}}, {"_id": "c"}]
    reasons = [
        "_id: expected a non-empty string, got str",
        "expected an object, got null",
        "_id: expected a string, got int",
    ]
    with pytest.raises(ResponseDecodeError) as caught:
        from_wire(rows, list[Meeting])
    assert f"3 of 5 rows cannot be read; row 1: {reasons[0]}" == str(caught.value)
    assert [Meeting(id="a"), Meeting(id="c")] == caught.value.rows
    assert [BadRow(i, rows[i], reason) for i, reason in enumerate(reasons, 1)] == caught.value.bad_rows
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("data", "got"), [(None, "null"), ({}, "dict"), ("[]", "str"), ((), "tuple"), (7, "int")]
)
def test_only_lists_are_read_as_lists(data: Any, got: Any) -> None:
    """Any other JSON is refused if a list is expected."""
    assert f"expected a list, got {got}" == refusal(data, list[User])


@given(st.lists(st.sampled_from(["good", None, "", 7, [], {"_id": 7}, {"start": "soon"}]), max_size=40))
def test_bad_rows_do_not_affect_good_rows(kinds: Any) -> None:
    """Every row becomes a model, in order, or a bad row; all bad rows are counted, the first ones kept."""
    rows = [{"_id": f"m{i}"} if kind == "good" else kind for i, kind in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_codec, "MAX_BAD_ROWS", 4)
        reader = RowReader(Meeting)
        for at in range(0, len(rows), 3):
            reader.add(rows[at : at + 3])
    is_good = [kind == "good" for kind in kinds]
    bad = [(i, rows[i]) for i, good in enumerate(is_good) if not good]
    assert [Meeting(id=f"m{i}") for i, good in enumerate(is_good) if good] == reader.good
    assert bad[:4] == [(row.index, row.row) for row in reader.bad]
    assert (len(bad), len(rows)) == (reader.bad_count, reader.count)


class _Unreadable(dict[str, Any]):
    """Data that raises an unexpected error, which says whether the collector is running."""

    def items(self) -> Any:
        raise RuntimeError(f"collector running: {gc.isenabled()}")


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collector_is_restored(was_enabled: Any) -> None:
    """Decoding pauses the collector, and restores it even after an exception."""
    before = gc.isenabled()
    try:
        (gc.enable if was_enabled else gc.disable)()
        RowReader(Meeting).add([{"_id": "m"}, None])
        assert was_enabled is gc.isenabled()
        with pytest.raises(RuntimeError, match="collector running: False"):
            RowReader(Meeting).add([_Unreadable(_id="m")])
        assert was_enabled is gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()


# --- Misuse, and types ------------------------------------------------------------------------


@pytest.mark.parametrize("obj", [None, 7, "text", b"bytes", {}, {"_id": "m"}, Meeting, object(), {1}])
def test_only_models_are_written(obj: Any) -> None:
    """Any other object is a TypeError, alone or in a list."""
    problem = f"cannot write {type(obj).__name__}"
    with pytest.raises(TypeError, match=problem):
        to_wire(obj)
    with pytest.raises(TypeError, match=problem):
        to_wire([Meeting(id="m"), [obj]])


@pytest.mark.parametrize(
    "into", [None, int, dict, list, list[int], list[list[Meeting]], BadRow, "Meeting", Model, {}, 7]
)
def test_only_models_are_read(into: Any) -> None:
    """Any other target is a TypeError, whatever the data."""
    with pytest.raises(TypeError, match="cannot read into"):
        from_wire([], into)
    with pytest.raises(TypeError, match="cannot read into"):
        RowReader(into)


@pytest.mark.parametrize("swapped", [(Meeting, {}), (Meeting, {"_id": "m"}), (list[Meeting], [{"_id": "m"}])])
def test_swapped_arguments(swapped: Any) -> None:
    """The error says which argument comes first."""
    with pytest.raises(TypeError, match=r"data first and the model second: from_wire\(data, Meeting\)"):
        from_wire(*swapped)


def test_result_types_are_inferred() -> None:
    """Type checkers infer the type of the result."""
    assert_type(from_wire({"_id": "m"}, Meeting), Meeting)
    assert_type(from_wire([], list[Meeting]), list[Meeting])
    assert_type(RowReader(Hook).good, list[Hook])
    assert_type(to_wire(Meeting(id="m")), dict[str, Any])
    assert_type(to_wire([Meeting(id="m")]), list[dict[str, Any]])
    assert_type(to_wire([[Meeting(id="m")]]), list[Any])


# --- Round trips -------------------------------------------------------------------------------
# Strategies draw pairs: a payload, and the expected result of reading and writing it.

ABSENT = object()
FIRST = datetime(1, 1, 2, tzinfo=UTC).replace(tzinfo=None)  # one day from the limits, for any offset
LAST = datetime(9999, 12, 30, tzinfo=UTC).replace(tzinfo=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


def same(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw values that are written back unchanged."""
    return values.map(lambda value: (value, value))


def written(time: datetime) -> str:
    """Format an instant as the service does, with microseconds only if milliseconds would lose precision."""
    text = f"{time:%m-%dT%H:%M:%S}.{time.microsecond:06}"
    return f"{time.year:04}-{text.removesuffix('000')}Z"


@st.composite
def sent_times(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a time in any accepted format."""
    local = draw(st.datetimes(FIRST, LAST))
    minutes = draw(st.integers(-1439, 1439))
    sign, (hour, minute) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    offsets = [f"{sign}{hour:02}:{minute:02}", f"{sign}{hour:02}{minute:02}"]
    offsets += [f"{sign}{hour:02}"] if minute == 0 else []
    offsets += ["Z"] if minutes == 0 else []
    digits = draw(st.text("0123456789", max_size=12))
    text = f"{local.year:04}-{local:%m-%dT%H:%M:%S}{'.' if digits else ''}{digits}"
    instant = local.replace(microsecond=int(digits[:6].ljust(6, "0"))) - timedelta(minutes=minutes)
    return text + draw(st.sampled_from(offsets)), written(instant)


finite = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
texts = same(st.text())
flags = same(st.booleans())
numbers: st.SearchStrategy[Any] = same(finite) | finite.map(lambda number: (json.dumps(number), number))
times = sent_times()


def lists_of(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw a list of these items."""
    return st.lists(items, max_size=3).map(
        lambda pairs: ([sent for sent, _ in pairs], [back for _, back in pairs])
    )


@st.composite
def objects(
    draw: st.DrawFn,
    fields: dict[str, st.SearchStrategy[Any]],
    spellings: tuple[tuple[str, str], ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw an object: known fields that may be absent or null, and unknown ones, in any order."""
    pairs = {
        name: draw(st.just((ABSENT, ABSENT)) | st.just((None, ABSENT)) | of) for name, of in fields.items()
    }
    if "_id" in fields:
        pairs["_id"] = draw(same(st.text(min_size=1)))
    for first, second in spellings:
        sent = [pairs[first][0], pairs[second][0]]
        if ABSENT not in sent and sent != [None, None]:
            unused = first if sent[0] is None else second
            pairs[unused] = (pairs[unused][0], pairs[unused][0])
    unknown = draw(
        st.dictionaries(st.text().filter(lambda name: name not in fields), json_values, max_size=2)
    )
    pairs |= {name: (value, value) for name, value in unknown.items()}
    names = draw(st.permutations(sorted(pairs)))
    return (
        {name: pairs[name][0] for name in names if pairs[name][0] is not ABSENT},
        {name: pairs[name][1] for name in names if pairs[name][1] is not ABSENT},
    )


lead = objects({"email": texts, "firstName": texts, "lastName": texts})
anything = same(json_values.filter(lambda value: value is not None))
minutes = st.integers(-10_000, 10**6) | st.integers(0, 10**6).map(lambda half: half / 2)
durations: st.SearchStrategy[Any] = minutes.map(lambda number: (number, meaning(number)))
durations |= minutes.map(lambda number: (json.dumps(number), meaning(number)))
answer = objects({"question": texts, "answer": anything})
attendee = objects(
    {"email": texts, "name": texts, "type": texts, "response": texts, "owner": flags, "primary": flags}
)
location = objects({"id": texts, "provider": texts})
question = objects({"id": texts, "answerType": texts, "enabled": flags, "question": texts})
round_robin_user = objects({"id": texts, "enabled": flags, "weight": numbers})
round_robin = objects(
    {
        "enabled": flags,
        "users": lists_of(round_robin_user),
        "lastCycle": same(st.lists(json_values, max_size=2)),
    }
)
PAYLOADS: dict[Any, st.SearchStrategy[Any]] = {
    Meeting: objects(
        {
            "_id": texts,
            "userId": texts,
            "meetingTypeId": texts,
            "meetingTypeName": texts,
            "providedInfos": anything,
            "eventId": texts,
            "start": times,
            "end": times,
            "lead": lead,
            "attendees": lists_of(attendee),
            "questions": lists_of(answer),
            "surveyAnswers": lists_of(answer),
            "attendeeTimezone": texts,
            "timezone": texts,
            "canceledAt": times,
            "createdAt": times,
        },
        (("attendeeTimezone", "timezone"), ("questions", "surveyAnswers")),
    ),
    MeetingType: objects(
        {
            "_id": texts,
            "userId": texts,
            "name": texts,
            "description": texts,
            "meetingLink": texts,
            "type": texts,
            "color": texts,
            "duration": durations,
            "status": texts,
            "privacy": texts,
            "meetingLocations": lists_of(location),
            "questions": lists_of(question),
            "roundRobin": round_robin,
        }
    ),
    Hook: objects(
        {
            "_id": texts,
            "targetUrl": texts,
            "meetingTypeId": texts,
            "anyMeetingType": flags,
            "createdAt": times,
        }
    ),
    User: objects({"_id": texts, "email": texts, "publicIdentifier": texts, "createdAt": times}),
    Lead: lead,
    Answer: answer,
    Attendee: attendee,
    MeetingLocation: location,
    Question: question,
    RoundRobin: round_robin,
    RoundRobinUser: round_robin_user,
}


def test_table_of_payloads_is_complete() -> None:
    """The table above covers every model."""
    assert set(get_args(Model)) == set(PAYLOADS)


@pytest.mark.parametrize("into", PAYLOADS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_payload_round_trip(into: Any, data: Any) -> None:
    """Reading and writing keeps the same instants and values, and unknown fields unchanged."""
    sent, returned = data.draw(PAYLOADS[into])
    before = exact(sent)
    model = from_wire(sent, into)
    assert exact(returned) == exact(to_wire(model))
    assert before == exact(sent)
    again = from_wire(to_wire(model), into)
    assert (model, hash(model)) == (again, hash(again))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), attrs.evolve(model)):
        assert (model, hash(model)) == (copied, hash(copied))
        assert exact(returned) == exact(to_wire(copied))


zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
instants = st.datetimes(FIRST, LAST, timezones=zones | st.just(UTC))
extras = st.dictionaries(st.text().map("new {}".format), json_values, max_size=2)


def created(model: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw models created in Python, with any optional fields."""
    required = {"id": st.text(min_size=1)} if model in (Hook, Meeting, MeetingType, User) else {}
    drawn = st.fixed_dictionaries(required, optional={**fields, "extra": extras})
    return drawn.map(lambda values: model(**values))


def tuples_of(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw a short tuple."""
    return st.lists(items, max_size=2).map(tuple)


created_meetings = created(
    Meeting,
    user_id=st.text(),
    provided_infos=json_values,
    start=instants,
    end=instants,
    lead=created(Lead, email=st.text(), first_name=st.text(), last_name=st.text()),
    attendees=tuples_of(created(Attendee, email=st.text(), is_owner=st.booleans(), is_primary=st.booleans())),
    answers=tuples_of(created(Answer, question=st.text(), answer=json_values)),
    timezone=st.text(),
    canceled_at=instants,
    created_at=instants,
)
created_types = created(
    MeetingType,
    name=st.text(),
    duration=st.integers(-(10**15), 10**15).map(lambda number: timedelta(microseconds=number)),
    meeting_locations=tuples_of(created(MeetingLocation, id=st.text(), provider=st.text())),
    questions=tuples_of(created(Question, id=st.text(), enabled=st.booleans())),
    round_robin=created(
        RoundRobin,
        enabled=st.booleans(),
        users=tuples_of(created(RoundRobinUser, id=st.text(), weight=finite)),
        last_cycle=tuples_of(json_values),
    ),
)
created_hooks = created(Hook, target_url=st.text(), any_meeting_type=st.booleans(), created_at=instants)


@settings(deadline=None)
@given(created_meetings | created_types | created_hooks | created(User, email=st.text(), created_at=instants))
def test_model_round_trip(model: Any) -> None:
    """A model written as JSON text and read again is equal, to the microsecond."""
    text = json.dumps(to_wire(model))
    again = from_wire(json.loads(text), type(model))
    assert (model, hash(model)) == (again, hash(again))


@settings(deadline=None)
@given(st.sampled_from(sorted(PAYLOADS, key=str)), st.data())
def test_any_json_keeps_its_meaning_or_is_refused(into: Any, data: Any) -> None:
    """Only JSON that is not an object or has no usable id is refused; all other JSON keeps its meaning."""
    sent, _ = data.draw(PAYLOADS[into])
    wire = data.draw(json_values | st.fixed_dictionaries({}, optional=dict.fromkeys(sent, json_values)))
    try:
        model = from_wire(wire, into)
    except ResponseDecodeError:
        assert not isinstance(wire, dict) or not isinstance(wire.get("_id"), str) or not wire["_id"]
        return
    assert into is type(model)
    assert exact(meaning(wire)) == exact(meaning(to_wire(model)))
    again = from_wire(to_wire(model), into)
    assert (model, model.problems) == (again, again.problems)
