"""Made-up accounts, meeting types and meetings in the wire format, determined by a seed.

The data has the variety of real lists: hosts listed before guests, public bookings and bookings with a lead,
canceled meetings, both field names for time zones and for answers, a disabled type and a round-robin type.
"""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import attrs

from lemcal_async._codec import write_time

# The platform's alphabet for ids, without characters that look alike.
_ID_CHARACTERS: Final = "23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz"

_FIRST_MONDAY: Final = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
_FIRST_NAMES: Final = (
    "Alma",
    "Bo",
    "Cleo",
    "Dara",
    "Esme",
    "Finn",
    "Gale",
    "Hana",
    "Ines",
    "Juno",
    "Kai",
    "Léa",
)
_LAST_NAMES: Final = ("Sample", "Example", "Placeholder", "Demo", "Mockford", "Trial", "Fixture", "Proof")
_DOMAINS: Final = ("example.com", "example.org", "example.net")
_ZONES: Final = (
    "Europe/Paris", "America/New_York", "Asia/Kolkata", "Australia/Sydney", "America/Sao_Paulo", "UTC",
)  # fmt: skip
_QUESTIONS: Final = ("What would you like to talk about?", "How large is your team?")
_ANSWERS: Final = (("Pricing", "5"), ("A first look", "12"), ("Moving from a spreadsheet", "80"))


@attrs.frozen
class _TypeSpec:
    name: str
    minutes: int
    color: str
    provider: str
    enabled: bool = True
    public: bool = True
    round_robin: bool = False


_TYPES: Final = (
    _TypeSpec("Discovery call", 30, "#EC6181", "googleMeet"),
    _TypeSpec("Product demo", 45, "#316BFF", "zoom"),
    _TypeSpec("Onboarding", 60, "#23A094", "googleMeet", public=False, round_robin=True),
    _TypeSpec("Quarterly review", 25, "#F2BB05", "phone", enabled=False, public=False),
)


@attrs.frozen
class SandboxAccount:
    """An account of the sandbox.

    Attributes:
        user_id: The account's id (``usr_…``).
        api_key: The account's API key. It works only in the sandbox and is omitted from the repr.
        email: The account's e-mail address.
        public_identifier: The account's name in the URLs of its booking pages.
    """

    user_id: str
    api_key: str = attrs.field(repr=False)
    email: str
    public_identifier: str


@attrs.frozen
class DemoAccount:
    """An account and its initial data."""

    account: SandboxAccount
    user: dict[str, Any]
    meeting_types: list[dict[str, Any]]
    meetings: list[dict[str, Any]]


@attrs.frozen
class Guest:
    """The guest of a booking."""

    name: str
    email: str


def new_id(rng: random.Random, prefix: str) -> str:
    """Return an id in the service's format: a prefix and 17 characters (documented by example)."""
    return f"{prefix}_{_random_characters(rng, 17)}"


def wire_time(moment: datetime) -> str:
    """Return a time in the service's format: ISO 8601 with milliseconds and ``Z`` (documented)."""
    return write_time(moment.replace(microsecond=moment.microsecond // 1000 * 1000))


def make_account(seed: int, index: int, meetings: int) -> DemoAccount:
    """Return account number ``index`` with this many meetings."""
    rng = random.Random(f"lemcal sandbox {seed} {index}")  # noqa: S311  # made-up data, not a secret
    name = f"host{index + 1}"
    account = SandboxAccount(
        user_id=new_id(rng, "usr"),
        api_key=_random_characters(rng, 32),
        email=f"{name}@example.com",
        public_identifier=name,
    )
    user = {
        "_id": account.user_id,
        "email": account.email,
        "publicIdentifier": account.public_identifier,
        "createdAt": wire_time(_FIRST_MONDAY - timedelta(days=rng.randrange(30, 400))),
    }
    types = [_meeting_type(rng, account.user_id, spec) for spec in _TYPES]
    booked = [_demo_meeting(rng, account, types, number) for number in range(meetings)]
    return DemoAccount(account, user, types, booked)


def make_meeting(
    rng: random.Random,
    account: SandboxAccount,
    meeting_type: dict[str, Any],
    *,
    start: datetime,
    created: datetime,
    public: bool,
    guest: Guest | None = None,
) -> dict[str, Any]:
    """Return a meeting of this type, with a made-up guest by default.

    A public booking has no ``lead``; its guest is the attendee with ``primary: true`` (observed).
    """
    first, last = rng.choice(_FIRST_NAMES), rng.choice(_LAST_NAMES)
    email = f"{first}.{last}@{rng.choice(_DOMAINS)}".lower().replace("é", "e")
    if guest is not None:
        email = guest.email
        first, _, last = guest.name.partition(" ")
    name = f"{first} {last}".strip()
    attendee: dict[str, Any] = {
        "email": email,
        "name": name,
        "type": "required",
        "response": "accepted",
    }
    host = {
        "email": account.email,
        "name": "The Host",
        "type": "required",
        "response": "accepted",
        "owner": True,
    }
    meeting: dict[str, Any] = {
        "_id": new_id(rng, "mee"),
        "userId": account.user_id,
        "meetingTypeId": meeting_type["_id"],
        "meetingTypeName": meeting_type["name"],
        "providedInfos": {"name": name, "email": email},
        "eventId": _random_characters(rng, 26).lower(),
        "start": wire_time(start),
        "end": wire_time(start + timedelta(minutes=meeting_type["duration"])),
        "attendees": [host, attendee | {"primary": True} if public else attendee],
        "createdAt": wire_time(created),
    }
    if not public:
        meeting["leadId"] = new_id(rng, "lea")
        meeting["lead"] = {"email": email, "firstName": first, "lastName": last}
    meeting[rng.choice(["attendeeTimezone", "timezone"])] = rng.choice(_ZONES)
    return meeting


def _demo_meeting(
    rng: random.Random, account: SandboxAccount, types: Sequence[dict[str, Any]], number: int
) -> dict[str, Any]:
    """Return meeting ``number`` of an account. Each special case recurs every few meetings."""
    day, slot = divmod(number, 5)
    start = _FIRST_MONDAY + timedelta(days=day // 5 * 7 + day % 5, hours=2 * slot)
    created = start - timedelta(days=rng.randrange(3, 15), milliseconds=rng.randrange(86_400_000))
    meeting_type = types[number % len(types)]
    meeting = make_meeting(rng, account, meeting_type, start=start, created=created, public=number % 3 != 1)
    if not number % 3:
        spelling = rng.choice(["questions", "surveyAnswers"])
        pairs = zip(_QUESTIONS, rng.choice(_ANSWERS), strict=True)
        meeting[spelling] = [{"question": question, "answer": answer} for question, answer in pairs]
    if not (number + 2) % 4:
        companion = f"guest{number}@{rng.choice(_DOMAINS)}"
        meeting["attendees"].append({"email": companion, "type": "optional", "response": "needsAction"})
    if not (number + 1) % 6:
        meeting["canceledAt"] = wire_time(created + timedelta(hours=rng.randrange(1, 48)))
    return meeting


def _meeting_type(rng: random.Random, user_id: str, spec: _TypeSpec) -> dict[str, Any]:
    hosts = [user_id, new_id(rng, "usr")] if spec.round_robin else []
    company = "with one of our team" if spec.round_robin else "just the two of us"
    return {
        "_id": new_id(rng, "met"),
        "userId": user_id,
        "name": spec.name,
        "description": f"{spec.minutes} minutes, {company}.",
        "meetingLink": spec.name.lower().replace(" ", "-"),
        "type": "roundRobin" if spec.round_robin else "oneOnOne",
        "color": spec.color,
        "duration": spec.minutes,
        "status": "enabled" if spec.enabled else "disabled",
        "privacy": "public" if spec.public else "private",
        "meetingLocations": [{"id": _random_characters(rng, 17), "provider": spec.provider}],
        "questions": [
            {"id": _random_characters(rng, 17), "answerType": "text", "enabled": True, "question": question}
            for question in _QUESTIONS
        ],
        "roundRobin": {
            "enabled": spec.round_robin,
            "users": [{"id": host, "enabled": True, "weight": 1} for host in hosts],
            "lastCycle": hosts[:1],
        },
    }


def _random_characters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(_ID_CHARACTERS, k=count))
