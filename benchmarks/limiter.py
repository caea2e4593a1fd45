"""The limiter beside others: time, refusals, fairness and CPU, on real sockets and in virtual time.

Every run has a process for the client and one for the sandbox. Runs on sockets are a few at a time,
so that they take minutes and still do not disturb each other; those in virtual time need no time.
``python -m benchmarks.limiter --help``
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import attrs

from benchmarks import virtual_time
from benchmarks.limiter_peers import OURS, PEERS
from benchmarks.limiter_queue import Measure, measure
from benchmarks.limiter_run import run, take_phase
from benchmarks.limiter_scenarios import LIMIT, PICTURE, SCENARIOS, Backend, Job, Outcome, World
from benchmarks.limiter_table import HEADER, Line, lines

QUICK = ("fixed-near",)  # what a quick run does on sockets: 8 s each
BACKENDS: tuple[Backend, ...] = ("asyncio", "trio")
AT_ONCE = 3  # runs on sockets; with more, their bursts meet
VIRTUAL_SEEDS = 5
SPAWN = multiprocessing.get_context("spawn")

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def jobs(options: argparse.Namespace, world: World, scenarios: Sequence[str], seeds: int) -> Iterator[Job]:
    """Yield the runs in the order of the table."""
    limiters: list[tuple[str, Backend]] = [(OURS, backend) for backend in options.backend]
    limiters += [] if options.ours else [(peer, "asyncio") for peer in PEERS]
    for name, (limiter, backend) in product(scenarios, limiters):
        scenario = SCENARIOS[name]
        for seed in range(max(seeds, scenario.runs) if limiter == OURS else seeds):
            yield Job(scenario, limiter, backend, world, seed)


def pooled(
    work: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    *,
    processes: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> list[_Result]:
    """Return the results in the order of the tasks; tells on stderr how far it is."""
    with concurrent.futures.ProcessPoolExecutor(processes, SPAWN, initializer, initargs) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                if done % 10 == 0 or done == len(tasks):
                    print(f"{work.__name__}: {done} of {len(tasks)} done", file=sys.stderr, flush=True)
        except BaseException:  # the first that fails ends it all
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def in_virtual_time(tasks: Sequence[Job]) -> list[Outcome]:
    """Run them all, one a processor."""
    return pooled(run, tasks, processes=os.cpu_count() or 1, initializer=virtual_time.install)


def on_sockets(tasks: Sequence[Job]) -> list[Outcome]:
    """Run them, the long ones first so that no one is left waiting for them at the end."""
    order = sorted(range(len(tasks)), key=lambda number: -tasks[number].scenario.calls)
    outcomes = pooled(
        run,
        [tasks[number] for number in order],
        processes=AT_ONCE,
        initializer=take_phase,
        initargs=(SPAWN.Value("i", 0), AT_ONCE),
    )
    return [outcome for _, outcome in sorted(zip(order, outcomes, strict=True), key=lambda pair: pair[0])]


def draw_picture(path: Path) -> None:
    """Run all limiters in the picture's scenario, and draw when the server saw their requests."""
    from benchmarks.limiter_plot import draw

    draw(on_sockets([Job(PICTURE, limiter, "asyncio", "sockets", 0) for limiter in (OURS, *PEERS)]), path)


def measure_all(options: argparse.Namespace) -> tuple[list[Line], list[Measure]]:
    """Return the lines of the table, and what queue and memory cost."""
    scenarios = options.scenario or list(SCENARIOS)
    virtual = list(jobs(options, "virtual", scenarios, VIRTUAL_SEEDS))
    outcomes = in_virtual_time(virtual)
    # One after the other, because it is CPU that is measured.
    measures = [] if options.scenario else pooled(measure, options.backend, processes=1)
    real = list(jobs(options, "sockets", QUICK if options.quick else scenarios, options.repeat))
    outcomes = on_sockets(real) + outcomes
    order = list(SCENARIOS)
    outcomes.sort(key=lambda outcome: order.index(outcome.job.scenario.name))
    return lines(outcomes), [one for several in measures for one in several]


def report(found: list[Line], measures: list[Measure]) -> None:
    """Print the tables."""
    for name, scenario in SCENARIOS.items():
        if any(line.job.scenario.name == name for line in found):
            print(f"{name}: {scenario.calls} calls, {scenario.title}; ideal {scenario.ideal:g} s")
    print(
        "time/ideal: the median of the runs. 429s, and the places lost by the call that was overtaken most\n"
        f"(below {LIMIT} is within one burst): the worst run's. CPU: the client's process, HTTP included.\n"
    )
    print(HEADER)
    for line in found:
        print(line)
    if measures:
        print(f"\n{'lemcal-async alone':<66} {'measured':>10}  bound")
    for one in measures:
        bound = "" if one.bound is None else f"{one.bound:g} {one.unit}"
        value = f"{one.value:,.{2 if one.unit == 's' else 0}f} {one.unit}"
        print(f"{one.what:<66} {value:>10}  {bound}{'  MISSED' if one.missed else ''}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="limiter", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--quick", action="store_true", help="on sockets only fixed-near, less of the rest")
    parser.add_argument("--ours", action="store_true", help="leave the others out")
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="only this one; repeatable"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs of each on sockets, at least"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="run ours on this one only")
    parser.add_argument("--check", action="store_true", help="exit with 1 if ours misses a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw the picture, as .svg or .png")
    options = parser.parse_args(arguments)
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    options.backend = [options.backend] if options.backend else list(BACKENDS)
    return options


def main() -> int:
    """Measure, print, and judge if asked to."""
    options = parse()
    os.environ["NO_PROXY"] = "127.0.0.1"
    if options.plot:
        draw_picture(options.plot)
        return 0
    found, measures = measure_all(options)
    report(found, measures)
    if options.json:
        data = {
            "lines": [line.as_json() for line in found],
            "measures": [attrs.asdict(one) for one in measures],
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    missed = sum(line.missed for line in found) + sum(one.missed for one in measures)
    if options.check and missed:
        print(f"\n{missed} figures missed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
