"""What can be wrong with the arguments of a ``WebhookReceiver``, in words.

The functions hold tokens, or what was mistaken for one, so they raise nothing: a traceback may show local
variables.
"""

import math
from typing import Protocol, runtime_checkable

from lemcal_async.client import AsyncLemcal
from lemcal_async.webhooks.memory import Memory


@runtime_checkable
class Wakes(Protocol):
    """What a delivery wakes: ``lemcal_async.sync.Wake``."""

    def wake(self, user_id: str | None = None) -> object:
        """Have this account synchronised now. Called in the event loop: it returns at once."""
        ...


def problem_of_source(lemcal: object, token: object, accounts: object) -> str | None:
    """Return what is wrong with whose deliveries are to be received."""
    if (lemcal is None) != (token is None) or (lemcal is None) != (accounts is not None):
        return "a WebhookReceiver takes either a client and token=, or accounts="
    if lemcal is not None and not isinstance(lemcal, AsyncLemcal):
        return f"lemcal must be an AsyncLemcal, not {type(lemcal).__name__}"
    return None


def problem_of_options(
    *,
    on_meeting: object,
    wake: object,
    memory: object,
    deadline: object,
    handler_time_limit: object,
    list_lag: object,
) -> str | None:
    """Return what is wrong with the other arguments."""
    if on_meeting is None and wake is None:
        return "a WebhookReceiver needs on_meeting=, wake= or both"
    for good, what in (
        (on_meeting is None or callable(on_meeting), "on_meeting= must be a function"),
        (wake is None or isinstance(wake, Wakes), "wake= must be an object with a method wake(user_id)"),
        (memory is None or isinstance(memory, Memory), "memory= must have claim, done and release"),
        (_is_seconds(deadline) and deadline != 0, "deadline= must be seconds above 0"),
        (
            _is_seconds(handler_time_limit) and handler_time_limit != 0,
            "handler_time_limit= must be above 0 s",
        ),
        (_is_seconds(list_lag), "list_lag= must be seconds, 0 or more"),
    ):
        if not good:
            return what
    return None


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf
