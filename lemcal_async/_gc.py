"""Keeps the garbage collector out of the way while many models are created.

The collector looks for cycles, and decoding creates none. But the collector runs whenever many objects are
created and traverses the young ones: a third of the decoding time, and up to 30 ms in one pause.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager

# Maximum calls of promote() between two full collections. It also promotes garbage cycles of other code,
# which must not accumulate. The limit corresponds to about four lists of 12 MB.
_MAX_PROMOTIONS = 100

_promotions = 0
_full_collections = -1


class paused:  # noqa: N801 - named like those of contextlib; a generator takes four times as long
    """Pause the collector. Do not hold this across an await, because other tasks would create garbage."""

    __slots__ = ("_was_enabled",)

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()


@contextmanager
def paused_and_promoting() -> Generator[None]:
    """Pause the collector, then promote the objects created in the block, which will live long.

    They move straight to the oldest generation, where they would end up after being traversed twice.
    """
    with paused():
        yield
        promote()


def promote() -> None:
    """Promote all current objects to the oldest generation; call this if most of them will live long."""
    global _promotions, _full_collections  # noqa: PLW0603 - there is only one collector
    collections = gc.get_stats()[-1]["collections"]
    if collections != _full_collections:
        _full_collections, _promotions = collections, 0
    # This would unfreeze objects that the program has frozen for good, such as before a fork. Python 3.12
    # freezes some objects itself, so this does nothing there.
    if _promotions < _MAX_PROMOTIONS and gc.get_freeze_count() == 0:
        _promotions += 1
        gc.freeze()
        gc.unfreeze()  # moves them to the oldest generation without traversing them
