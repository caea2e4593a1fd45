"""Measurements, and their output as a table, as JSON, and compared with an earlier run.

Every figure with a bound is a ratio of two figures from the same run, or so far from its bound that the
machine does not matter.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class Measurement:
    """A figure with its unit and its upper bound, or lower bound if ``at_least`` is true."""

    what: str
    value: float
    unit: str = "x"
    bound: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value is within its bound."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def alternate(rounds: int, kinds: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Measure each kind in interleaved rounds, because machines are noisy; return the medians."""
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, measure in kinds.items():
            taken[kind].append(measure())
    return {kind: statistics.median(values) for kind, values in taken.items()}


def show(measurements: Iterable[Measurement], before: dict[str, float] | None = None) -> list[Measurement]:
    """Print measurements as they arrive, next to those of an earlier run; return all of them."""
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs\n")
    print(f"{'what':<62} {'measured':>11} {'bound':>9}{'before':>11}")
    shown: list[Measurement] = []
    for each in measurements:
        shown.append(each)
        bound = "" if each.bound is None else f"{'>=' if each.at_least else '<='} {each.bound:g}"
        old = "" if before is None or each.what not in before else f"{before[each.what]:.3g}"
        verdict = "" if each.holds else "  <-- out of bounds"
        measured = f"{each.value:.3g} {each.unit}"
        print(f"{each.what:<62} {measured:>11} {bound:>9}{old:>11}  {each.note}{verdict}", flush=True)
    return shown


def save(measurements: Iterable[Measurement], path: Path) -> None:
    """Write the measurements as JSON, with the commit and the machine."""
    data: dict[str, Any] = {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "measurements": [attrs.asdict(each) for each in measurements],
    }
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, float]:
    """Return the values of an earlier run by name."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {each["what"]: each["value"] for each in data["measurements"]}


def main(measure: Callable[[], Iterator[Measurement]]) -> None:
    """Run a single benchmark; exit with 1 if a figure is out of bounds."""
    sys.exit(not all(each.holds for each in show(measure())))


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip()
