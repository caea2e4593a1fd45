"""When a client can be created, used and closed, and what it closes."""

import gc
import os
import subprocess
import sys
import warnings

import anyio
import httpx
import pytest

from lemcal_async import AsyncLemcal
from lemcal_async.errors import APIConnectionError, AuthenticationError, ConfigurationError
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox, faults

from .conftest import KEY, ONCE, USER_ID, Wire, unused_base_url, wait_for_requests

BACKENDS = ["asyncio", "trio"]

created_at_import_time = {
    backend: AsyncLemcal(USER_ID, KEY, base_url=unused_base_url(), retry=ONCE) for backend in BACKENDS
}


@pytest.mark.anyio
async def test_aclose_is_idempotent(lemcal_sandbox: Sandbox) -> None:
    """``aclose`` can be called again, also after the ``async with`` block."""
    lemcal = lemcal_sandbox.client()
    async with lemcal as entered:
        assert lemcal is entered
        await lemcal.me()
    await lemcal.aclose()
    await lemcal.aclose()


@pytest.mark.anyio
async def test_without_async_with(lemcal_sandbox: Sandbox) -> None:
    """A client can be created, used and closed without ``async with``."""
    lemcal = lemcal_sandbox.client()
    assert lemcal_sandbox.user_id == (await lemcal.me()).id
    await lemcal.aclose()
    with pytest.raises(ConfigurationError, match="nothing was sent: this client"):
        await lemcal.me()
    with pytest.raises(ConfigurationError, match="nothing was sent: this client"):
        await lemcal.request("GET", "/me")
    assert 1 == len(lemcal_sandbox.requests)


@pytest.mark.anyio
async def test_close_an_unused_client() -> None:
    """Closing an unused client works, and it cannot be used afterward."""
    lemcal = AsyncLemcal(USER_ID, KEY)
    await lemcal.aclose()
    async with AsyncLemcal(USER_ID, KEY) as other:
        pass
    for closed in (lemcal, other):
        with pytest.raises(ConfigurationError, match="is closed"):
            await closed.me()


@pytest.mark.anyio
async def test_error_in_the_block(lemcal_sandbox: Sandbox) -> None:
    """An error in the ``async with`` block closes the client and propagates."""
    lemcal = lemcal_sandbox.client()
    with pytest.raises(AuthenticationError):
        async with lemcal:
            await lemcal.for_account(USER_ID, KEY).me()
    with pytest.raises(ConfigurationError, match="is closed"):
        await lemcal.me()


@pytest.mark.anyio
async def test_aclose_lets_calls_finish(lemcal_sandbox: Sandbox) -> None:
    """Calls in progress finish; new calls are refused."""
    lemcal_sandbox.inject(faults.slow(0.3))  # the response arrives after the client is closed
    lemcal = lemcal_sandbox.client()
    users: list[str] = []

    async def call() -> None:
        users.append((await lemcal.me()).id)

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await wait_for_requests(lemcal_sandbox, 1)
        await lemcal.aclose()
        with pytest.raises(ConfigurationError, match="is closed"):
            await lemcal.me()
    assert [lemcal_sandbox.user_id] == users


@pytest.mark.anyio
async def test_created_at_import_time(anyio_backend_name: str) -> None:
    """A client can be created before any event loop runs, with the default wire."""
    async with created_at_import_time[anyio_backend_name] as lemcal:
        with pytest.raises(APIConnectionError):
            await lemcal.me()


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_two_loops_one_after_the_other(lemcal_sandbox: Sandbox, first: str, second: str) -> None:
    """The second loop opens its own connections."""
    lemcal = lemcal_sandbox.client(limiter=Unlimited())

    async def use() -> str:
        return (await lemcal.me()).id

    async def use_and_close() -> str:
        async with lemcal:
            return await use()

    with warnings.catch_warnings():
        # The first loop ended with an open connection, which causes this warning.
        warnings.simplefilter("ignore", ResourceWarning)
        assert lemcal_sandbox.user_id == anyio.run(use, backend=first)
        assert lemcal_sandbox.user_id == anyio.run(use_and_close, backend=second)
        gc.collect()
    with pytest.raises(ConfigurationError, match="is closed"):
        anyio.run(use, backend=second)


@pytest.mark.anyio
async def test_the_callers_transport_is_not_closed(lemcal_sandbox: Sandbox) -> None:
    """A transport passed in is neither entered nor closed by the client."""
    wire = Wire()
    async with wire.client() as lemcal:
        await lemcal.me()
    assert (False, False) == (wire.entered, wire.closed)
    with pytest.raises(ConfigurationError, match="is closed"):
        await lemcal.me()
    async with httpx.AsyncHTTPTransport(verify=False) as transport:
        for _ in range(2):
            async with lemcal_sandbox.client(transport=transport) as lemcal:
                await lemcal.me()
    assert 2 == len(lemcal_sandbox.requests)


def _abandon_client(backend: str) -> None:
    async def main() -> None:
        lemcal = AsyncLemcal(USER_ID, KEY, base_url=unused_base_url(), retry=ONCE)
        with pytest.raises(APIConnectionError):
            await lemcal.me()

    anyio.run(main, backend=backend)
    gc.collect()


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_closed(backend: str) -> None:
    """A client that is garbage-collected unclosed causes a ResourceWarning without credentials."""
    with pytest.warns(ResourceWarning, match="an AsyncLemcal was not closed; use `async with`") as caught:
        _abandon_client(backend)
    assert KEY not in "".join(str(warning.message) for warning in caught)


def test_never_used() -> None:
    """An unused client, and one on the caller's own transport, cause no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lemcal = AsyncLemcal(USER_ID, KEY)
        _ = (
            lemcal.rate_limit,
            lemcal.for_account("usr_2", "k2"),
            lemcal.with_options(deadline=1),
            repr(lemcal),
        )
        del lemcal, _
        anyio.run(Wire().client().me)
        gc.collect()
    assert [] == caught


def test_program_that_exits_without_closing() -> None:
    """The program exits normally, with a warning if warnings are enabled."""
    program = (
        "import anyio\n"
        "from lemcal_async import AsyncLemcal, RetryPolicy, errors\n"
        f"url, once = {unused_base_url()!r}, RetryPolicy(attempts=1)\n"
        "lemcal = AsyncLemcal('usr_1', 'k1', base_url=url, retry=once)\n"
        "async def main():\n"
        "    try:\n"
        "        await lemcal.me()\n"
        "    except errors.APIConnectionError:\n"
        "        print('no response')\n"
        "anyio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONDEVMODE": ""},
    )
    assert "no response\n" == done.stdout
    assert 1 == done.stderr.count("an AsyncLemcal was not closed")
    assert "Traceback" not in done.stderr
