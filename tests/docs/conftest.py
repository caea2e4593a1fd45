"""Fixtures that run the documentation's pages against the sandbox.

The Python blocks of a page run in order and share one namespace. The namespace already contains what the
blocks do not repeat, such as a client, or imports shown on an earlier page.
"""

import ast
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser

import lemcal_async
from lemcal_async import AsyncLemcal, Meeting, RetryPolicy, errors, events, to_wire
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited
from lemcal_async.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

Names = dict[str, Any]
Read = Callable[..., Awaitable[Names]]


def blocks(page: Path, language: str) -> list[Example]:
    """Return the code blocks of a page in one language."""
    parser = CodeBlockParser(language, evaluator=lambda _: None)
    return list(Document.parse(str(page), parser).examples())


@pytest.fixture
def service(lemcal_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Connect every client that a page creates to the sandbox, with the credentials of its account."""
    monkeypatch.setenv("LEMCAL_USER_ID", lemcal_sandbox.user_id)
    monkeypatch.setenv("LEMCAL_API_KEY", lemcal_sandbox.api_key)
    defaults = {**(AsyncLemcal.__init__.__kwdefaults__ or {}), "base_url": lemcal_sandbox.base_url}
    monkeypatch.setattr(AsyncLemcal.__init__, "__kwdefaults__", defaults)
    return lemcal_sandbox


@pytest.fixture
async def read(service: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Read]:
    """Return a function that runs a page's Python blocks and returns their namespace.

    Its keyword arguments are added to the namespace before the blocks run.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(events, "_listeners", ())  # pages that subscribe need not unsubscribe
    common: Names = {
        "AsyncLemcal": lemcal_async.AsyncLemcal,
        "LocalRateLimiter": LocalRateLimiter,
        "Meeting": Meeting,
        "RetryPolicy": RetryPolicy,
        "Unlimited": Unlimited,
        "anyio": anyio,
        "errors": errors,
        "pytest": pytest,
        "to_wire": to_wire,
    }
    async with service.client() as lemcal:
        names: Names = {"lemcal": lemcal, **common}

        async def read(page: str, **given: Any) -> Names:
            names.update(__name__=page, **given)
            for example in blocks(ROOT / page, "python"):
                await run(example, names)
            return names

        yield read
        for value in list(names.values()):
            if isinstance(value, AsyncLemcal):
                await value.aclose()


async def run(example: Example, names: Names) -> None:
    """Run a block: on this event loop if it contains await, otherwise in a thread without an event loop."""
    source = pad(example.parsed, example.line + example.parsed.line_offset)
    code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)
    else:
        await anyio.to_thread.run_sync(exec, code, names)
