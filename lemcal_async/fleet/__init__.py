"""Synchronizes more accounts than one process can handle, with workers on any number of machines.

``Fleet`` keeps its schedule, leases and outbox in the store's database, and distributes turns to workers
through a queue. Workers may die at any moment: nothing is lost, and the changes of an account stay in order.
It requires the extra ``fleet``.
"""

try:
    from lemcal_async.fleet._fleet import Fleet, FleetStatus
except ImportError as error:  # from the store, whose message names the extra sql
    if isinstance(error, ModuleNotFoundError):
        raise
    raise ImportError("a fleet requires the extra fleet: pip install 'lemcal-async[fleet]'") from None
from lemcal_async.fleet._fleet import FleetWaker

__all__ = ["Fleet", "FleetStatus", "FleetWaker"]
