"""Keep a database up to date with the booked meetings of one or many accounts, and react to changes.

``sync_meetings`` runs once, ``watch`` repeatedly. ``SQLStore`` persists the meetings and the changes; it
requires the extra ``sql``, which is imported on first use. ``MemoryStore`` is for tests. See ``docs/sync.md``
for a guide.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lemcal_async.errors import EmptyListError, StoreError
from lemcal_async.sync._diff import Counts, Kind
from lemcal_async.sync._memory import MemoryStore
from lemcal_async.sync._report import Failure, SyncReport, UnreadableRow
from lemcal_async.sync._runner import sync_meetings
from lemcal_async.sync._store import Applied, Change, Forgotten, Store
from lemcal_async.sync._watch import Wake, watch

if TYPE_CHECKING:
    from lemcal_async.sync.sql import SQLStore

__all__ = [
    "Applied",
    "Change",
    "Counts",
    "EmptyListError",
    "Failure",
    "Forgotten",
    "Kind",
    "MemoryStore",
    "SQLStore",
    "Store",
    "StoreError",
    "SyncReport",
    "UnreadableRow",
    "Wake",
    "sync_meetings",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name != "SQLStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = import_module(f"{__name__}.sql").SQLStore
    globals()[name] = value  # later lookups skip this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
