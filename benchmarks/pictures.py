"""Charts of a benchmark run: bar charts with the peers, and the cost of idle connections."""

import re
from pathlib import Path

import matplotlib as mpl

from benchmarks.table import Measurement

mpl.use("svg")

from matplotlib import pyplot as plt

_BARS = {
    "decode": (r"decode [\d,]+ meetings .*: (.*)", "decoding a 12 MB list, all fields read (ms)"),
    "calls": (r"call, asyncio: (.*)", "CPU time per call, 25 concurrent calls, asyncio (µs)"),
    "stalls": (r"decode, (.*): longest stall, (.*)", "longest event loop stall while decoding a list (ms)"),
}
_IDLE = r"call, (\d+) idle connections: (.*)"


def draw(measurements: list[Measurement], folder: Path) -> list[Path]:
    """Draw the charts for which there are measurements, and return the files."""
    drawn = [
        _bars(measurements, pattern, title, folder / f"{name}.svg")
        for name, (pattern, title) in _BARS.items()
        if any(_is_shown(each, pattern) for each in measurements)
    ]
    lines: dict[str, list[tuple[int, float]]] = {}
    for each in measurements:
        if found := re.fullmatch(_IDLE, each.what):
            lines.setdefault(found[2], []).append((int(found[1]), each.value))
    if lines:
        drawn.append(_lines(lines, folder / "idle.svg"))
    return drawn


def _is_shown(each: Measurement, pattern: str) -> bool:
    return each.unit != "x" and re.fullmatch(pattern, each.what) is not None


def _bars(measurements: list[Measurement], pattern: str, title: str, path: Path) -> Path:
    shown = [each for each in measurements if _is_shown(each, pattern)]
    labels = [", ".join(match.groups()) for each in shown if (match := re.fullmatch(pattern, each.what))]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(shown)), layout="constrained")
    bars = axes.barh(labels, [each.value for each in shown])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_title(title)
    figure.savefig(path)
    plt.close(figure)
    return path


def _lines(lines: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="idle connections", ylabel="µs")
    axes.set_title("CPU time per call, one call at a time, with idle connections in the pool")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
    return path
