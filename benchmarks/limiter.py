"""Compare the limiter with others: time, refusals, fairness and CPU, on real sockets and in virtual time.

Every run has one process for the client and one for the sandbox. Several runs on sockets share the machine,
few enough not to disturb each other; runs in virtual time take no real time.
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

QUICK = ("fixed-near",)  # the scenarios of a quick run on sockets: 8 s each
BACKENDS: tuple[Backend, ...] = ("asyncio", "trio")
AT_ONCE = 3  # concurrent runs on sockets; with more, their bursts collide
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
    """Return the results in the order of the tasks; report progress on stderr."""
    with concurrent.futures.ProcessPoolExecutor(processes, SPAWN, initializer, initargs) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                if done % 10 == 0 or done == len(tasks):
                    print(f"{work.__name__}: {done} of {len(tasks)} done", file=sys.stderr, flush=True)
        except BaseException:  # the first failure ends the run
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def in_virtual_time(tasks: Sequence[Job]) -> list[Outcome]:
    """Run all jobs, one per processor."""
    return pooled(run, tasks, processes=os.cpu_count() or 1, initializer=virtual_time.install)


def on_sockets(tasks: Sequence[Job]) -> list[Outcome]:
    """Run all jobs, longest first, so that none is left running alone at the end."""
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
    """Run all limiters in the picture's scenario, and plot when the server saw their requests."""
    from benchmarks.limiter_plot import draw

    draw(on_sockets([Job(PICTURE, limiter, "asyncio", "sockets", 0) for limiter in (OURS, *PEERS)]), path)


def measure_all(options: argparse.Namespace) -> tuple[list[Line], list[Measure]]:
    """Return the lines of the table, and the cost of the queue and of memory."""
    scenarios = options.scenario or list(SCENARIOS)
    virtual = list(jobs(options, "virtual", scenarios, VIRTUAL_SEEDS))
    outcomes = in_virtual_time(virtual)
    # One after another, because they measure CPU.
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
        "time/ideal: the median of the runs. 429s, and the places lost by the call overtaken most (below\n"
        f"{LIMIT} is within one burst): the worst run. CPU: the client's process, including HTTP.\n"
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
    parser.add_argument("--quick", action="store_true", help="on sockets, run only fixed-near")
    parser.add_argument("--ours", action="store_true", help="leave out the other limiters")
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="run only this scenario; repeatable"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="minimum number of runs of each on sockets"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="run our limiter on this backend only")
    parser.add_argument("--check", action="store_true", help="exit with 1 if our limiter misses a bound")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw the plot, as .svg or .png")
    options = parser.parse_args(arguments)
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    options.backend = [options.backend] if options.backend else list(BACKENDS)
    return options


def main() -> int:
    """Run the benchmark; return the exit status."""
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
        print(f"\n{missed} bounds missed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
