"""How a command ends: with an exit status for scripts, and one line on standard error for people.

The statuses are explained in ``HELP``, which ``lemcal --help`` shows.
"""

import enum
import re
import sys
from collections.abc import Sequence

from lemcal_async.errors import (
    AuthenticationError,
    BadRow,
    ConfigurationError,
    LemcalError,
    NotFoundError,
)


class ExitStatus(enum.IntEnum):
    """The exit statuses; those above 128 are the ones of a process that a signal has ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREADABLE_ROWS = 3
    AUTHENTICATION = 4
    NOT_FOUND = 5
    INTERRUPTED = 130
    NO_READER = 141


# The line with \b keeps typer from filling the lines.
HELP = """\
\b
Exit status:
  0    done
  1    the service, the network or the database failed, or the output cannot be written;
       in a synchronisation: some account failed
  2    wrong usage or configuration; nothing was sent
  3    some rows could not be read; the others were printed
  4    the service does not accept the credentials
  5    there is no such thing
  130  Ctrl-C (but the sandbox, which ends that way, ends with 0)
  141  whoever read the output has closed it, as `| head` does
"""

_STATUSES: tuple[tuple[type[LemcalError], ExitStatus], ...] = (
    (ConfigurationError, ExitStatus.USAGE),
    (AuthenticationError, ExitStatus.AUTHENTICATION),
    (NotFoundError, ExitStatus.NOT_FOUND),
    (LemcalError, ExitStatus.FAILED),
)


class OutputError(Exception):
    """Standard output cannot be written; with NO_READER there is nobody to tell."""

    def __init__(self, status: ExitStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: LemcalError) -> ExitStatus:
    """Return the exit status of a command that ends with this error."""
    return next(status for kind, status in _STATUSES if isinstance(error, kind))


# A hook's target usually carries a token in its query, and a message may quote an argument.
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")
# After a colon it goes up to the last @: a password may hold a slash.
_USER_INFO = re.compile(r"://(?:[^\s/?#:]*:[^\s?#]*|[^\s/?#]*)@")


def without_secrets(text: str) -> str:
    """Return ``text`` with what may be secret in its URLs left out: the query, the fragment, user info."""
    return _QUERY.sub(r"\1?...", _USER_INFO.sub("://", text))


def printable(text: str) -> str:
    """Return ``text`` as one line that does nothing to a terminal.

    Guests write some of what is shown, and the server the rest.
    """
    if text.isprintable():
        return text
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def tell(message: str) -> None:
    """Say something in one line on standard error."""
    sys.stderr.write(f"lemcal: {without_secrets(printable(message))}\n")


def tell_of_bad_rows(noun: str, bad_rows: Sequence[BadRow]) -> None:
    """Say which rows could not be read, each in one line on standard error."""
    for row in bad_rows:
        tell(f"warning: row {row.index} of the {noun} cannot be read: {row.reason}")
