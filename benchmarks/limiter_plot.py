"""The plot: when the server saw each limiter's requests, accepted or refused. One row per limiter."""

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.limiter_peers import OURS
from benchmarks.limiter_scenarios import LIMIT, PERIOD, PICTURE, Outcome

ACCEPTED, REFUSED, EDGE, TEXT, QUIET = "#2563a8", "#d1351b", "#c9ced6", "#1c2430", "#5b6675"


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Write the plot; the suffix selects SVG or PNG."""
    mpl.rcParams.update(
        {
            "svg.hashsalt": "limiter",  # identical plots give identical files
            "path.simplify": False,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": TEXT,
        }
    )
    until = max(outcome.seconds for outcome in outcomes) + 0.3
    figure = Figure(figsize=(8.6, 0.78 * len(outcomes) + 1.15), facecolor="white")
    rows = figure.subplots(len(outcomes), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.235, right=0.85, top=0.885, bottom=0.075, hspace=0.16)
    for row, outcome in zip(rows, outcomes, strict=True):
        _draw_row(row, outcome, until)
    rows[-1].tick_params(axis="x", length=3, color=QUIET, labelcolor=QUIET, labelbottom=True)
    rows[-1].set_xlabel("seconds", color=QUIET)
    figure.text(
        0.015,
        0.975,
        f"{PICTURE.calls} calls at once, {LIMIT} per {PERIOD:g} s allowed, round trip 40 to 200 ms",
        fontsize=11,
        fontweight="bold",
        va="top",
    )
    legend = (
        (0.015, QUIET, "Requests as the server counted them, the first call at the bottom:"),
        (0.5, ACCEPTED, "● accepted"),
        (0.612, REFUSED, "● refused (429)"),
        (0.738, QUIET, "│ end of a window"),
    )
    for x, color, words in legend:
        figure.text(x, 0.925, words, color=color, va="center")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)


def _draw_row(row: Axes, outcome: Outcome, until: float) -> None:
    """Draw one limiter: time from left to right, calls in the order they were made from bottom to top."""
    ours = outcome.job.limiter == OURS
    for edge in _window_ends(outcome):
        row.axvline(edge, color=EDGE, linewidth=0.9, zorder=0)
    for accepted, color in ((True, ACCEPTED), (False, REFUSED)):
        dots = [(a.at, a.call) for a in outcome.arrivals if a.accepted == accepted and a.call is not None]
        # Zero-length strokes with round ends: markers would make the file three times as large.
        row.plot(
            [x for at, _ in dots for x in (at, at + 1e-3, math.nan)],
            [y for _, call in dots for y in (call, call, math.nan)],
            color=color,
            linewidth=2.4,
            solid_capstyle="round",
            zorder=2 - accepted,
        )
    row.set_xlim(-0.15, until)
    row.set_ylim(-6, PICTURE.calls + 5)
    row.set_yticks([])
    row.tick_params(axis="x", length=0, labelbottom=False)
    for side in ("top", "left", "right"):
        row.spines[side].set_visible(False)
    row.spines["bottom"].set_color(EDGE)
    weight = "bold" if ours else "normal"
    row.text(-0.02, 0.5, outcome.job.limiter, transform=row.transAxes, ha="right", va="center", weight=weight)
    row.text(
        1.02, 0.66, f"{outcome.seconds:.2f} s total", transform=row.transAxes, va="center", weight=weight
    )
    row.text(
        1.02,
        0.3,
        f"{outcome.refused or 'none'} refused",
        transform=row.transAxes,
        va="center",
        color=REFUSED if outcome.refused else QUIET,
    )


def _window_ends(outcome: Outcome) -> list[float]:
    """Return the ends of the server's windows. Each window starts at the first request after the previous."""
    ends: list[float] = []
    for arrival in outcome.arrivals:
        if not ends or arrival.at >= ends[-1]:
            ends.append(arrival.at + PERIOD)
    return ends
