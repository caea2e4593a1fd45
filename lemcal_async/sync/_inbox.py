"""The statements that deduplicate webhook deliveries: who handles one, and which were handled.

Each function runs in the transaction of an open connection.
"""

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, delete, select, update

from lemcal_async.sync._clock import clock
from lemcal_async.sync._statements import insert_new
from lemcal_async.sync._tables import deliveries


def claim(
    connection: Connection, user_id: str, meeting_id: str, lease: float
) -> Literal["new", "busy", "done"]:
    """Claim a delivery for so many seconds."""
    now = clock(connection)
    if insert_new(connection, deliveries, {**_key(user_id, meeting_id), "lease_until": now + lease}):
        return "new"
    expired = (
        update(deliveries)
        .where(*_is(user_id, meeting_id), deliveries.c.done_at.is_(None), deliveries.c.lease_until <= now)
        .values(lease_until=now + lease)
    )
    if connection.execute(expired).rowcount == 1:
        return "new"
    done_at = connection.execute(select(deliveries.c.done_at).where(*_is(user_id, meeting_id))).scalar()
    return "busy" if done_at is None else "done"


def done(connection: Connection, user_id: str, meeting_id: str, at: datetime) -> None:
    """Remember that a delivery was handled."""
    # It may have been pruned or forgotten meanwhile.
    insert_new(connection, deliveries, {**_key(user_id, meeting_id), "lease_until": 0.0})
    connection.execute(update(deliveries).where(*_is(user_id, meeting_id)).values(done_at=at))


def release(connection: Connection, user_id: str, meeting_id: str) -> None:
    """Give a claim back, unless its delivery was handled."""
    connection.execute(delete(deliveries).where(*_is(user_id, meeting_id), deliveries.c.done_at.is_(None)))


def _key(user_id: str, meeting_id: str) -> dict[str, Any]:
    return {"user_id": user_id, "meeting_id": meeting_id}


def _is(user_id: str, meeting_id: str) -> tuple[Any, Any]:
    return deliveries.c.user_id == user_id, deliveries.c.meeting_id == meeting_id
