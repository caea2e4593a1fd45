"""Finding meetings in an account's list, where many who ask at once share one list call.

The service has no call for a single meeting, so each delivery costs a list: here all those that wait
are answered by the next one. An answer is only given by a call that began after the question was
asked, because an older one may not know the booking yet.
"""

import math
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import attrs

from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import from_wire
from lemcal_async.errors import LemcalError, ResponseDecodeError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._http import Verify

if TYPE_CHECKING:
    from lemcal_async.ratelimit import Key

GAP: Final = 0.75
"""Seconds from the start of one list call of an account to that of the next.

However many deliveries come, they cost less than 3 of the 20 requests that the account has in 2 s.
"""


@attrs.frozen
class Missing:
    """The meeting is not in the list, or not in the part of it that was looked at."""


@attrs.frozen
class Unavailable:
    """Nobody can say: the list could not be had. ``reason`` is fit for a log, times are in seconds."""

    reason: str
    retry_after: float | None = None


Finding: TypeAlias = Meeting | Missing | Unavailable


@attrs.define(eq=False)
class _Question:
    wanted: Verify
    finding: Finding | None = None
    gone: bool = False
    news: anyio.Event = attrs.field(factory=anyio.Event)


class Lookup:
    """The questions about one account: one list call at a time, and one more for those who came late.

    There is no task behind it: of those who wait, one makes the call for all. When it is cancelled,
    the next one does.
    """

    def __init__(self) -> None:
        self._waiting: list[_Question] = []
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

    async def find(self, lemcal: AsyncLemcal, wanted: Verify, until: float) -> Finding:
        """Look for a meeting, until a moment on the event loop's clock.

        Raises nothing but the cancellation, which leaves the others' questions to the next of them.
        """
        question = _Question(wanted)
        self._waiting.append(question)
        try:
            while question.finding is None and anyio.current_time() < until:
                if not self._calling:
                    await self._call(lemcal, until)
                    continue
                with anyio.move_on_after(until - anyio.current_time()):
                    await question.news.wait()
                    question.news = anyio.Event()
        finally:
            question.gone = True
            if question in self._waiting:
                self._waiting.remove(question)
            self._pass_on()
        return question.finding or Unavailable("the list did not come in time")

    async def _call(self, lemcal: AsyncLemcal, until: float) -> None:
        """Make the next list call, and answer all who wait when it begins."""
        self._calling = True
        batch: list[_Question] = []
        try:
            pause = min(self._next_at - monotonic(), until - anyio.current_time())
            if pause > 0:
                await anyio.sleep(pause)
            left = until - anyio.current_time()
            if left <= 0:
                return
            batch, self._waiting = self._waiting, []
            self._next_at = monotonic() + GAP
            findings = await _list(lemcal, [question.wanted for question in batch], left)
            for question, finding in zip(batch, findings, strict=True):
                question.finding = finding
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


async def _list(lemcal: AsyncLemcal, wanted: list[Verify], seconds: float) -> list[Finding]:
    """Fetch the list, and look for meetings in it."""
    # One type is all that it takes to answer them all: a long list is the dearest part.
    types = {each.meeting_type_id for each in wanted}
    only = types.pop() if len(types) == 1 else None
    view = lemcal.with_options(deadline=seconds, priority="interactive")
    try:
        rows = await view.meetings.rows(only)
    except LemcalError as error:
        status = "" if error.status_code is None else f" {error.status_code}"
        retry_after: float | None = getattr(error, "retry_after", None)
        return [Unavailable(f"{type(error).__name__}{status}", retry_after)] * len(wanted)
    except Exception as error:  # noqa: BLE001 - of the function that gives the API key, say
        return [Unavailable(type(error).__name__)] * len(wanted)
    ids = {each.meeting_id for each in wanted}
    found = {id_: row for row in reversed(rows) if (id_ := _id_of(row)) in ids}
    return [_read(found.get(each.meeting_id)) for each in wanted]


def _id_of(row: Any) -> str | None:
    id_ = row.get("_id") if isinstance(row, dict) else None  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    return id_ if isinstance(id_, str) else None


def _read(row: Any) -> Finding:
    if row is None:
        return Missing()
    try:
        return from_wire(row, Meeting)
    except ResponseDecodeError as error:
        return Unavailable(type(error).__name__)


class Lookups:
    """The lookups of many accounts; those that are idle are forgotten.

    They are told apart by their credentials: whoever has a wrong key for another's account shares
    nothing with its owner.
    """

    def __init__(self) -> None:
        self._lookups: OrderedDict[Key, Lookup] = OrderedDict()

    def of(self, lemcal: AsyncLemcal) -> Lookup:
        """Return the account's lookup."""
        key = lemcal.rate_limit_key
        lookup = self._lookups.pop(key, None) or Lookup()
        self._lookups[key] = lookup
        # Starting with the longest unlooked-at; two at once, so that there is no end to what is forgotten.
        for _ in range(2):
            oldest, candidate = next(iter(self._lookups.items()))
            if candidate is not lookup and candidate.is_idle():
                del self._lookups[oldest]
            else:
                self._lookups.move_to_end(oldest)
        return lookup
