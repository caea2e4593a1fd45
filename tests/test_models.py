"""The models as values: fields, equality, times, properties, and secrets in the repr."""

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import attrs
import pytest

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

MODELS: tuple[Any, ...] = get_args(Model)
START = datetime(2021, 2, 16, 8, 0, tzinfo=UTC)

FIELDS: dict[Any, str] = {
    Answer: "question answer extra",
    Attendee: "email name type response is_owner is_primary extra",
    Hook: "id target_url meeting_type_id any_meeting_type created_at extra",
    Lead: "email first_name last_name extra",
    Meeting: "id user_id meeting_type_id meeting_type_name provided_infos event_id start end lead attendees "
    "answers timezone canceled_at created_at extra",
    MeetingLocation: "id provider extra",
    MeetingType: "id user_id name description meeting_link type color duration status privacy "
    "meeting_locations questions round_robin extra",
    Question: "id answer_type enabled question extra",
    RoundRobin: "enabled users last_cycle extra",
    RoundRobinUser: "id enabled weight extra",
    User: "id email public_identifier created_at extra",
}
HOST = Attendee(email="host@example.org", is_owner=True)
COLLEAGUE = Attendee(email="colleague@example.org")
GUEST = Attendee(email="guest@example.com", is_primary=True)
LEAD = Lead(email="guest@example.com")


def bare(model: Any) -> Any:
    """Create a model with only its required fields."""
    return model(id="x") if model in (Hook, Meeting, MeetingType, User) else model()


def test_table_of_fields_is_complete() -> None:
    """The table covers every model."""
    assert set(FIELDS) == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_fields_are_in_the_documented_order(model: Any) -> None:
    """The public fields are in the documented order, with ``extra`` last."""
    expected = FIELDS[model].split()
    public = [field.name for field in attrs.fields(model) if not field.name.startswith("_")]
    assert expected == public
    assert tuple(expected) == model.__match_args__


@pytest.mark.parametrize("model", MODELS)
def test_only_the_id_is_required(model: Any) -> None:
    """An omitted field is None, an empty tuple for a list, or a new dict for extra."""
    first, second = bare(model), bare(model)
    omitted = {name: getattr(first, name) for name in FIELDS[model].split() if name != "id"}
    assert first.extra is not second.extra
    assert all(value in (None, (), {}) for value in omitted.values())


@pytest.mark.parametrize("model", MODELS)
def test_models_are_frozen_and_slotted(model: Any) -> None:
    """A model cannot be changed, and a misspelled attribute is an error."""
    value = bare(model)
    assert not hasattr(value, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.extra = {"new": 1}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.misspelled = 1


@pytest.mark.parametrize("model", MODELS)
def test_extra_affects_only_equality(model: Any) -> None:
    """Models that differ only in extra are unequal but have the same hash."""
    value = bare(model)
    changed = attrs.evolve(value, extra={"new": [1]})
    assert value != changed
    assert hash(value) == hash(changed)
    assert value == attrs.evolve(changed, extra={})


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        (Meeting(id="m"), Meeting(id="m", provided_infos={"a": [1]})),
        (RoundRobin(), RoundRobin(last_cycle=({"a": 1},))),
        (Answer(), Answer(answer=["a"])),
    ],
)
def test_free_form_json_affects_only_equality(plain: Any, changed: Any) -> None:
    """The model is hashable even if its free-form JSON is not."""
    assert plain != changed
    assert hash(plain) == hash(changed)


@pytest.mark.parametrize("change", [{"id": "n"}, {"start": START}, {"attendees": (GUEST,)}, {"lead": LEAD}])
def test_fields_affect_equality_and_hash(change: Any) -> None:
    """Meetings that differ in a field are unequal, with different hashes."""
    meeting = Meeting(id="m")
    changed = attrs.evolve(meeting, **change)
    assert meeting != changed
    assert {meeting, changed} == {meeting, changed, Meeting(id="m")}
    assert hash(meeting) != hash(changed)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, attrs.evolve, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_are_equal(model: Any, copied: Any) -> None:
    """Copying, pickling and evolving lose nothing."""
    value = attrs.evolve(bare(model), extra={"new": {"a": [1]}})
    assert value == copied(value)
    assert hash(value) == hash(copied(value))


UNMARKED_HOST = Attendee(email="host@example.org", name="Hal Host")
UNMARKED_GUEST = Attendee(email="Guest@Example.com", name="Ada Guest")
PRIMARY_HOST = attrs.evolve(HOST, is_primary=True)


@pytest.mark.parametrize(
    ("attendees", "lead", "guest"),
    [
        ((HOST, COLLEAGUE, GUEST), LEAD, GUEST),
        ((HOST, COLLEAGUE, GUEST), None, GUEST),
        ((HOST, COLLEAGUE, GUEST), Lead(email="colleague@example.org"), GUEST),  # the mark decides
        ((PRIMARY_HOST, GUEST), None, GUEST),  # of two primary attendees, not the owner
        ((GUEST, PRIMARY_HOST), None, GUEST),
        ((PRIMARY_HOST, COLLEAGUE), LEAD, LEAD),
        ((PRIMARY_HOST, COLLEAGUE), None, COLLEAGUE),
        ((UNMARKED_HOST, UNMARKED_GUEST), LEAD, UNMARKED_GUEST),  # the documented shape: no marks at all
        ((UNMARKED_GUEST, UNMARKED_HOST), LEAD, UNMARKED_GUEST),
        ((UNMARKED_HOST,), LEAD, LEAD),
        ((UNMARKED_HOST, COLLEAGUE), Lead(first_name="Ada"), Lead(first_name="Ada")),
        ((HOST, COLLEAGUE), LEAD, LEAD),
        ((HOST, COLLEAGUE, UNMARKED_GUEST), LEAD, UNMARKED_GUEST),
        ((HOST, COLLEAGUE), Lead(), COLLEAGUE),  # a lead without a name or an address is ignored
        ((HOST, COLLEAGUE), None, COLLEAGUE),
        ((UNMARKED_HOST, UNMARKED_GUEST), None, UNMARKED_HOST),  # nothing distinguishes them
        ((HOST,), LEAD, LEAD),
        ((), LEAD, LEAD),
        ((HOST,), None, None),
        ((), None, None),
    ],
)
def test_guest(attendees: Any, lead: Any, guest: Any) -> None:
    """The guest is the primary attendee, the attendee with the lead's address, the lead, or a non-owner."""
    assert guest == Meeting(id="m", attendees=attendees, lead=lead).guest


@pytest.mark.parametrize(
    ("attendees", "guest", "host"),
    [
        ((UNMARKED_HOST, UNMARKED_GUEST), UNMARKED_GUEST, UNMARKED_HOST),
        ((UNMARKED_GUEST, UNMARKED_HOST), UNMARKED_GUEST, UNMARKED_HOST),
        ((UNMARKED_HOST,), None, UNMARKED_HOST),
        ((UNMARKED_HOST, GUEST), GUEST, UNMARKED_HOST),
        ((HOST, COLLEAGUE), COLLEAGUE, HOST),
    ],
)
def test_guest_and_host_with_a_known_account_email(attendees: Any, guest: Any, host: Any) -> None:
    """Without marks and a lead, the account's address distinguishes host and guest, ignoring case."""
    meeting = Meeting(id="m", attendees=attendees, _account_email="HOST@example.org")
    assert (guest, host) == (meeting.guest, meeting.host)
    assert Meeting(id="m", attendees=attendees) == meeting
    assert "HOST@" not in repr(meeting)


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [("Ada", "Example", "Ada Example"), ("Ada", None, "Ada"), ("", "Example", "Example"), (None, None, None)],
)
def test_name_of_a_lead(first: Any, last: Any, name: Any) -> None:
    """A lead has a name, like an attendee, so that ``meeting.guest.name`` always works."""
    assert name == Lead(first_name=first, last_name=last).name


@pytest.mark.parametrize(("attendees", "host"), [((GUEST, HOST), HOST), ((GUEST,), None), ((), None)])
def test_host(attendees: Any, host: Any) -> None:
    """The host is the owner, at any position in the list."""
    assert host == Meeting(id="m", attendees=attendees).host


def test_is_canceled() -> None:
    """A meeting is canceled if it has a cancellation time, even one that cannot be read."""
    assert not Meeting(id="m").is_canceled
    assert Meeting(id="m", canceled_at=START).is_canceled
    assert Meeting(id="m", extra={"canceledAt": "yesterday"}).is_canceled
    assert not Meeting(id="m", extra={"canceledAt": ""}).is_canceled


ADA = User(id="usr_1", public_identifier="ada")
BO_URL = (
    "https://app.lemcal.com/@ada/tour?guestInfos=%7B%22name%22%3A%22Bo%20%26%20Co%3F%22%2C"
    "%22email%22%3A%22bo%2B1%40example.com%22%7D"
)


@pytest.mark.parametrize(
    ("user", "link", "guest", "url"),
    [
        (ADA, "tour", {}, "https://app.lemcal.com/@ada/tour"),
        (
            ADA,
            "tour",
            {"name": "Bo & Co?", "email": "bo+1@example.com"},
            BO_URL,
        ),
        (
            ADA,
            "tour",
            {"name": "Zoë"},
            "https://app.lemcal.com/@ada/tour?guestInfos=%7B%22name%22%3A%22Zo%C3%AB%22%7D",
        ),
        (attrs.evolve(ADA, public_identifier="a/b"), "x y", {}, "https://app.lemcal.com/@a%2Fb/x%20y"),
    ],
)
def test_booking_url(user: Any, link: Any, guest: Any, url: Any) -> None:
    """The URL leads to the booking page and contains the guest's details."""
    assert url == MeetingType(id="met_1", meeting_link=link).booking_url(user, **guest)
    if guest:
        assert guest == json.loads(parse_qs(urlsplit(url).query)["guestInfos"][0])


@pytest.mark.parametrize(
    ("user", "link", "missing"),
    [(User(id="usr_1"), "tour", "usr_1 has no public_id"), (ADA, None, "met_1 has no meeting_link")],
)
def test_no_booking_url(user: Any, link: Any, missing: Any) -> None:
    """Without the account's identifier or the type's link, there is no URL."""
    with pytest.raises(ValueError, match=missing):
        MeetingType(id="met_1", meeting_link=link).booking_url(user)


@pytest.mark.parametrize(
    ("start", "end", "duration"),
    [
        (START, START + timedelta(minutes=45), timedelta(minutes=45)),
        (START, None, None),
        (None, START, None),
        (None, None, None),
    ],
)
def test_duration(start: Any, end: Any, duration: Any) -> None:
    """The duration is None unless start and end are known."""
    assert duration == Meeting(id="m", start=start, end=end).duration


TIMES = [
    (Meeting, "start"),
    (Meeting, "end"),
    (Meeting, "canceled_at"),
    (Meeting, "created_at"),
    (Hook, "created_at"),
    (User, "created_at"),
]


@pytest.mark.parametrize(("model", "field"), TIMES)
def test_times_are_converted_to_utc(model: Any, field: Any) -> None:
    """A time in any zone becomes the same instant in UTC."""
    local = START.astimezone(timezone(timedelta(hours=5, minutes=30)))
    held = getattr(model(id="x", **{field: local}), field)
    assert local == held
    assert held.tzinfo is UTC


@pytest.mark.parametrize(("model", "field"), TIMES)
def test_naive_times_are_refused(model: Any, field: Any) -> None:
    """A naive time is refused."""
    with pytest.raises(ValueError, match="naive"):
        model(id="x", **{field: START.replace(tzinfo=None)})


def test_times_out_of_range_are_refused() -> None:
    """A time before the year 1 in UTC is refused."""
    with pytest.raises(OverflowError):
        Meeting(id="m", start=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://x.example/hook?token=s3cret", "'https://x.example/hook?...'"),
        ("https://x.example/hook?s3cret", "'https://x.example/hook?...'"),
        ("https://x.example/hook#s3cret", "'https://x.example/hook?...'"),
        ("https://x.example?token=s3cret", "'https://x.example?...'"),
        ("https://s3cret@x.example:8443/hook", "'https://x.example:8443/hook'"),
        ("https://bot:s3cret@x.example/hook?a=1", "'https://x.example/hook?...'"),
        ("https://bot:s3@cret@x.example/hook", "'https://x.example/hook'"),
        ("https://bot:s3cret?@x.example/hook", "'...'"),
        ("https://bot:s3cret/@x.example/hook", "'...'"),
        ("https://[s3cret/hook", "'...'"),
        ("bot:s3cret@x.example/hook", "'...'"),
        ("https://x.example/hook", "'https://x.example/hook'"),
        ("http://[::1]:80/hook", "'http://[::1]:80/hook'"),
        ("", "'...'"),
        (None, "None"),
    ],
)
def test_hook_repr_hides_secrets_in_its_url(url: Any, shown: Any) -> None:
    """A target URL is shown without user info, query and fragment; an unparsable URL is not shown."""
    text = repr(Hook(id="h", target_url=url))
    assert f"target_url={shown}," in text
    assert "s3cret" not in text
