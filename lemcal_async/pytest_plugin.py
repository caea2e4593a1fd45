"""For those who test code that uses lemcal: the fixture ``lemcal_sandbox``, and a fresh rate limit per test.

Pytest imports this module in every run on a machine that has the package, so it imports nothing of the
SDK before a test needs it.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lemcal_async.sandbox import Sandbox


@pytest.fixture(autouse=True)
def _lemcal_fresh_rate_limit() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]  # pytest calls it
    """Keep the requests of one test from counting in the next; free for those who never use lemcal."""
    ratelimit = sys.modules.get("lemcal_async.ratelimit")
    if ratelimit is None:
        yield
        return
    with ratelimit.fresh_default():
        yield


@pytest.fixture
def lemcal_sandbox() -> "Iterator[Sandbox]":
    """Serve a sandbox of the test's own: ``lemcal_sandbox.client()`` is a client for it.

    It needs the extra ``sandbox``, and no account at lemcal.
    """
    from lemcal_async.ratelimit import fresh_default  # noqa: PLC0415  # see above
    from lemcal_async.sandbox import Sandbox  # noqa: PLC0415  # see above

    with fresh_default(), Sandbox().serve() as sandbox:
        yield sandbox
