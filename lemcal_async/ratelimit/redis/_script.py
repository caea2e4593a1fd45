"""What goes to ``script.lua`` and comes back: JSON. Pure.

Times are seconds here and whole microseconds there. They are durations, so no two machines' clocks are
compared; only ``now`` is a moment, on the clock of Redis, which the script alone reads again.
"""

import json
from collections.abc import Iterable
from typing import Any

import attrs

LONGEST = 1e9  # seconds, 30 years; more would overflow in Redis


class ScriptRequest(dict[str, Any]):
    """What one process holds, knows and wants of one budget. ``Budget.request`` says what is in it."""

    def encoded(self) -> str:
        """Return the script's argument."""
        slots = [[granted, _micro(left)] for granted, left in self["slots"]]
        return json.dumps({name: _micro(value) for name, value in self.items()} | {"slots": slots})


def _micro(value: Any) -> Any:
    if isinstance(value, ScriptRequest):
        return {name: _micro(item) for name, item in value.items()}
    return round(min(value, LONGEST) * 1e6) if isinstance(value, float) else value


def _seconds(microseconds: float) -> float:
    return microseconds / 1e6


def _all_seconds(values: Iterable[float]) -> list[float]:
    return [value / 1e6 for value in values]


@attrs.frozen(kw_only=True)
class ScriptReply:
    """What the script said.

    ``granted`` slots are this process's; it is to ask again in ``wait``. Nobody sends for ``paused``, and
    the server refuses the key for ``refused``. ``frees`` has when each slot in use comes free at the
    earliest, ``others`` how many requests each other process wants to send, ``processes`` how many there
    are. The server can know of ``expected`` requests; ``foreign`` more were somebody else's. The script had
    run ``count`` times.
    """

    count: int = 0
    now: int = attrs.field(default=0, converter=int)
    granted: int = 0
    wait: float = attrs.field(default=0, converter=_seconds)
    paused: float = attrs.field(default=0, converter=_seconds)
    refused: float = attrs.field(default=0, converter=_seconds)
    limit: int = 0
    frees: list[float] = attrs.field(factory=list[float], converter=_all_seconds)
    others: Iterable[int] = ()  # Lua's empty list is {}
    processes: int = 0
    expected: int = 0
    foreign: int = 0
