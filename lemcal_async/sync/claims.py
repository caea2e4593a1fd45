"""The transactions of ``SQLStore`` for webhook deliveries: who may handle one, and that it was handled.

Each is a function of an open connection, as in ``statements.py``.
"""

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, delete, select, update

from lemcal_async.sync.schema import deliveries
from lemcal_async.sync.statements import insert_new


def claim(
    connection: Connection, user_id: str, meeting_id: str, clock: float, lease: float
) -> Literal["new", "busy", "done"]:
    """Claim a webhook delivery for so many seconds."""
    key = {"user_id": user_id, "meeting_id": meeting_id}
    if insert_new(connection, deliveries, {**key, "lease_until": clock + lease}):
        return "new"
    taken_over = connection.execute(
        update(deliveries)
        .where(*_delivery(user_id, meeting_id), deliveries.c.done_at.is_(None))
        .where(deliveries.c.lease_until <= clock)
        .values(lease_until=clock + lease)
    )
    if taken_over.rowcount == 1:
        return "new"
    done_at = connection.execute(select(deliveries.c.done_at).where(*_delivery(user_id, meeting_id))).scalar()
    return "busy" if done_at is None else "done"


def done(connection: Connection, user_id: str, meeting_id: str, at: datetime) -> None:
    """Remember that a webhook delivery was handled."""
    key = {"user_id": user_id, "meeting_id": meeting_id}
    insert_new(connection, deliveries, {**key, "lease_until": 0.0})  # it may have been pruned or forgotten
    connection.execute(update(deliveries).where(*_delivery(user_id, meeting_id)).values(done_at=at))


def release(connection: Connection, user_id: str, meeting_id: str) -> None:
    """Give a claim back, unless it is done."""
    connection.execute(
        delete(deliveries).where(*_delivery(user_id, meeting_id), deliveries.c.done_at.is_(None))
    )


def _delivery(user_id: str, meeting_id: str) -> tuple[Any, Any]:
    return deliveries.c.user_id == user_id, deliveries.c.meeting_id == meeting_id
