"""Synchronizing more accounts than one process can, with workers on any number of machines.

``Fleet`` keeps its schedule, its leases and its outbox in the store's database, and hands turns to workers
through a queue. Any worker may die at any moment: nothing is lost, and the changes of an account stay in
order. It needs the extra ``fleet``.
"""

try:
    from lemcal_async.fleet._fleet import Fleet, FleetStatus
except ImportError as error:  # of the store, which names the extra sql
    if isinstance(error, ModuleNotFoundError):
        raise
    raise ImportError("a fleet needs its extra: pip install 'lemcal-async[fleet]'") from None
from lemcal_async.fleet._fleet import FleetWaker

__all__ = ["Fleet", "FleetStatus", "FleetWaker"]
