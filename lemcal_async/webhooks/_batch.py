"""Many who ask at once share one call: for an account's list, and for its wake-ups.

An answer is only given by a call that began after the question was asked: an older one may not know what
the question is about. One call at a time, and never two within ``gap`` seconds.
"""

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Hashable
from contextlib import contextmanager
from time import monotonic
from typing import Generic, TypeVar

import anyio
import attrs

GAP = 0.75
"""Seconds from the start of one call for an account to that of the next.

However many deliveries come, they cost less than 3 of the 20 requests that the account has in 2 s.
"""

Q = TypeVar("Q")
A = TypeVar("A")


@attrs.define(eq=False)
class _Question(Generic[Q, A]):
    content: Q
    answer: A | None = None
    gone: bool = False
    news: anyio.Event = attrs.field(factory=anyio.Event)


class Batch(Generic[Q, A]):
    """The questions about one account: one call at a time, and one more for those who came late.

    There is no task behind it: of those who wait, one makes the call for all. When it is canceled, the
    next one does.
    """

    def __init__(self) -> None:
        self._waiting: list[_Question[Q, A]] = []
        self._calling = False
        self._next_at = -math.inf  # by a clock that is the same in every event loop
        self._users = 0

    def is_idle(self) -> bool:
        """Whether nothing is lost by forgetting it."""
        return not self._users and monotonic() >= self._next_at

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keep it from being forgotten between two questions."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    async def ask(
        self, content: Q, until: float, call: Callable[[list[Q], float], Awaitable[list[A]]]
    ) -> A | None:
        """Return the answer of the next call; None if ``until``, on the event loop's clock, came first.

        ``call`` gets all that was asked, and the seconds that are left; it raises nothing but its
        cancellation, which leaves the others' questions to the next of them.
        """
        question: _Question[Q, A] = _Question(content)
        self._waiting.append(question)
        try:
            while question.answer is None and anyio.current_time() < until:
                if not self._calling:
                    await self._call(until, call)
                    continue
                with anyio.move_on_after(until - anyio.current_time()):
                    await question.news.wait()
                    question.news = anyio.Event()
        finally:
            question.gone = True
            if question in self._waiting:
                self._waiting.remove(question)
            self._pass_on()
        return question.answer

    async def _call(self, until: float, call: Callable[[list[Q], float], Awaitable[list[A]]]) -> None:
        """Make the next call, and answer all who wait when it begins."""
        self._calling = True
        batch: list[_Question[Q, A]] = []
        try:
            pause = min(self._next_at - monotonic(), until - anyio.current_time())
            if pause > 0:
                await anyio.sleep(pause)
            left = until - anyio.current_time()
            if left <= 0:
                return
            batch, self._waiting = self._waiting, []
            self._next_at = monotonic() + GAP
            answers = await call([question.content for question in batch], left)
            for question, answer in zip(batch, answers, strict=True):
                question.answer = answer
                question.news.set()
            batch = []
        finally:
            self._calling = False
            # Not empty if it was cut short: they are still to be answered, and before the others.
            self._waiting[:0] = [question for question in batch if not question.gone]

    def _pass_on(self) -> None:
        """Have somebody make the next call: whoever came last, as it has the most time left."""
        if self._waiting and not self._calling:
            self._waiting[-1].news.set()


class Batches(Generic[Q, A]):
    """The batches of many accounts; those that are idle are forgotten."""

    def __init__(self) -> None:
        self._batches: OrderedDict[Hashable, Batch[Q, A]] = OrderedDict()

    def of(self, key: Hashable) -> Batch[Q, A]:
        """Return the account's."""
        batch = self._batches.pop(key, None) or Batch[Q, A]()
        self._batches[key] = batch
        # Starting with the longest unlooked-at; two at once, so that there is no end to what is forgotten.
        for _ in range(2):
            oldest, candidate = next(iter(self._batches.items()))
            if candidate is not batch and candidate.is_idle():
                del self._batches[oldest]
            else:
                self._batches.move_to_end(oldest)
        return batch
