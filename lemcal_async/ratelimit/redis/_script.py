"""What a process asks Redis about one budget, and what it hears: the values of ``script.lua``. Pure.

Times are seconds here and whole microseconds there. They are durations, so no two machines' clocks are
compared. Only ``now`` and ``granted`` are moments, on the clock of Redis, which the script alone reads.
"""

import json
from collections.abc import Iterable
from typing import Any

import attrs

LONGEST = 1e9  # seconds, 30 years; more would overflow in Redis


def _seconds(microseconds: float) -> float:
    return microseconds / 1e6


def _all_seconds(values: Iterable[float]) -> list[float]:
    return [value / 1e6 for value in values]  # Lua's empty list is {}


def _as_list(values: Iterable[int]) -> list[int]:
    return list(values)


@attrs.frozen(kw_only=True)
class Told:
    """An answer said, ``age`` seconds ago, that the server had counted ``count`` requests.

    They are forgotten after ``window`` more seconds. The answer's own request was ``granted`` at that moment.
    """

    count: int
    age: float
    window: float
    granted: int


@attrs.frozen(kw_only=True)
class ScriptRequest:
    """What one process holds, knows and wants of one budget.

    ``slots`` has for each slot when it was granted, and in how long it comes free (False while it is open).
    ``waiting`` requests want slots, ``refused`` of them after a 429, from which ``pause`` and ``refuse``
    come. ``trip`` is the shortest round trip to the server, 0 while that is not known.

    ``known`` says that the budget must exist, ``count`` how often the script had run when this process last
    heard of it, and ``back`` that it has gone on alone since.
    """

    limit: int
    turnover: float  # from when a request was counted until its slot is used again
    lifetime: float  # of an open slot, until which the process restates it
    hold: float  # how long nobody sends after an outage, while processes restate what they hold
    slots: list[tuple[int, float | bool]] = attrs.field(factory=list[tuple[int, float | bool]])
    known: bool = False
    waiting: int = 0
    refused: int = 0
    pause: float = 0.0
    refuse: float = 0.0
    header_limit: int = 0
    told: Told | None = None
    trip: float = 0.0
    process: str = ""
    sequence: int = 0
    count: int = 0
    back: bool = False
    together: float = 0.01  # slots that come free so soon after the first are fetched along with it
    grace: float = 0.25  # a process that comes later than that for its slots leaves them to others

    def encoded(self) -> str:
        """Return the script's argument."""
        return json.dumps(_encoded(attrs.asdict(self)))


@attrs.frozen(kw_only=True)
class ScriptReply:
    """What the script said.

    ``granted`` slots are this process's; it is to ask again in ``wait``. Nobody sends for ``paused``, and
    the server refuses the key for ``refused``. ``frees`` has when each slot in use comes free at the
    earliest, ``others`` how many requests each other process wants to send, ``processes`` how many there
    are. The server can know of ``expected`` requests; ``foreign`` more were somebody else's. No round trip
    of any process was shorter than ``trip``.
    """

    count: int = 0
    now: int = attrs.field(default=0, converter=int)
    granted: int = 0
    wait: float = attrs.field(default=0, converter=_seconds)
    paused: float = attrs.field(default=0, converter=_seconds)
    refused: float = attrs.field(default=0, converter=_seconds)
    limit: int = 0
    frees: list[float] = attrs.field(default=(), converter=_all_seconds)
    others: list[int] = attrs.field(default=(), converter=_as_list)
    processes: int = 0
    expected: int = 0
    foreign: int = 0
    trip: float = attrs.field(default=0, converter=_seconds)


def _encoded(value: Any) -> Any:
    if isinstance(value, float):
        return round(min(value, LONGEST) * 1e6)
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):  # Lua has no null
        return {name: _encoded(item) for name, item in value.items() if item is not None}
    return value
