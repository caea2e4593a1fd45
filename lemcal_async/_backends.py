"""Loads anyio's backends ahead of the first call: within one, they would hold up the event loop for 40 ms."""

import sys
from contextlib import suppress
from importlib import import_module

from anyio.lowlevel import current_token


def preload() -> None:
    """Load the backend for asyncio, and that for trio if the program uses trio. Does it once."""
    for library, backend in (("asyncio", "anyio._backends._asyncio"), ("trio", "anyio._backends._trio")):
        if library in sys.modules and backend not in sys.modules:
            with suppress(ModuleNotFoundError):  # another version of anyio loads what it needs by itself
                import_module(backend)


def is_in_event_loop() -> bool:
    """Whether an event loop runs in this thread, and would stand still."""
    try:
        current_token()
    except RuntimeError:
        return False
    return True
