"""The ``lemcal`` command: use the service, a sandbox and synchronization from a terminal or a script.

It requires the extra ``cli`` (Typer and Rich), which no other subpackage imports. ``_app.py`` registers the
commands. This module prepares the process: it opens closed standard streams and handles SIGTERM.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Final

_INTERRUPTED: Final = 130
_TERMINATED: Final = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. ``argv`` defaults to the arguments of the process."""
    try:
        with _prepare_process(argv is None) as final_status:
            from lemcal_async.cli._app import run  # noqa: PLC0415  # a missing extra is reported below

            return final_status(run(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
    except KeyboardInterrupt:  # while no command was running
        return _INTERRUPTED
    if sys.stderr is not None:
        sys.stderr.write("lemcal: the command line requires the extra cli: pip install 'lemcal-async[cli]'\n")
    return 2


@contextlib.contextmanager
def _prepare_process(own_process: bool) -> Generator[Callable[[int], int]]:  # noqa: FBT001  # the only argument
    """Prepare the process for a command; yield a function that converts its exit status to the final one.

    SIGTERM ends a command like Ctrl-C, but with its own status. Without a handler, a process with PID 1, as
    in a container, ignores SIGTERM. In a process that is not ours, signal handlers stay as they are.
    """
    _reopen_closed_streams()
    if not own_process or threading.current_thread() is not threading.main_thread():
        yield lambda status: status
        return
    terminated = False

    def terminate(_number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)  # noqa: S101  # Python's handler, or the event loop's, which cancels its main task
        handler(signal.SIGINT, frame)

    with _handle_sigint():
        previous = signal.signal(signal.SIGTERM, terminate)
        try:
            yield lambda status: _TERMINATED if terminated and status == _INTERRUPTED else status
        except KeyboardInterrupt:
            if terminated:
                raise SystemExit(_TERMINATED) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _handle_sigint() -> Generator[None]:
    """Install a SIGINT handler, for event loops to replace with theirs, even if SIGINT is ignored.

    A background job of a script ignores SIGINT and must continue to, so the signal is blocked for it.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    block = getattr(signal, "pthread_sigmask", None)  # Windows has neither this function nor background jobs
    if block is not None:
        block(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # discards a pending SIGINT
        if block is not None:
            block(signal.SIG_UNBLOCK, {signal.SIGINT})


def _reopen_closed_streams() -> None:
    """Reopen streams closed with ``>&-``; otherwise, the next opened file would become a standard stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  # open until the process exits
