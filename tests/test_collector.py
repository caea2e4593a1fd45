"""The garbage collector while models are made: it is paused, spared the new objects, and restored."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from lemcal_async import _gc

never_spared = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="3.12 freezes immortal objects by itself, as if somebody meant to"
)

Pause = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Restore the collector after a test, and thaw what another test has frozen."""
    was_enabled = gc.isenabled()
    gc.unfreeze()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("pause", [_gc.paused, _gc.paused_and_spared])
@pytest.mark.parametrize("was_enabled", [True, False])
def test_it_is_left_as_it_was(pause: Pause, was_enabled: bool) -> None:  # noqa: FBT001 - parameters
    """Failures and overlapping pauses restore it too."""
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
    """Return the ids of the objects that only a full collection looks at."""
    return {id(each) for each in gc.get_objects(generation=2)}


@never_spared
def test_what_is_made_is_old_at_once() -> None:
    """The collector does not walk the new objects while they are young."""
    gc.collect()
    with _gc.paused_and_spared():
        made = [[each] for each in range(1000)]
    assert {id(each) for each in made} <= oldest()
    assert 0 == gc.get_freeze_count()


def test_what_is_frozen_stays_frozen() -> None:
    """Frozen objects stay frozen: a program may be about to fork."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    with _gc.paused_and_spared():
        made = [[each] for each in range(1000)]
    assert frozen - 100 < gc.get_freeze_count() <= frozen  # some may have gone by themselves
    assert not {id(each) for each in made} <= oldest()


@never_spared
def test_other_garbage_does_not_pile_up() -> None:
    """Objects are spared only so many times before a full collection must come."""
    gc.collect()
    gc.disable()
    made: list[list[int]] = []
    for _ in range(_gc._MAX_SPARED):
        with _gc.paused_and_spared():
            made = [[each] for each in range(10)]
    assert {id(each) for each in made} <= oldest()
    with _gc.paused_and_spared():
        made = [[each] for each in range(10)]
    assert not {id(each) for each in made} <= oldest()
    gc.collect()
    with _gc.paused_and_spared():
        made = [[each] for each in range(10)]
    assert {id(each) for each in made} <= oldest()
