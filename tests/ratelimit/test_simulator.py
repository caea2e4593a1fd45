"""The figures, in virtual time: how long a burst takes, that nothing is refused, and what others get.

The bounds are multiples of the ideal, in which each window is full as soon as it begins. Every world
is run with twenty seeds.
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
    """Return what came of so many runs."""
    return [Simulation(world, seed).run() for seed in range(seeds)]


def ratios(world: World, results: list[Result], limit: int = 20) -> list[float]:
    """Return the time of each as a multiple of the ideal, with ``limit`` calls in a window."""
    ideal = (-(-world.calls // limit) - 1) * world.period
    return [result.finished / ideal for result in results]


def refused(results: list[Result]) -> int:
    """Return how many 429s there were in all."""
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
def test_time_without_a_refusal(world: World, mean: float, worst: float) -> None:
    """Close to the ideal, and not one 429."""
    results = runs(world)
    assert 0 == refused(results)
    assert sum(ratios(world, results)) / SEEDS <= mean
    assert max(ratios(world, results)) <= worst


@pytest.mark.parametrize("asymmetry", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("counting", KINDS)
def test_a_way_that_is_longer_than_the_other(counting: WindowKind, asymmetry: float) -> None:
    """However a round trip is split, which no answer tells: nothing is refused, and little time is lost."""
    world = attrs.evolve(FAR, counting=counting, asymmetry=asymmetry)
    results = runs(world, 8)
    assert 0 == refused(results)
    assert max(ratios(world, results)) <= (1.035 if counting == "fixed" else 1.08)


@pytest.mark.parametrize("world", [World(), FAR, attrs.evolve(FAR, asymmetry=0.8)])
def test_fixed_windows_are_recognized(world: World) -> None:
    """Within the first windows of a burst, and never where a log slides or headers are missing."""
    assert all(result.proven for result in runs(world))
    for other in (attrs.evolve(world, counting="sliding"), attrs.evolve(world, headers=False)):
        results = runs(other, 8)
        assert not any(result.proven or result.fell_back for result in results)
        assert 20 == max(result.most_in(2.0) for result in results)


# -------------------------------------------------------------------------------------- odd servers
@pytest.mark.parametrize("rounded", ["up", "down", "nearest"])
@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(), FAR], ids=["near", "far"])
def test_whole_seconds_are_not_relied_on(world: World, counting: WindowKind, rounded: Rounding) -> None:
    """A server that rounds Retry-After, in any direction, is never taken to prove windows."""
    world = attrs.evolve(world, counting=counting, rounded=rounded)
    results = runs(world, 8)
    assert 0 == refused(results)
    assert not any(result.proven or result.fell_back for result in results)
    assert max(ratios(world, results)) <= 1.1


@pytest.mark.parametrize("moment", [0.0005, 5.9, 6.1, 7.0, 8.0])
@pytest.mark.parametrize("world", [attrs.evolve(FAR, round_trip=(0.001, 0.001)), FAR], ids=["near", "far"])
def test_a_server_that_restarts(world: World, moment: float) -> None:
    """It has forgotten all, so nothing is refused; the new windows need not end when the old ones did."""
    world = attrs.evolve(world, changes=((moment, "fixed"),))
    results = runs(world, 8)
    assert 0 == refused(results)
    assert max(ratios(world, results)) <= 1.12


@pytest.mark.parametrize("world", [World(calls=400), attrs.evolve(FAR, calls=400)], ids=["near", "far"])
def test_a_server_that_counts_otherwise_for_a_while(world: World) -> None:
    """From windows to a log and back: at most the bursts until that shows are refused, and then none."""
    results = runs(attrs.evolve(world, changes=((9.0, "sliding"), (25.0, "fixed"))), 8)
    assert all(result.fell_back for result in results)
    assert max(result.refused for result in results) <= 2.5 * world.limit
    results = runs(attrs.evolve(world, counting="sliding", changes=((9.0, "fixed"), (25.0, "fixed"))), 8)
    assert 0 == refused(results)


def test_a_header_that_lowers_the_limit() -> None:
    """Told by a first call, no more than that are sent; told by the burst itself, the excess is refused."""
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
def test_03_at_most_one_in_a_thousand_is_refused_under_jitter(
    ways: str, late: Lateness, counting: WindowKind
) -> None:
    """Ways that vary without regard to each other may be quicker than any before: then one may be early."""
    world = attrs.evolve(FAR, asymmetry=None, apart=ways == "apart", late_back=late, counting=counting)
    results = runs(world)
    assert refused(results) <= 0.001 * world.calls * SEEDS


@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(calls=400), attrs.evolve(FAR, calls=400)], ids=["near", "far"])
def test_03_slow_handlers_do_not_hold_the_limit(world: World, counting: WindowKind) -> None:
    """With 30 % of the answers 2.5 s late, 18 requests pass in 2 s all the same."""
    results = runs(attrs.evolve(world, late_back=(0.3, 2.5, 2.5), counting=counting), 8)
    assert 0 == refused(results)
    lasted = sum(max(result.arrivals) - min(result.arrivals) for result in results)
    served = 8 * (world.calls - world.limit) / lasted * world.period
    assert served >= (17.8 if counting == "sliding" and world.round_trip[1] > 0.1 else 18)


# --------------------------------------------------------------------------------------- lateness
@pytest.mark.parametrize(
    ("world", "mean", "worst"),
    [
        pytest.param(World(calls=200), 1.02, 1.04, id="fixed-near"),
        pytest.param(FAR, 1.05, 1.06, id="fixed-far"),
        pytest.param(World(calls=200, counting="sliding"), 1.07, 1.1, id="sliding-near"),
        pytest.param(attrs.evolve(FAR, counting="sliding"), 1.12, 1.14, id="sliding-far"),
    ],
)
def test_late_before_they_are_counted(world: World, mean: float, worst: float) -> None:
    """5 % of the requests arrive 520 to 540 ms late: none is refused, and little time is lost."""
    results = runs(attrs.evolve(world, late_there=(0.05, 0.52, 0.54)))
    assert 0 == refused(results)
    assert sum(ratios(world, results)) / SEEDS <= mean
    assert max(ratios(world, results)) <= worst


@pytest.mark.parametrize("there", [(0.05, 1.0, 1.0), (0.05, 4.0, 4.0), (0.3, 0.0, 4.0)])
@pytest.mark.parametrize("back", [(0.0, 0.0, 0.0), (0.3, 2.5, 2.5), (0.3, 0.0, 4.0)])
@pytest.mark.parametrize("counting", KINDS)
@pytest.mark.parametrize("world", [World(), FAR], ids=["near", "far"])
def test_however_late_on_either_way(
    world: World, counting: WindowKind, there: Lateness, back: Lateness
) -> None:
    """A proxy that holds requests for seconds, slow handlers, or both: nothing is refused."""
    results = runs(attrs.evolve(world, counting=counting, late_there=there, late_back=back), 4)
    assert 0 == refused(results)


def test_an_answer_from_a_window_that_seemed_over() -> None:
    """A request is quicker than any before, and the last of its window: it says nothing of the next one."""
    world = attrs.evolve(FAR, asymmetry=None, late_there=(0.3, 0.0, 4.0), late_back=(0.05, 0.0, 2.5))
    assert 0 == Simulation(world, 598911735).run().refused


def test_lateness_where_no_headers_tell() -> None:
    """Each slot waits for its own answer, so nothing is refused, at the price of time."""
    world = World(headers=False, late_there=(0.05, 0.0, 4.0), late_back=(0.3, 0.0, 2.5))
    assert 0 == refused(runs(world, 8))


# -------------------------------------------------------------------------------- not alone on a key
@pytest.mark.parametrize("evenly", [True, False])
def test_others_are_left_their_share(evenly: bool) -> None:  # noqa: FBT001 - a column
    """5 requests a second of somebody else: at least half get through, and we do not live on 429s."""
    world = World(foreign=5.0, foreign_evenly=evenly, first_call=True)
    results = runs(world)
    assert max(result.refused for result in results) <= 3
    assert max(ratios(world, results, limit=10)) <= 1.25
    shares = [result.foreign_served / result.foreign for result in results]
    assert sum(shares) / SEEDS >= (0.95 if evenly else 0.85)
    assert min(shares) >= (0.9 if evenly else 0.45)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_do_not_know_of_each_other(processes: int) -> None:
    """Foreign to each other, they come to share: the first bursts collide, and all calls end."""
    world = World(calls=200, processes=processes)
    results = runs(world, 8)
    assert max(ratios(world, results)) <= 1.6
    alone = 20 * (processes - 1)  # what one burst of each has too many
    assert max(result.refused for result in results) <= 3 * alone
    assert all(20 >= result.most_in(2.0) or result.proven for result in results)


def test_a_run_can_be_repeated() -> None:
    """Nothing but the seed decides."""
    world = attrs.evolve(LATE, foreign=3.0, foreign_evenly=False)
    assert Simulation(world, 7).run() == Simulation(world, 7).run()
    assert Simulation(world, 7).run() != Simulation(world, 8).run()
