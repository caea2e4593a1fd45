"""Finds meetings in their account's list, because the service has no call for a single meeting.

Concurrent lookups share a list call. A lookup only uses the result of a call that began after the lookup,
because an older list may lack the meeting. Calls for an account run one at a time and start at least ``GAP``
seconds apart. Wake-ups are batched in the same way.
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
from lemcal_async.webhooks._http import MeetingRef

GAP = 0.75
"""Minimum seconds between the starts of two calls for an account.

However many deliveries arrive, they use fewer than 3 of the account's 20 requests per 2 s.
"""

EMPTY_LIST_TRUSTED_AFTER = 300.0
"""Seconds for which the list of an account with meetings must stay empty before that is trusted."""
_MAX_ACCOUNTS: Final = 100_000  # in memory, about 100 bytes each


@attrs.frozen
class Missing:
    """The meeting is not in the list, or not in the part that was fetched."""


@attrs.frozen
class Unavailable:
    """The list could not be fetched. ``reason`` is safe to log; ``retry_after`` is in seconds."""

    reason: str
    retry_after: float | None = None


LookupResult: TypeAlias = Meeting | Missing | Unavailable


class Lookups:
    """Looks up meetings of many accounts.

    Accounts are distinguished by their credentials, so a client with a wrong key for an account shares no
    list call with the owner's client.
    """

    def __init__(self) -> None:
        self._batchers = Batchers[MeetingRef, LookupResult]()
        # Accounts whose list had meetings, and when it was first seen empty; None if it is not empty.
        self._empty_since: OrderedDict[Hashable, float | None] = OrderedDict()

    async def find(
        self, lemcal: AsyncLemcal, wanted: MeetingRef, until: float, list_lag: float | None
    ) -> LookupResult:
        """Look up a meeting up to three times within ``list_lag`` seconds, because the list may lag.

        If ``list_lag`` is None, look it up once. ``until`` is a deadline on the event loop's clock. Raises
        nothing except when canceled.
        """
        try:
            key = lemcal.rate_limit_key
        except Exception as error:  # noqa: BLE001 - the api_key function may raise anything
            return Unavailable(type(error).__name__)
        batcher = self._batchers.get(key)
        fetch = partial(self._fetch, key, lemcal)
        with batcher.in_use():
            began = anyio.current_time()
            result = await _submit(batcher, wanted, until, fetch)
            for moment in () if list_lag is None else (began + list_lag / 3, began + list_lag):
                if not isinstance(result, Missing):
                    break
                await anyio.sleep_until(moment)
                # Search the whole list from now on: the type may be forged.
                result = await _submit(batcher, MeetingRef(wanted.meeting_id), until, fetch)
            return result

    async def _fetch(
        self, key: Hashable, lemcal: AsyncLemcal, wanted: list[MeetingRef], seconds: float
    ) -> list[LookupResult]:
        """Fetch the list and find the wanted meetings in it."""
        # If all name one type, fetch only its meetings: a long list is the most expensive part.
        types = {each.meeting_type_id for each in wanted}
        meeting_type_id = types.pop() if len(types) == 1 else None
        view = lemcal.with_options(deadline=seconds, priority="interactive")
        try:
            rows = await view.meetings.rows(meeting_type_id)
        except LemcalError as error:
            retry_after: float | None = getattr(error, "retry_after", None)
            return [Unavailable(str(error), retry_after)] * len(wanted)
        except Exception as error:  # noqa: BLE001 - for example from the api_key function
            return [Unavailable(type(error).__name__)] * len(wanted)
        if meeting_type_id is None and self._is_doubtful(key, rows):
            return [Unavailable("the list is empty, but was not before")] * len(wanted)
        ids = {each.meeting_id for each in wanted}
        found = {id_: row for row in reversed(rows) if (id_ := _id_of(row)) in ids}
        return [_read(found.get(each.meeting_id)) for each in wanted]

    def _is_doubtful(self, key: Hashable, rows: list[Any]) -> bool:
        """Whether an empty list is more likely a fault of the service than accurate."""
        empty_since = self._empty_since
        if rows:
            empty_since[key] = None
            empty_since.move_to_end(key)
            if len(empty_since) > _MAX_ACCOUNTS:
                empty_since.popitem(last=False)
            return False
        if key not in empty_since:
            return False
        now = monotonic()
        since = empty_since[key] = empty_since[key] or now
        if now - since < EMPTY_LIST_TRUSTED_AFTER:
            return True
        del empty_since[key]
        return False


async def _submit(
    batcher: "Batcher[MeetingRef, LookupResult]", wanted: MeetingRef, until: float, fetch: Any
) -> LookupResult:
    result = await batcher.submit(wanted, until, fetch)
    return Unavailable("the list did not arrive in time") if result is None else result


def _id_of(row: Any) -> str | None:
    id_ = row.get("_id") if isinstance(row, dict) else None  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    return id_ if isinstance(id_, str) else None


def _read(row: Any) -> LookupResult:
    return Missing() if row is None else from_wire(row, Meeting)  # a row with an id always decodes


RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")


@attrs.define(eq=False)
class _Waiter(Generic[RequestT, ResultT]):
    request: RequestT
    result: ResultT | None = None
    has_left: bool = False
    wakeup: anyio.Event = attrs.field(factory=anyio.Event)


class Batcher(Generic[RequestT, ResultT]):
    """Batches the requests of one account: one call at a time, and the next one for later arrivals.

    There is no background task: one of the waiters makes the call for all. If that waiter is canceled,
    another one takes over.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiter[RequestT, ResultT]] = []
        self._is_calling = False
        self._next_at = -math.inf  # on the monotonic clock, which all event loops share
        self._users = 0

    def is_idle(self) -> bool:
        """Whether the batcher can be dropped without losing anything."""
        return not self._users and monotonic() >= self._next_at

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keep the batcher from being dropped between two requests."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    async def submit(
        self,
        request: RequestT,
        until: float,
        call: Callable[[list[RequestT], float], Awaitable[list[ResultT]]],
    ) -> ResultT | None:
        """Return the result of the next call, or None after ``until`` on the event loop's clock.

        ``call`` receives all waiting requests and the remaining seconds. It raises nothing except when
        canceled, and then another waiter repeats the call.
        """
        waiter: _Waiter[RequestT, ResultT] = _Waiter(request)
        self._waiting.append(waiter)
        try:
            while waiter.result is None and anyio.current_time() < until:
                if not self._is_calling:
                    await self._call(until, call)
                    continue
                with anyio.move_on_after(until - anyio.current_time()):
                    await waiter.wakeup.wait()
                    waiter.wakeup = anyio.Event()
        finally:
            waiter.has_left = True
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            self._wake_next()
        return waiter.result

    async def _call(
        self, until: float, call: Callable[[list[RequestT], float], Awaitable[list[ResultT]]]
    ) -> None:
        """Make the next call, and set the result of every request that waits when it begins."""
        self._is_calling = True
        batch: list[_Waiter[RequestT, ResultT]] = []
        try:
            pause = min(self._next_at - monotonic(), until - anyio.current_time())
            if pause > 0:
                await anyio.sleep(pause)
            remaining = until - anyio.current_time()
            if remaining <= 0:
                return
            batch, self._waiting = self._waiting, []
            self._next_at = monotonic() + GAP
            results = await call([waiter.request for waiter in batch], remaining)
            for waiter, result in zip(batch, results, strict=True):
                waiter.result = result
                waiter.wakeup.set()
            batch = []
        finally:
            self._is_calling = False
            # If the call was canceled, its requests go back to the front.
            self._waiting[:0] = [waiter for waiter in batch if not waiter.has_left]

    def _wake_next(self) -> None:
        """Have the last waiter make the next call, because it has the most time left."""
        if self._waiting and not self._is_calling:
            self._waiting[-1].wakeup.set()


class Batchers(Generic[RequestT, ResultT]):
    """The batchers of many accounts; idle ones are dropped."""

    def __init__(self) -> None:
        self._batchers: OrderedDict[Hashable, Batcher[RequestT, ResultT]] = OrderedDict()

    def get(self, key: Hashable) -> Batcher[RequestT, ResultT]:
        """Return the batcher of an account, and create it if needed."""
        batcher = self._batchers.pop(key, None) or Batcher[RequestT, ResultT]()
        self._batchers[key] = batcher
        # Check the two least recently checked: each call adds at most one, so idle ones do not pile up.
        for _ in range(2):
            oldest, candidate = next(iter(self._batchers.items()))
            if candidate is not batcher and candidate.is_idle():
                del self._batchers[oldest]
            else:
                self._batchers.move_to_end(oldest)
        return batcher
