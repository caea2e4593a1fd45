"""The text form of times in a database."""

import sqlite3
from collections.abc import Iterator

import pytest

from lemcal_async import from_wire
from lemcal_async.models import Meeting
from lemcal_async.sync._drivers import Driver, driver_of


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """Provide a driver that never uses its database."""
    raw = sqlite3.connect(":memory:")
    yield driver_of(raw if request.param == "SQLite" else None)
    raw.close()


@pytest.mark.parametrize(
    "sent",
    [
        "2021-02-16T08:02:42.000Z",  # as the service sends them
        "2021-02-16T08:02:42.042Z",
        "0001-01-01T00:00:00.000Z",
        "2021-12-31T24:00:00.000Z",  # some versions of Python can read it
        "2021-02-16T08:02:42,042Z",  # other forms of the same length
        "20210216T080242.0421234Z",
        "2021-02-16T08:02+01:00:30",
        "2021-02-16T08:02:42.123456Z",  # more digits
        "2021-02-16T23:02:42.000-05:00",
        "2021-02-16T08:02Z",
        "2021-02-30T08:02:42.000Z",  # no such day
        None,
        24,
    ],
)
def test_time_text_is_independent_of_wire_form(sent: object, driver: Driver) -> None:
    """The text on the wire is only reused if it means the same."""
    time = from_wire({"_id": "mee_1", "start": sent}, Meeting).start
    assert driver.time(time) == driver.time(time, sent)
