"""Keeps the garbage collector out of the way while many models are made at once.

It is there to find cycles, and decoding makes none; but it runs whenever many objects are made, and
walks the young ones among them: a third of the time that decoding takes, and 30 ms in one go.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager

# How often in a row it is spared the young objects, before a full collection must have come between:
# so that other people's cycles, which are passed over too, do not pile up. Some four lists of 12 MB.
_MOST_SPARED = 100

_spared = 0
_full_collections = -1


@contextmanager
def paused() -> Generator[None]:
    """Pause the collector. Not to be held across an await: others make garbage meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def paused_and_spared() -> Generator[None]:
    """Pause the collector, and spare it what is made meanwhile and will be there for long.

    That goes straight to the oldest objects, where it would be after being walked twice.
    """
    with paused():
        yield
        _spare()


def _spare() -> None:
    global _spared, _full_collections  # noqa: PLW0603 - there is one collector, too
    collections = gc.get_stats()[-1]["collections"]
    if collections != _full_collections:
        _full_collections, _spared = collections, 0
    # Who has frozen objects for good (before a fork, say) would find them thawed. Python 3.12 freezes some
    # by itself, so there nobody is spared.
    if _spared < _MOST_SPARED and gc.get_freeze_count() == 0:
        _spared += 1
        gc.freeze()
        gc.unfreeze()  # "put them back into the oldest generation", without a walk
