"""The runs of one limiter in one scenario as a table row, and whether they meet their bounds.

Times are the median of the runs, because machines are noisy; refusals are those of the worst run.
"""

import statistics
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import attrs

from benchmarks.limiter_peers import OURS
from benchmarks.limiter_scenarios import Job, Outcome

HEADER = (
    f"{'scenario':<14} {'time':<8} {'limiter':<29} {'time/ideal':>10} {'429s':>5} {'overtaken':>9} "
    f"{'CPU/call':>9} {'others':>7}  figure"
)


@attrs.frozen
class Line:
    """One limiter in one scenario.

    ``overtaken`` is the number of places lost by the worst-off call, ``cpu`` the CPU seconds per call, and
    ``others`` the fraction of the other client's requests that were accepted.
    """

    job: Job
    runs: int
    ratio: float
    worst_ratio: float
    refused: int
    failed: int
    overtaken: int
    cpu: float
    others: float | None

    @property
    def ours(self) -> bool:
        """Whether this is our limiter, which the bounds apply to."""
        return self.job.limiter == OURS

    @property
    def missed(self) -> bool:
        """Whether this is our limiter and it misses a bound."""
        figure = self.job.scenario.figure
        kept = (
            self.ratio <= figure.ratio
            and self.refused <= figure.refused
            and (self.others or 0.0) >= figure.others
            and not self.failed
        )
        return self.ours and not kept

    def __str__(self) -> str:
        job = self.job
        limiter = f"{job.limiter} ({job.backend})" if self.ours else job.limiter
        others = "" if self.others is None else f"{self.others:.0%}"
        figure = str(job.scenario.figure) if self.ours else ""
        failed = f"  {self.failed} calls FAILED" if self.failed else ""
        return (
            f"{job.scenario.name:<14} {job.world:<8} {limiter:<29} {self.ratio:>10.3f} {self.refused:>5} "
            f"{self.overtaken:>9} {self.cpu * 1e3:>6.2f} ms {others:>7}  {figure}"
            f"{'  MISSED' if self.missed else ''}{failed}"
        ).rstrip()

    def as_json(self) -> dict[str, Any]:
        """Return the line as JSON-compatible data."""
        data: dict[str, Any] = attrs.asdict(self, recurse=False)
        job = self.job
        del data["job"], data["cpu"]
        return {
            "scenario": job.scenario.name,
            "world": job.world,
            "limiter": job.limiter,
            "backend": job.backend,
            **data,
            "cpu_seconds_per_call": self.cpu,
            "missed": self.missed,
        }


def lines(outcomes: Iterable[Outcome]) -> list[Line]:
    """Return one line for each group of runs that differ only in their seed."""

    def same(outcome: Outcome) -> tuple[str, ...]:
        job = outcome.job
        return job.scenario.name, job.world, job.limiter, job.backend

    return [_line(list(runs)) for _, runs in groupby(outcomes, same)]


def _line(runs: list[Outcome]) -> Line:
    shares = [run.others for run in runs if run.others is not None]
    return Line(
        job=runs[0].job,
        runs=len(runs),
        ratio=statistics.median(run.ratio for run in runs),
        worst_ratio=max(run.ratio for run in runs),
        refused=max(run.refused for run in runs),
        failed=sum(run.failed for run in runs),
        overtaken=max(run.overtaken for run in runs),
        cpu=statistics.median(run.cpu / run.job.scenario.calls for run in runs),
        others=min(shares) if shares else None,
    )
