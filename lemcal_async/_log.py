"""``LEMCAL_LOG=debug``: the log on standard error, for a program that sets up no logging itself."""

import functools
import logging
import os

from lemcal_async.errors import ConfigurationError

LOG_VARIABLE = "LEMCAL_LOG"

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@functools.cache
def set_up_logging() -> None:
    """Log from the level on that the environment names, once. Handlers that there are already are kept."""
    level = os.environ.get(LOG_VARIABLE, "").strip().upper()
    if not level:
        return
    if level not in _LEVELS:
        raise ConfigurationError(f"{LOG_VARIABLE} must be one of {', '.join(_LEVELS).lower()}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lemcal_async").setLevel(level)
