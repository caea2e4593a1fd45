"""Which meetings have been handled: what a memory is to the receiver, and the one it has by default."""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from lemcal_async.errors import ConfigurationError

Claim: TypeAlias = Literal["new", "busy", "done"]
"""Whether a meeting is ours to handle now, in somebody else's hands, or handled."""


@runtime_checkable
class Memory(Protocol):
    """Remembers which meetings of which account were handled, and which are being handled.

    What it raises counts as a failure of the handler: the delivery is to come again.
    """

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting to handle it, for ``lease`` seconds at most; or say who has it."""
        ...

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Note that it was handled, for good."""
        ...

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back: it was not handled."""
        ...


class BoundedMemory:
    """A memory of one process: the last ``size`` meetings that were handled, and those that are being.

    A restart forgets them, so a delivery that comes again after it is handled again. About 300 bytes
    each. ``clock`` returns seconds.
    """

    def __init__(self, size: int = 10_000, *, clock: Callable[[], float] = monotonic) -> None:
        if size < 1:
            raise ConfigurationError(f"BoundedMemory(size={size!r}): it must be at least 1")
        self._size = size
        self._clock = clock
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._claimed: dict[tuple[str, str], float] = {}  # until when; never more than are in work

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting; see ``Memory.claim``."""
        key = (user_id, meeting_id)
        now = self._clock()
        if key in self._done:
            self._done.move_to_end(key)
            return "done"
        if self._claimed.get(key, now) > now:
            return "busy"
        self._claimed[key] = now + lease
        return "new"

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Note that it was handled; the one that was asked for longest ago is forgotten for it."""
        key = (user_id, meeting_id)
        self._claimed.pop(key, None)
        self._done[key] = None
        if len(self._done) > self._size:
            self._done.popitem(last=False)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back."""
        self._claimed.pop((user_id, meeting_id), None)
