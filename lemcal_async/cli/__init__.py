"""The ``lemcal`` command: the service, a sandbox of it, and synchronization, from a terminal or a script.

It needs the extra ``cli`` (Typer and Rich), which nothing else in the package imports. ``_app.py`` registers
the commands; here is what a command needs of its process: three open standard streams, and a way to end at
SIGTERM.
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
    """Run the command line with these arguments, or the process's, and return the exit status."""
    try:
        with _prepared(argv is None) as ended:
            from lemcal_async.cli._app import run  # noqa: PLC0415  # so that a missing extra can be named

            return ended(run(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
    except KeyboardInterrupt:  # outside of any command
        return _INTERRUPTED
    if sys.stderr is not None:
        sys.stderr.write("lemcal: the command line needs its extra: pip install 'lemcal-async[cli]'\n")
    return 2


@contextlib.contextmanager
def _prepared(own_process: bool) -> Generator[Callable[[int], int]]:  # noqa: FBT001  # the only argument
    """Prepare the process for a command, if it is ours; yield what turns its exit status into the final one.

    SIGTERM ends a command as Ctrl-C does, with its own status. Without a handler, a process with the id 1, as
    in a container, would ignore it.
    """
    _open_closed_streams()
    if not own_process or threading.current_thread() is not threading.main_thread():
        yield lambda status: status
        return
    terminated = False

    def terminate(_number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)  # noqa: S101  # Python's own, or that of an event loop, which cancels its main task
        handler(signal.SIGINT, frame)

    with _handled_interrupts():
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield lambda status: _TERMINATED if terminated and status == _INTERRUPTED else status
        except KeyboardInterrupt:
            if terminated:
                raise SystemExit(_TERMINATED) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _handled_interrupts() -> Generator[None]:
    """Have a handler for SIGINT, which event loops replace by theirs, also where SIGINT is ignored.

    It is in the background of a script, and must stay so: there, the signal itself is blocked.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    block = getattr(signal, "pthread_sigmask", None)  # not on Windows, which has no background jobs either
    if block is not None:
        block(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that waits
        if block is not None:
            block(signal.SIG_UNBLOCK, {signal.SIGINT})


def _open_closed_streams() -> None:
    """Open what ``>&-`` has closed, or the next file that is opened would be taken for a standard stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  # for the whole run
