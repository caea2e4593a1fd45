"""Finding a meeting in its account's list. The service has no call for a single meeting.

Each delivery would cost a list, so those that come in together share one; see ``_batch.py``.
"""

from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from time import monotonic
from typing import Any, Final, TypeAlias

import anyio
import attrs

from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import from_wire
from lemcal_async.errors import LemcalError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._batch import Batch, Batches
from lemcal_async.webhooks._http import Verify

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


async def _ask(batch: Batch[Verify, Finding], wanted: Verify, until: float, fetch: Any) -> Finding:
    finding = await batch.ask(wanted, until, fetch)
    return Unavailable("the list did not come in time") if finding is None else finding


def _id_of(row: Any) -> str | None:
    id_ = row.get("_id") if isinstance(row, dict) else None  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    return id_ if isinstance(id_, str) else None


def _read(row: Any) -> Finding:
    return Missing() if row is None else from_wire(row, Meeting)  # with its id, it can be read
