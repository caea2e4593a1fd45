"""What a process asks Redis about one budget, and what it hears: the script, its keys, its values. Pure.

The script itself is ``script.lua``, beside this file. Times are seconds here and whole
microseconds there; both are durations, so no two machines' clocks are compared.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs

from lemcal_async.ratelimit._base import Key
from lemcal_async.ratelimit._cooldown import MARGIN
from lemcal_async.ratelimit._slots import COUNTED_WITHIN

SCRIPT = Path(__file__).with_name("script.lua").read_text(encoding="utf-8")
SHA1 = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # its name in Redis

TOGETHER = 0.01  # seconds; slots that come free so soon after the first are fetched along with it
GRACE = 0.25  # seconds; a process that comes later than that for its slots leaves them to others
LONGEST = 1e9  # seconds, 30 years: what a server may say is cut to it, before it overflows in Redis


def keys_of(prefix: str, key: Key) -> list[str]:
    """Return the names of one budget's four keys, under one hash tag, with nothing secret in them."""
    where = hashlib.blake2b(key.base_url.encode(), digest_size=4).hexdigest()
    budget = f"{prefix}{{{key.digest}-{where}}}"
    return [f"{budget}:{part}" for part in ("state", "leases", "slots", "waiting")]


@attrs.frozen
class Reports:
    """What became of requests, by slot: in how many seconds each comes free.

    ``open`` slots are of requests whose end is not known yet, ``dropped`` ones were never used.
    """

    open: dict[str, float] = attrs.field(factory=dict[str, float])
    ended: dict[str, float] = attrs.field(factory=dict[str, float])
    dropped: list[str] = attrs.field(factory=list[str])


@attrs.frozen
class Used:
    """A header said that ``requests`` were made in a window that lasts for ``window`` more seconds."""

    requests: int
    window: float


@attrs.frozen(kw_only=True)
class ScriptRequest:
    """One process's question about one budget, with its reports.

    ``waiting`` requests of it want slots, ``refused`` of them after a 429; the slots it gets are
    numbered from ``first`` on. ``epoch`` is the data's identity as this process knows it, empty if it
    holds nothing that would be missed; ``back`` says that it was without Redis for more than a window,
    and ``hold`` for how long all keep to themselves then. ``pause`` and ``refuse`` come from a 429. Of
    ``trips`` there and back since the last question, ``trip`` was the shortest.
    """

    process: str
    limit: int
    period: float
    hold: float
    waiting: int
    refused: int
    first: int
    reports: Reports
    epoch: str = ""
    back: bool = False
    pause: float = 0.0
    refuse: float = 0.0
    header_limit: int = 0
    used: Used = Used(0, 0.0)
    trips: int = 0
    trip: float = 0.0

    def encoded(self) -> str:
        """Return the script's argument."""
        reports = self.reports
        return json.dumps(
            {
                "me": self.process,
                "epoch": self.epoch,
                "back": self.back,
                "hold": _micro(self.hold),
                "limit": self.limit,
                "turnover": _micro(self.period + MARGIN),
                "counted_within": _micro(COUNTED_WITHIN),
                "together": _micro(TOGETHER),
                "grace": _micro(GRACE),
                "waiting": self.waiting,
                "refused": self.refused,
                "first": self.first,
                "open": {slot: _micro(seconds) for slot, seconds in reports.open.items()},
                "ended": {slot: _micro(seconds) for slot, seconds in reports.ended.items()},
                "dropped": reports.dropped,
                "pause": _micro(self.pause),
                "refuse": _micro(self.refuse),
                "header_limit": self.header_limit,
                "used": self.used.requests,
                "window": _micro(self.used.window),
                "trips": self.trips,
                "trip": _micro(self.trip),
            }
        )


@attrs.frozen(kw_only=True)
class ScriptReply:
    """What the script said; durations are seconds from then.

    ``granted`` slots are this process's; it is to ask again in ``wait``. Until ``held`` is over, each
    process keeps to what it may do alone. ``frees`` has when each slot in use comes free at the
    earliest, ``others`` how many requests each other process wants to send, ``processes`` how many
    there are. The server can know of ``expected`` requests; ``foreign`` more were somebody else's.
    The shortest of all ``trips`` to the server and back was ``trip``.
    """

    epoch: str
    granted: int
    wait: float
    held: float
    paused: float
    refused: float
    limit: int
    frees: list[float]
    others: list[int]
    processes: int
    expected: int
    foreign: int
    trips: int
    trip: float

    @classmethod
    def decoded(cls, text: str | bytes) -> "ScriptReply":
        """Read what the script returned."""
        said: dict[str, Any] = json.loads(text)
        return cls(
            epoch=said["epoch"],
            granted=said["granted"],
            wait=said["wait"] / 1e6,
            held=said["held"] / 1e6,
            paused=said["paused"] / 1e6,
            refused=said["refused"] / 1e6,
            limit=said["limit"],
            frees=[left / 1e6 for left in said["frees"] or ()],  # Lua's empty list is {}
            others=list(said["others"] or ()),
            processes=said["processes"],
            expected=said["expected"],
            foreign=said["foreign"],
            trips=said["trips"],
            trip=said["trip"] / 1e6,
        )


def _micro(seconds: float) -> int:
    return round(min(seconds, LONGEST) * 1e6)
