"""The recipes of the documentation, on a store with meetings of every status and with unusual values."""

import gc
import re
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from lemcal_async.sync import SQLStore

from .conftest import Database

TIME_ZONES = {(None, 5), ("Europe/Paris", 1), ("a\ufffc0000b", 1)}
DOCS = Path(__file__).parents[2] / "docs"
USER = "usr_1"


def row(meeting_id: str, start: Any, kind: str = "Demo", **fields: Any) -> dict[str, Any]:
    """Return a wire row."""
    created = "2026-01-01T08:00:00.000Z"
    return {"_id": meeting_id, "start": start, "meetingTypeName": kind, "createdAt": created, **fields}


async def fill(url: str) -> None:
    """Store four booked meetings (two with unusual values), two canceled, one disappeared, two pruned."""
    rows = [
        row("mee_booked", "2026-02-02T08:00:00.000Z", timezone="Europe/Paris"),
        row(
            "mee_late", "2026-02-11T08:00:00.000Z", surveyAnswers=[{"question": "Size?", "answer": ["5", 7]}]
        ),
        row("mee_odd", "some day", attendees=[None, {"primary": 1}], eventId=5),
        {"_id": "mee_bare"},
        row("mee_canceled", "2026-02-03T08:00:00.000Z", canceledAt="2026-01-05T08:00:00.000Z"),
        row("mee_other", "2026-02-04T08:00:00.000Z", "Intro", canceledAt="2026-01-05T08:00:00.000Z"),
        row("mee_gone", "2026-02-05T08:00:00.000Z", timezone="a\0b"),
        row("mee_old", "2025-01-05T08:00:00.000Z", questions=[{"question": "?", "answer": "!"}]),
        row("mee_older", "2025-01-04T08:00:00.000Z", canceledAt="2025-01-03T08:00:00.000Z"),
    ]
    async with SQLStore(url) as store:
        for revision, listed in enumerate([rows, [r for r in rows if r["_id"] != "mee_gone"]]):
            await store.apply(USER, revision, listed, baseline=False, confirm_empty_after=2)
        erased = await store.prune(before=datetime(2026, 1, 1, tzinfo=UTC))
        assert 2 == erased.meetings


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def run(code: list[str]) -> dict[str, Any]:
    """Run Python code blocks one after the other, and return the names that they define."""
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    return names


def close_leaked_connections(names: dict[str, Any]) -> None:
    """Collect the connections that pandas and SQLAlchemy leave to the garbage collector."""
    names.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_data_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned meetings do not count; unusual values only matter where they are used."""
    monkeypatch.chdir(tmp_path)
    anyio.run(fill, "sqlite:///lemcal.db")
    names = run([code for code in blocks("data-analysis.md", "python") if "await" not in code])
    assert {"Demo": 4, "Intro": 1} == names["per_week"].sum().to_dict()
    assert {"Demo": 2 / 5, "Intro": 1.0} == names["lost"].to_dict()
    assert 34 == names["lead_time"]
    assert {(None, 1, 0.0), ("Demo", 5, 2 / 5), ("Intro", 1, 1.0)} == set(names["lost_by_type"].rows())
    assert [("mee_late", "Size?", ["5", 7])] == [tuple(answer.values()) for answer in names["answers"]]
    close_leaked_connections(names)


def test_data_analysis_on_postgresql(postgresql_database: Database) -> None:
    """The same queries, except for the block that uses the sqlite3 module."""
    anyio.run(fill, postgresql_database.url)
    url = re.sub("^postgresql:", "postgresql+psycopg:", postgresql_database.url)
    code = [code.replace("sqlite:///lemcal.db", url) for code in blocks("data-analysis.md", "python")]
    names = run([code for code in code if "await" not in code and "import sqlite3" not in code])
    assert {"Demo": 4, "Intro": 1} == names["per_week"].sum().to_dict()
    assert {"Demo": 2 / 5, "Intro": 1.0} == names["lost"].to_dict()
    assert {(None, 1, 0.0), ("Demo", 5, 2 / 5), ("Intro", 1, 1.0)} == set(names["lost_by_type"].rows())
    close_leaked_connections(names)


def test_sql(postgresql_database: Database) -> None:
    """Each query of the pages: weeks and types, and a field without a column."""
    anyio.run(fill, postgresql_database.url)
    (weeks, _), (days, zones, _) = (blocks(page, "sql") for page in ("sync.md", "data-analysis.md"))
    found = [(week and week.day, *rest) for week, *rest in postgresql_database.query(weeks)]
    assert [
        (2, "Demo", 1, 2), (2, "Intro", 0, 1), (9, "Demo", 1, 0), (None, "Demo", 1, 0), (None, None, 1, 0),
    ] == found  # fmt: skip
    assert TIME_ZONES == set(postgresql_database.query(zones))
    days_in_paris = [(day and day.day, count) for day, count in postgresql_database.query(days)]
    assert [(2, 1), (11, 1), (None, 2)] == days_in_paris


def test_sql_on_sqlite(sqlite_database: Database) -> None:
    """The same, in SQLite's dialect."""
    anyio.run(fill, sqlite_database.url)
    (_, weeks), (_, _, zones) = (blocks(page, "sql") for page in ("sync.md", "data-analysis.md"))
    assert [
        (None, None, 1, 0), (None, "Demo", 1, 0),
        ("2026-02-02", "Demo", 1, 2), ("2026-02-02", "Intro", 0, 1), ("2026-02-09", "Demo", 1, 0),
    ] == sqlite_database.query(weeks)  # fmt: skip
    assert TIME_ZONES == set(sqlite_database.query(zones))
