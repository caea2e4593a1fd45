"""Finding a meeting in its account's list. The service has no call for a single meeting.

Each delivery would cost a list, so those that come in together share one. An answer is only given by a call
that began after the question was asked: an older one may not know what the question is about. One call at a
time, and never two within ``GAP`` seconds. Wake-ups are shared in the same way.
"""

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Hashable
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Final, Generic, TypeAlias, TypeVar

import anyio
import attrs

from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import from_wire
from lemcal_async.errors import LemcalError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._http import Verify

GAP = 0.75
"""Seconds from the start of one call for an account to that of the next.

However many deliveries come, they cost less than 3 of the 20 requests that the account has in 2 s.
"""

EMPTY_LIST_DOUBT = 300.0
"""Seconds for which the list of an account that had meetings must stay empty to be believed."""
_MAX_KNOWN: Final = 100_000  # accounts; some 100 bytes each


@attrs.frozen
class Missing:
    """The meeting is not in the list, or not in the part of it that was looked at."""


@attrs.frozen
class Unavailable:
    """Nobody can say: the list could not be had. ``reason`` is fit for a log, times are in seconds."""

    reason: str
    retry_after: float | None = None


Finding: TypeAlias = Meeting | Missing | Unavailable


class Lookups:
    """Looks for the meetings of many accounts.

    They are told apart by their credentials: whoever has a wrong key for another's account shares
    nothing with its owner.
    """

    def __init__(self) -> None:
        self._batches = Batches[Verify, Finding]()
        # Accounts whose list had meetings; since when it is empty, if it is.
        self._known: OrderedDict[Hashable, float | None] = OrderedDict()

    async def find(
        self, lemcal: AsyncLemcal, wanted: Verify, until: float, list_lag: float | None
    ) -> Finding:
        """Look for a meeting, three times within ``list_lag`` seconds: the list may lag behind a booking.

        With None it is looked for once. ``until`` is a moment on the event loop's clock. Raises nothing but
        its cancellation.
        """
        try:
            key = lemcal.rate_limit_key
        except Exception as error:  # noqa: BLE001 - of the function that gives the API key
            return Unavailable(type(error).__name__)
        batch = self._batches.of(key)
        fetch = partial(self._fetch, key, lemcal)
        with batch.in_use():
            began = anyio.current_time()
            finding = await _ask(batch, wanted, until, fetch)
            for moment in () if list_lag is None else (began + list_lag / 3, began + list_lag):
                if not isinstance(finding, Missing):
                    break
                await anyio.sleep_until(moment)
                # In the whole list from now on: the type may have been a lie.
                finding = await _ask(batch, Verify(wanted.meeting_id), until, fetch)
            return finding

    async def _fetch(
        self, key: Hashable, lemcal: AsyncLemcal, wanted: list[Verify], seconds: float
    ) -> list[Finding]:
        """Fetch the list, and look for meetings in it."""
        # One type is all that it takes to answer them all: a long list is the dearest part.
        types = {each.meeting_type_id for each in wanted}
        only = types.pop() if len(types) == 1 else None
        view = lemcal.with_options(deadline=seconds, priority="interactive")
        try:
            rows = await view.meetings.rows(only)
        except LemcalError as error:
            retry_after: float | None = getattr(error, "retry_after", None)
            return [Unavailable(str(error), retry_after)] * len(wanted)
        except Exception as error:  # noqa: BLE001 - of the function that gives the API key, say
            return [Unavailable(type(error).__name__)] * len(wanted)
        if only is None and self._is_doubtful(key, rows):
            return [Unavailable("the list is empty, and was not before")] * len(wanted)
        ids = {each.meeting_id for each in wanted}
        found = {id_: row for row in reversed(rows) if (id_ := _id_of(row)) in ids}
        return [_read(found.get(each.meeting_id)) for each in wanted]

    def _is_doubtful(self, key: Hashable, rows: list[Any]) -> bool:
        """Whether an empty list is more likely a fault of the service than the truth."""
        known = self._known
        if rows:
            known[key] = None
            known.move_to_end(key)
            if len(known) > _MAX_KNOWN:
                known.popitem(last=False)
            return False
        if key not in known:
            return False
        now = monotonic()
        since = known[key] = known[key] or now
        if now - since < EMPTY_LIST_DOUBT:
            return True
        del known[key]
        return False


async def _ask(batch: "Batch[Verify, Finding]", wanted: Verify, until: float, fetch: Any) -> Finding:
    finding = await batch.ask(wanted, until, fetch)
    return Unavailable("the list did not come in time") if finding is None else finding


def _id_of(row: Any) -> str | None:
    id_ = row.get("_id") if isinstance(row, dict) else None  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    return id_ if isinstance(id_, str) else None


def _read(row: Any) -> Finding:
    return Missing() if row is None else from_wire(row, Meeting)  # with its id, it can be read


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
