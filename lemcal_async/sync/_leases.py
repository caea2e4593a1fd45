"""Who holds an account of a fleet: taking, renewing and ending a lease, each in one statement.

On a driver's connection, as it is part of the hot path. Times are the database's clock, in seconds.
"""

from typing import Any, Final, TypeAlias

from lemcal_async.sync._drivers import Driver, driver_of
from lemcal_async.sync._store import Lease

SQL: TypeAlias = tuple[str, tuple[Any, ...]]
"""A piece of a statement, and the values of its parameters."""

_PENDING: Final = (
    "EXISTS (SELECT 1 FROM changes WHERE changes.user_id = accounts.user_id "
    "AND changes.delivered_at IS NULL AND changes.parked_at IS NULL)"
)


def acquire(raw: Any, user_id: str, token: str, seconds: float, claimed: float | None) -> Lease | None:
    """Hold an account that nobody holds; see ``Schedule.acquire``.

    Taking it and clearing its wakes is one statement: as two, a wake in between would be lost.
    """
    driver = driver_of(raw)
    is_its_turn, values = ("", ()) if claimed is None else (" AND (wanted OR due_at = ?)", (claimed,))
    found = driver.update_account(
        user_id,
        f"UPDATE accounts SET wanted = FALSE, lease_token = ?, lease_until = {driver.clock} + ?, "  # noqa: S608  # our names
        f'due_at = {driver.clock} + ? WHERE user_id = ? AND "interval" IS NOT NULL AND NOT paused '
        f"AND coalesce(lease_until, 0) <= {driver.clock}{is_its_turn}",
        (token, seconds, seconds, user_id, *values),
        f'"interval", failures, revision, {_PENDING}',
    )
    if found is None:
        return None
    interval, failures, revision, has_pending = found
    return Lease(user_id, token, interval, failures, revision, bool(has_pending))


def renew(raw: Any, lease: Lease, seconds: float) -> bool:
    """Hold an account longer; False if the lease has ended."""
    driver = driver_of(raw)
    until = f"{driver.clock} + ?"
    condition, token = held(driver, lease)
    statement = (
        f"UPDATE accounts SET lease_until = {until}, "  # noqa: S608  # our names
        f"due_at = CASE WHEN due_at IS NULL THEN NULL ELSE {until} END WHERE user_id = ?{condition}"
    )
    values = (seconds, seconds, lease.user_id, *token)
    return driver.update_account(lease.user_id, statement, values, "user_id") is not None


def end(raw: Any, lease: Lease, due_at: SQL, failures: str) -> bool:
    """Give an account back, due at some time; False if the lease had ended."""
    driver = driver_of(raw)
    settings, values = ended(due_at, failures)
    condition, token = held(driver, lease)
    statement = f"UPDATE accounts SET {settings} WHERE user_id = ?{condition}"  # noqa: S608  # our names
    values = (*values, lease.user_id, *token)
    return driver.update_account(lease.user_id, statement, values, "user_id") is not None


def held(driver: Driver, lease: Lease | None) -> SQL:
    """Return what an account's row must also be for its holder."""
    if lease is None:
        return "", ()
    return f" AND lease_token = ? AND lease_until > {driver.clock}", (lease.token,)


def ended(due_at: SQL, failures: str = "0") -> SQL:
    """Return the settings of an account that is given back."""
    when = f'CASE WHEN paused OR "interval" IS NULL THEN NULL ELSE {due_at[0]} END'
    return (
        f"lease_token = NULL, lease_until = NULL, failures = {failures}, due_at = {when}",
        due_at[1],
    )


def next_time(driver: Driver, spread: float) -> SQL:
    """Return when an account is due again: after its interval, or at once if it was woken meanwhile."""
    return f'CASE WHEN wanted THEN 0 ELSE {driver.clock} + "interval" * ? END', (spread,)
