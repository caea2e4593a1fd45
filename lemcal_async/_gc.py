"""Keeps the garbage collector out of the way while many models are made at once.

The collector looks for cycles, and decoding makes none. But it runs whenever many objects are made and
walks the young ones among them: a third of the time that decoding takes, and up to 30 ms in one go.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager

# How many times in a row young objects may be spared before a full collection must have come between.
# Other people's cycles are passed over too, and must not pile up. This is about four lists of 12 MB.
_MOST_SPARED = 100

_spared = 0
_full_collections = -1


class paused:  # noqa: N801 - like contextlib's own; a generator takes four times as long
    """Pause the collector. Do not hold this across an await: other tasks make garbage meanwhile."""

    __slots__ = ("_was_enabled",)

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()


@contextmanager
def paused_and_spared() -> Generator[None]:
    """Pause the collector, and spare it the objects made meanwhile, which will live long.

    They go straight to the oldest generation, where they would end up after being walked twice.
    """
    with paused():
        yield
        spare()


def spare() -> None:
    """Spare the collector the objects that there are now, if they will live long."""
    global _spared, _full_collections  # noqa: PLW0603 - there is only one collector, too
    collections = gc.get_stats()[-1]["collections"]
    if collections != _full_collections:
        _full_collections, _spared = collections, 0
    # Objects that somebody froze for good, before a fork for example, would be thawed by this. Python 3.12
    # freezes some by itself, so nothing is spared there.
    if _spared < _MOST_SPARED and gc.get_freeze_count() == 0:
        _spared += 1
        gc.freeze()
        gc.unfreeze()  # moves them to the oldest generation without walking them
