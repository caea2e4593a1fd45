"""Import time, relative to importing the dependencies alone, and the optional packages that it loads."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.table import Measurement, alternate, main

DEPENDENCIES = "import httpx, attrs, cattrs, anyio, tenacity"
OPTIONAL = (
    "coredis", "fastapi", "httpcore2", "httpx2", "opentelemetry", "orjson", "psycopg", "rich", "sqlalchemy",
    "starlette", "trio", "typer", "uvicorn",
)  # fmt: skip
ROUNDS = 15


def seconds(statement: str) -> float:
    """Return the seconds for an import in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def optional_packages_loaded() -> list[str]:
    """Return the optional packages that importing the client loads."""
    # httpx itself loads rich if it is installed, for its command line.
    code = (
        f"{DEPENDENCIES}; import sys, json; before = set(sys.modules); from lemcal_async import AsyncLemcal; "
        f"print(json.dumps([name for name in {OPTIONAL!r} if name in set(sys.modules) - before]))"
    )
    found: list[str] = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )
    return found


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    statements = ("import lemcal_async", "from lemcal_async import AsyncLemcal", "from lemcal_async import *")
    taken = alternate(
        ROUNDS,
        {each: functools.partial(seconds, each) for each in (DEPENDENCIES, *statements)},
    )
    theirs = taken[DEPENDENCIES]
    yield Measurement("import: the dependencies alone", theirs * 1e3, "ms")
    for each in statements:
        bound = 1.15 if each == statements[0] else None
        yield Measurement(f"import: {each} / the dependencies", taken[each] / theirs, "x", bound)
    loaded = optional_packages_loaded()
    yield Measurement("import: optional packages loaded", len(loaded), "", 0, note=", ".join(loaded))


if __name__ == "__main__":
    main(measure)
