"""Pausing the garbage collector, promoting the new objects, and restoring the collector."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from lemcal_async import _gc

never_promoted = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 freezes immortal objects itself"
)

Pause = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def restore_collector() -> Iterator[None]:
    """Restore the collector's state, and unfreeze objects that another test has frozen."""
    was_enabled = gc.isenabled()
    gc.unfreeze()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("pause", [_gc.paused, _gc.paused_and_promoting])
@pytest.mark.parametrize("was_enabled", [True, False])
def test_collector_is_restored(pause: Pause, was_enabled: bool) -> None:  # noqa: FBT001 - parameters
    """The collector is restored after exceptions and overlapping pauses."""
    (gc.enable if was_enabled else gc.disable)()
    with pytest.raises(ZeroDivisionError), pause():
        raise ZeroDivisionError if not gc.isenabled() else AssertionError
    assert was_enabled is gc.isenabled()
    first, second = pause(), pause()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert was_enabled is gc.isenabled()


def oldest() -> set[int]:
    """Return the ids of all objects in the oldest generation."""
    return {id(each) for each in gc.get_objects(generation=2)}


@never_promoted
def test_new_objects_are_promoted() -> None:
    """New objects move to the oldest generation without being traversed."""
    gc.collect()
    with _gc.paused_and_promoting():
        created = [[each] for each in range(1000)]
    assert {id(each) for each in created} <= oldest()
    assert 0 == gc.get_freeze_count()


def test_frozen_objects_stay_frozen() -> None:
    """Objects that the program froze, such as before a fork, stay frozen."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    with _gc.paused_and_promoting():
        created = [[each] for each in range(1000)]
    assert frozen - 100 < gc.get_freeze_count() <= frozen  # some may have been freed
    assert not {id(each) for each in created} <= oldest()


@never_promoted
def test_promotion_stops_without_a_full_collection() -> None:
    """Promotions between two full collections are limited, so that garbage does not accumulate."""
    gc.collect()
    gc.disable()
    created: list[list[int]] = []
    for _ in range(_gc._MAX_PROMOTIONS):
        with _gc.paused_and_promoting():
            created = [[each] for each in range(10)]
    assert {id(each) for each in created} <= oldest()
    with _gc.paused_and_promoting():
        created = [[each] for each in range(10)]
    assert not {id(each) for each in created} <= oldest()
    gc.collect()
    with _gc.paused_and_promoting():
        created = [[each] for each in range(10)]
    assert {id(each) for each in created} <= oldest()
