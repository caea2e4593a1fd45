"""Performance in virtual time: how long a burst takes, without 429s, and what foreign use gets.

The bounds are multiples of the ideal, in which each window is full as soon as it begins. Every world
runs with twenty seeds.
"""

import attrs
import pytest

from lemcal_async.sandbox._ratelimit import WindowKind

from .simulator import Lateness, Result, Rounding, Simulation, World

SEEDS = 20
KINDS: tuple[WindowKind, ...] = ("fixed", "sliding")
FAR = World(calls=200, round_trip=(0.04, 0.2), asymmetry=0.5)
LATE = attrs.evolve(FAR, late_back=(0.05, 0.5, 0.5))


def runs(world: World, seeds: int = SEEDS) -> list[Result]:
    """Return the results of ``seeds`` runs."""
    return [Simulation(world, seed).run() for seed in range(seeds)]


def ratios(world: World, results: list[Result], limit: int = 20) -> list[float]:
    """Return each run's time as a multiple of the ideal, with ``limit`` calls per window."""
    ideal = (-(-world.calls // limit) - 1) * world.period
    return [result.finished / ideal for result in results]


def refused(results: list[Result]) -> int:
    """Return the total number of 429s."""
    return sum(result.refused for result in results)


@pytest.mark.parametrize(
    ("world", "mean", "worst"),
    [
        pytest.param(World(), 1.004, 1.005, id="fixed-near"),
        pytest.param(FAR, 1.029, 1.033, id="fixed-far"),
        pytest.param(LATE, 1.045, 1.065, id="fixed-late"),
        pytest.param(World(counting="sliding"), 1.004, 1.005, id="sliding-near"),
        pytest.param(attrs.evolve(FAR, counting="sliding"), 1.055, 1.065, id="sliding-far"),
        pytest.param(attrs.evolve(LATE, counting="sliding"), 1.078, 1.1, id="sliding-late"),
        pytest.param(World(headers=False), 1.004, 1.005, id="no-headers-near"),
        pytest.param(attrs.evolve(FAR, headers=False), 1.08, 1.09, id="no-headers-far"),
        pytest.param(World(slow_connect=0.8), 1.105, 1.105, id="slow-connect"),
        pytest.param(World(slow_connect=0.8, counting="sliding"), 1.105, 1.105, id="slow-connect-sliding"),
        pytest.param(attrs.evolve(FAR, slow_connect=0.8), 1.075, 1.08, id="slow-connect-far"),
        pytest.param(
            World(connections=10, round_trip=(0.3, 0.4), asymmetry=0.5), 1.165, 1.17, id="full-pool"
        ),
        pytest.param(attrs.evolve(FAR, calls=100, connections=5), 1.1, 1.11, id="very-full-pool"),
    ],
)
def test_time_to_finish_without_429s(world: World, mean: float, worst: float) -> None:
    """Bursts finish close to the ideal time, without a single 429."""
    results = runs(world)
    assert 0 == refused(results)
    assert sum(ratios(world, results)) / SEEDS <= mean
    assert max(ratios(world, results)) <= worst


@pytest.mark.parametrize("asymmetry", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("counting", KINDS)
def test_asymmetric_latency(counting: WindowKind, asymmetry: float) -> None:
    """However a round trip is split, nothing is refused and little time is lost."""
    world = attrs.evolve(FAR, counting=counting, asymmetry=asymmetry)
    results = runs(world, 8)
    assert 0 == refused(results)
    assert max(ratios(world, results)) <= (1.035 if counting == "fixed" else 1.08)


@pytest.mark.parametrize("world", [World(), FAR, attrs.evolve(FAR, asymmetry=0.8)])
def test_fixed_windows_are_detected(world: World) -> None:
    """Fixed windows are proven within one burst, but never for a sliding log or without headers."""
    assert all(result.proven for result in runs(world))
    for other in (attrs.evolve(world, counting="sliding"), attrs.evolve(world, headers=False)):
        results = runs(other, 8)
        assert not any(result.proven or result.fell_back for result in results)
        assert 20 == max(result.most_in(2.0) for result in results)


# -------------------------------------------------------------------------------------- unusual servers
@pytest.mark.parametrize("rounded", ["up", "down", "nearest"])
@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(), FAR], ids=["near", "far"])
def test_whole_seconds_are_not_relied_on(world: World, counting: WindowKind, rounded: Rounding) -> None:
    """A server that rounds ``Retry-After`` in any direction never proves fixed windows."""
    world = attrs.evolve(world, counting=counting, rounded=rounded)
    results = runs(world, 8)
    assert 0 == refused(results)
    assert not any(result.proven or result.fell_back for result in results)
    assert max(ratios(world, results)) <= 1.1


@pytest.mark.parametrize("moment", [0.0005, 5.9, 6.1, 7.0, 8.0])
@pytest.mark.parametrize("world", [attrs.evolve(FAR, round_trip=(0.001, 0.001)), FAR], ids=["near", "far"])
def test_server_restart(world: World, moment: float) -> None:
    """A restarted server has forgotten everything, so nothing is refused, even if its windows shift."""
    world = attrs.evolve(world, changes=((moment, "fixed"),))
    results = runs(world, 8)
    assert 0 == refused(results)
    assert max(ratios(world, results)) <= 1.12


@pytest.mark.parametrize("world", [World(calls=400), attrs.evolve(FAR, calls=400)], ids=["near", "far"])
def test_server_that_changes_its_algorithm(world: World) -> None:
    """From fixed windows to a sliding log and back: only the bursts until that is detected are refused."""
    results = runs(attrs.evolve(world, changes=((9.0, "sliding"), (25.0, "fixed"))), 8)
    assert all(result.fell_back for result in results)
    assert max(result.refused for result in results) <= 2.5 * world.limit
    results = runs(attrs.evolve(world, counting="sliding", changes=((9.0, "fixed"), (25.0, "fixed"))), 8)
    assert 0 == refused(results)


def test_header_that_lowers_the_limit() -> None:
    """If a first call reveals the lower limit, it is kept; otherwise the excess of the burst is refused."""
    world = World(servers_limit=10, first_call=True)
    results = runs(world, 8)
    assert 0 == refused(results)
    assert max(ratios(world, results, limit=10)) <= 1.13
    results = runs(attrs.evolve(world, first_call=False), 8)
    assert [10] * 8 == [result.refused for result in results]


# ---------------------------------------------------------------------------------------- jitter
@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("late", [(0.0, 0.0, 0.0), (0.05, 0.5, 0.5)])
@pytest.mark.parametrize("ways", ["split", "apart"])
def test_at_most_one_in_a_thousand_is_refused_under_jitter(
    ways: str, late: Lateness, counting: WindowKind
) -> None:
    """With independent latencies, a request may travel faster than any before, and arrive too early."""
    world = attrs.evolve(FAR, asymmetry=None, apart=ways == "apart", late_back=late, counting=counting)
    results = runs(world)
    assert refused(results) <= 0.001 * world.calls * SEEDS


@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(calls=400), attrs.evolve(FAR, calls=400)], ids=["near", "far"])
def test_slow_handlers_do_not_reduce_throughput(world: World, counting: WindowKind) -> None:
    """With 30 % of the responses 2.5 s late, 18 requests still pass per 2 s."""
    results = runs(attrs.evolve(world, late_back=(0.3, 2.5, 2.5), counting=counting), 8)
    assert 0 == refused(results)
    lasted = sum(max(result.arrivals) - min(result.arrivals) for result in results)
    served = 8 * (world.calls - world.limit) / lasted * world.period
    assert served >= (17.8 if counting == "sliding" and world.round_trip[1] > 0.1 else 18)


# --------------------------------------------------------------------------------------- delays
@pytest.mark.parametrize(
    ("world", "mean", "worst"),
    [
        pytest.param(World(calls=200), 1.02, 1.04, id="fixed-near"),
        pytest.param(FAR, 1.05, 1.06, id="fixed-far"),
        pytest.param(World(calls=200, counting="sliding"), 1.07, 1.1, id="sliding-near"),
        pytest.param(attrs.evolve(FAR, counting="sliding"), 1.12, 1.14, id="sliding-far"),
    ],
)
def test_requests_delayed_before_counting(world: World, mean: float, worst: float) -> None:
    """5 % of the requests arrive 520 to 540 ms late: nothing is refused, and little time is lost."""
    results = runs(attrs.evolve(world, late_there=(0.05, 0.52, 0.54)))
    assert 0 == refused(results)
    assert sum(ratios(world, results)) / SEEDS <= mean
    assert max(ratios(world, results)) <= worst


@pytest.mark.parametrize("there", [(0.05, 1.0, 1.0), (0.05, 4.0, 4.0), (0.3, 0.0, 4.0)])
@pytest.mark.parametrize("back", [(0.0, 0.0, 0.0), (0.3, 2.5, 2.5), (0.3, 0.0, 4.0)])
@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(), FAR], ids=["near", "far"])
def test_delays_in_both_directions(
    world: World, counting: WindowKind, there: Lateness, back: Lateness
) -> None:
    """Nothing is refused with a proxy that holds requests for seconds, slow handlers, or both."""
    results = runs(attrs.evolve(world, counting=counting, late_there=there, late_back=back), 4)
    assert 0 == refused(results)


def test_response_from_a_window_that_seemed_over() -> None:
    """The last request of a window, faster than any before, reveals nothing about the next window."""
    world = attrs.evolve(FAR, asymmetry=None, late_there=(0.3, 0.0, 4.0), late_back=(0.05, 0.0, 2.5))
    assert 0 == Simulation(world, 598911735).run().refused


def test_delays_without_headers() -> None:
    """Each slot waits for its own response, so nothing is refused, at the cost of time."""
    world = World(headers=False, late_there=(0.05, 0.0, 4.0), late_back=(0.3, 0.0, 2.5))
    assert 0 == refused(runs(world, 8))


# -------------------------------------------------------------------------------- shared keys
@pytest.mark.parametrize("evenly", [True, False])
def test_foreign_use_gets_a_share(evenly: bool) -> None:  # noqa: FBT001 - a column
    """Of 5 foreign requests per second, at least half are accepted, and we receive few 429s."""
    world = World(foreign=5.0, foreign_evenly=evenly, first_call=True)
    results = runs(world)
    assert max(result.refused for result in results) <= 3
    assert max(ratios(world, results, limit=10)) <= 1.25
    shares = [result.foreign_served / result.foreign for result in results]
    assert sum(shares) / SEEDS >= (0.95 if evenly else 0.85)
    assert min(shares) >= (0.9 if evenly else 0.45)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_without_a_shared_limiter(processes: int) -> None:
    """Processes that treat each other as foreign end up sharing: only the first bursts collide."""
    world = World(calls=200, processes=processes)
    results = runs(world, 8)
    assert max(ratios(world, results)) <= 1.6
    alone = 20 * (processes - 1)  # the excess of one burst of each process
    assert max(result.refused for result in results) <= 3 * alone
    assert all(20 >= result.most_in(2.0) or result.proven for result in results)


def test_runs_are_repeatable() -> None:
    """The result of a run depends only on the seed."""
    world = attrs.evolve(LATE, foreign=3.0, foreign_evenly=False)
    assert Simulation(world, 7).run() == Simulation(world, 7).run()
    assert Simulation(world, 7).run() != Simulation(world, 8).run()
