"""A sign of life on standard error while a command waits, if a person is looking."""

import contextlib
import sys
import threading
from collections.abc import Generator
from typing import Final

from lemcal_async import events

DELAY: Final = 0.5
"""Seconds after which a wait is worth a word."""


@contextlib.contextmanager
def waiting(text: str) -> Generator[None]:
    """Show ``text`` with a spinner once the block has taken longer than a moment; erase it at the end."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only when there is a terminal
    from rich.live import Live  # noqa: PLC0415  # as above
    from rich.spinner import Spinner  # noqa: PLC0415  # as above

    # Not console.status(): that would take what the block writes to standard output to the terminal.
    live = Live(Spinner("dots", text), console=Console(stderr=True), transient=True, redirect_stdout=False)
    timer = threading.Timer(DELAY, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the spinner just now
        live.stop()


@contextlib.contextmanager
def counting(text: str, accounts: int) -> Generator[None]:
    """Show a bar of the accounts that are done while the block runs; erase it at the end."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  # only when there is a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415  # as above

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(text, total=accounts)

        def advance(event: events.Event) -> None:
            if isinstance(event, events.AccountSynced):
                progress.advance(task)

        leave = events.subscribe(advance)
        try:
            yield
        finally:
            leave()
