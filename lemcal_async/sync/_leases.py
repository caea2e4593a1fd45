"""Leases on the accounts of a fleet: acquiring, renewing and ending one, each in one statement.

Uses the driver's connection, since it is part of the hot path. Times are seconds on the database's clock.
"""

from typing import Any, Final, TypeAlias

from lemcal_async.sync._drivers import Driver, driver_of
from lemcal_async.sync._store import Lease

SQL: TypeAlias = tuple[str, tuple[Any, ...]]
"""A part of a statement, and the values of its parameters."""

_PENDING: Final = (
    "EXISTS (SELECT 1 FROM changes WHERE changes.user_id = accounts.user_id "
    "AND changes.delivered_at IS NULL AND changes.parked_at IS NULL)"
)


def acquire(raw: Any, user_id: str, token: str, seconds: float, claimed: float | None) -> Lease | None:
    """Acquire the lease on an account that is not held; see ``Schedule.acquire``.

    The same statement clears the account's wakes: with two, a wake in between would be lost.
    """
    driver = driver_of(raw)
    claim_condition, values = ("", ()) if claimed is None else (" AND (wanted OR due_at = ?)", (claimed,))
    found = driver.update_account(
        user_id,
        f"UPDATE accounts SET wanted = FALSE, lease_token = ?, lease_until = {driver.clock} + ?, "  # noqa: S608  # constant names
        f'due_at = {driver.clock} + ? WHERE user_id = ? AND "interval" IS NOT NULL AND NOT paused '
        f"AND coalesce(lease_until, 0) <= {driver.clock}{claim_condition}",
        (token, seconds, seconds, user_id, *values),
        f'"interval", failures, revision, {_PENDING}',
    )
    if found is None:
        return None
    interval, failures, revision, has_pending = found
    return Lease(user_id, token, interval, failures, revision, bool(has_pending))


def renew(raw: Any, lease: Lease, seconds: float) -> bool:
    """Extend a lease; return False if it has ended."""
    driver = driver_of(raw)
    until = f"{driver.clock} + ?"
    condition, token = held(driver, lease)
    statement = (
        f"UPDATE accounts SET lease_until = {until}, "  # noqa: S608  # constant names
        f"due_at = CASE WHEN due_at IS NULL THEN NULL ELSE {until} END WHERE user_id = ?{condition}"
    )
    values = (seconds, seconds, lease.user_id, *token)
    return driver.update_account(lease.user_id, statement, values, "user_id") is not None


def end(raw: Any, lease: Lease, due_at: SQL, failures: str) -> bool:
    """End a lease and make the account due at some time; return False if the lease had ended."""
    driver = driver_of(raw)
    settings, values = ended(due_at, failures)
    condition, token = held(driver, lease)
    statement = f"UPDATE accounts SET {settings} WHERE user_id = ?{condition}"  # noqa: S608  # constant names
    values = (*values, lease.user_id, *token)
    return driver.update_account(lease.user_id, statement, values, "user_id") is not None


def held(driver: Driver, lease: Lease | None) -> SQL:
    """Return the SQL condition that the lease has not ended."""
    if lease is None:
        return "", ()
    return f" AND lease_token = ? AND lease_until > {driver.clock}", (lease.token,)


def ended(due_at: SQL, failures: str = "0") -> SQL:
    """Return the SQL assignments that end the lease on an account."""
    when = f'CASE WHEN paused OR "interval" IS NULL THEN NULL ELSE {due_at[0]} END'
    return (
        f"lease_token = NULL, lease_until = NULL, failures = {failures}, due_at = {when}",
        due_at[1],
    )


def next_time(driver: Driver, spread: float) -> SQL:
    """Return when an account is due again: after its interval, or immediately if it was woken."""
    return f'CASE WHEN wanted THEN 0 ELSE {driver.clock} + "interval" * ? END', (spread,)
