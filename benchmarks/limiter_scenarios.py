"""The scenarios, the outcomes of runs and the bounds on them. Values only.

A scenario is traffic with one key against a server that accepts 20 requests per 2 s. The figures are the
bounds that our limiter must meet.
"""

import math
from typing import Literal

import attrs

LIMIT = 20
PERIOD = 2.0

Window = Literal["fixed", "sliding"]
World = Literal["sockets", "virtual"]
Backend = Literal["asyncio", "trio"]


@attrs.frozen
class Figure:
    """The bounds for one run: time as a multiple of the ideal, refused requests, the other client's share."""

    ratio: float = math.inf
    refused: int = 0
    others: float = 0.0

    def __str__(self) -> str:
        bounds = [f"<= {self.ratio:.3f}"] if self.ratio < math.inf else []
        bounds += [f"{self.refused} 429s"]
        bounds += [f"others >= {self.others:.0%}"] if self.others else []
        return ", ".join(bounds)


@attrs.frozen
class Scenario:
    """A burst of ``calls`` calls. Times are in seconds.

    ``latency`` is the minimum and maximum round trip; half of it passes before the request is counted. The
    fraction ``late`` of the requests is delayed by ``LATE`` before counting, the fraction ``slow`` by
    ``SLOW`` after counting. ``connect`` is the time to open a connection. Another client with the same key
    sends ``others`` requests per second. The ideal is based on ``rate`` calls per period. Our limiter gets
    at least ``runs`` runs, because in some scenarios the results of fewer vary too much.
    """

    name: str
    title: str
    figure: Figure
    calls: int = 100
    window: Window = "fixed"
    latency: tuple[float, float] = (0.0, 0.0)
    late: float = 0.0
    slow: float = 0.0
    connect: float = 0.0
    others: float = 0.0
    rate: int = LIMIT
    runs: int = 1

    @property
    def ideal(self) -> float:
        """Seconds from the first request to the earliest possible last request."""
        return (math.ceil(self.calls / self.rate) - 1) * PERIOD


LATE = (0.52, 0.54)  # seconds, from and to
SLOW = 2.5  # seconds
NEAR = (0.0, 0.0)  # loopback itself takes about 1 ms
FAR = (0.04, 0.2)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("fixed-near", "fixed window, 1 ms", Figure(1.012)),
        Scenario("fixed-far", "fixed window, 40-200 ms", Figure(1.032), calls=200, latency=FAR),
        Scenario("sliding-near", "sliding window, 1 ms", Figure(1.03), window="sliding"),
        Scenario(
            "sliding-far",
            "sliding window, 40-200 ms",
            Figure(1.06),
            calls=200,
            window="sliding",
            latency=FAR,
        ),
        Scenario(
            "late",
            "sliding window, 40-200 ms, 5 % of requests counted 520-540 ms late",
            Figure(1.12),
            calls=200,
            window="sliding",
            latency=FAR,
            late=0.05,
            # 60 seeds in virtual time range from 1.076 to 1.158, with a median of 1.104. The median of 9 is
            # off by 0.01 on average.
            runs=9,
        ),
        # Based on 18 per 2 s, with the last response 2.5 s late.
        Scenario(
            "slow",
            "fixed window, 40-200 ms, 30 % of responses 2.5 s after counting",
            Figure(1.25),
            calls=200,
            latency=FAR,
            slow=0.3,
        ),
        Scenario("connect", "fixed window, 1 ms, connecting takes 0.8 s", Figure(), connect=0.8),
        Scenario(
            "shared",
            "fixed window, 1 ms, another client sends 5 requests/s; ideal is 10 per window",
            Figure(1.25, refused=3, others=0.5),
            others=5.0,
            rate=10,
        ),
    )
}
PICTURE = Scenario("picture", "fixed window, 40-200 ms", Figure(), latency=FAR)


@attrs.frozen
class Job:
    """One run of one limiter; the same ``seed`` gives the same latencies."""

    scenario: Scenario
    limiter: str
    backend: Backend
    world: World
    seed: int


@attrs.frozen
class Arrival:
    """A request as counted by the server, ``at`` seconds after the start; ``call`` is None if foreign."""

    at: float
    call: int | None
    accepted: bool


@attrs.frozen
class Outcome:
    """The result of one run; ``cpu`` is CPU seconds of the client's process, including HTTP."""

    job: Job
    seconds: float
    cpu: float
    failed: int  # calls that raised an error
    arrivals: tuple[Arrival, ...]

    @property
    def ratio(self) -> float:
        """Time as a multiple of the ideal."""
        return self.seconds / self.job.scenario.ideal

    @property
    def refused(self) -> int:
        """The number of our requests that received a 429."""
        return sum(arrival.call is not None and not arrival.accepted for arrival in self.arrivals)

    @property
    def overtaken(self) -> int:
        """The largest number of places by which a call was accepted after its turn."""
        order = [a.call for a in self.arrivals if a.accepted and a.call is not None and a.call >= 0]
        return max((place - call for place, call in enumerate(order)), default=0)

    @property
    def others(self) -> float | None:
        """The fraction of the other client's requests accepted during our run."""
        theirs = [a.accepted for a in self.arrivals if a.call is None and 0 <= a.at <= self.seconds]
        return sum(theirs) / len(theirs) if theirs else None
