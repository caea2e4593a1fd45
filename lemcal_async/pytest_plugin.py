"""A pytest plugin for code that uses lemcal: the fixture ``lemcal_sandbox``, and a fresh rate limit per test.

Wherever the package is installed, every pytest run imports this module, so it imports the rest of the SDK
only when a test needs it.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lemcal_async.sandbox import Sandbox


@pytest.fixture(autouse=True)
def _lemcal_fresh_rate_limit() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]  # pytest calls it
    """Keep one test's requests from counting in the next test. Costs nothing if lemcal is not imported."""
    ratelimit = sys.modules.get("lemcal_async.ratelimit")
    if ratelimit is None:
        yield
        return
    with ratelimit.fresh_default():
        yield


@pytest.fixture
def lemcal_sandbox() -> "Iterator[Sandbox]":
    """Serve a sandbox for this test; ``lemcal_sandbox.client()`` returns a client for it.

    Requires the ``sandbox`` extra, but no lemcal account.
    """
    from lemcal_async.ratelimit import fresh_default  # noqa: PLC0415  # see above
    from lemcal_async.sandbox import Sandbox  # noqa: PLC0415  # see above

    with fresh_default(), Sandbox().serve() as sandbox:
        yield sandbox
