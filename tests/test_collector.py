"""The garbage collector while models are made: paused, spared, and left as it was."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from lemcal_async import _gc as collector

never_spared = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="3.12 freezes immortal objects by itself, as if somebody meant to"
)

Pause = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave the collector as it was, whatever a test does; what another test has frozen is let go."""
    was_enabled = gc.isenabled()
    gc.unfreeze()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("pause", [collector.paused, collector.paused_and_spared])
@pytest.mark.parametrize("was_enabled", [True, False])
def test_it_is_left_as_it_was(pause: Pause, was_enabled: bool) -> None:  # noqa: FBT001 - parameters
    """Also by a failure, and by pauses that overlap in any order."""
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
    """So that the collector does not walk it while it is young."""
    gc.collect()
    with collector.paused_and_spared():
        made = [[each] for each in range(1000)]
    assert {id(each) for each in made} <= oldest()
    assert 0 == gc.get_freeze_count()


def test_what_is_frozen_stays_frozen() -> None:
    """Somebody meant to fork."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector.paused_and_spared():
        made = [[each] for each in range(1000)]
    assert frozen - 100 < gc.get_freeze_count() <= frozen  # some may have gone by themselves
    assert not {id(each) for each in made} <= oldest()


@never_spared
def test_other_garbage_does_not_pile_up() -> None:
    """Without a full collection between, it is spared for so long only; then again."""
    gc.collect()
    gc.disable()
    made: list[list[int]] = []
    for _ in range(collector._MOST_SPARED):
        with collector.paused_and_spared():
            made = [[each] for each in range(10)]
    assert {id(each) for each in made} <= oldest()
    with collector.paused_and_spared():
        made = [[each] for each in range(10)]
    assert not {id(each) for each in made} <= oldest()
    gc.collect()
    with collector.paused_and_spared():
        made = [[each] for each in range(10)]
    assert {id(each) for each in made} <= oldest()
