"""Whose budget a request draws on: the base URL, and a hash in place of the credential."""

import base64
from urllib.parse import urlsplit

import attrs

from lemcal_async.credentials import digest_of
from lemcal_async.urls import DEFAULT_BASE_URL


@attrs.frozen
class Key:
    """The name of one budget. The credential itself is not in it, and cannot be had from it."""

    base_url: str
    digest: str

    @property
    def short(self) -> str:
        """Return as much of the digest as tells keys apart in a log."""
        return self.digest[:8]

    def __str__(self) -> str:
        return f"{self.short} at {self.base_url}"


def key_of(url: str, authorization: str) -> Key:
    """Return the key of a request of which only URL and ``Authorization`` are known.

    It equals the one that ``AsyncLemcal`` uses for the same account at the default base URL; for
    any other address the origin stands for the base URL.
    """
    if url.startswith(DEFAULT_BASE_URL):
        base_url = DEFAULT_BASE_URL
    else:
        parts = urlsplit(url)
        base_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    scheme, _, value = authorization.partition(" ")
    pair = authorization
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value, validate=True).decode()
        except ValueError:  # not what it says it is: still somebody's key
            pair = authorization
    return Key(base_url, digest_of(pair))
