"""The sandbox's responses as values: a status code, a body, headers. Pure.

``_app.py`` sends them, with latency, rate limit headers and broken connections.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, cast

import attrs

JSON: Final = "application/json; charset=utf-8"
PLAIN: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSENDABLE: Final = re.compile(r"[^\t\x20-\x7e\x80-\xff]")

BODYLESS: Final = frozenset({204, 304})
"""The status codes for which HTTP forbids a body."""

PAGE: Final = (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8"><title>lemcal</title></head>'
    '<body><div id="app"></div></body></html>\n'
)
"""The page that the service returns for a wrong path or base URL, with status 200 (observed)."""


def _allow_no_body_without_content(response: "SandboxResponse", _attribute: object, body: bytes) -> None:
    if body and response.status_code in BODYLESS:
        raise ValueError(f"a response with status {response.status_code} has no body")


def _check_content_type(_response: object, _attribute: object, content_type: str | None) -> None:
    _check_header("content_type", content_type)


def _check_headers(_response: object, _attribute: object, headers: object) -> None:
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping of names to values, not {headers!r}")
    for name, value in cast("Mapping[object, object]", headers).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers contains {name!r}, which is not a header's name")
        _check_header(f"the header {name}", value)


def _check_header(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if _UNSENDABLE.search(value):
        raise ValueError(f"{name} contains characters that a header cannot: {value!r}")


@attrs.frozen
class SandboxResponse:
    """A response. ``headers`` override those of every response; a value of None omits a header."""

    status_code: int = attrs.field(validator=[attrs.validators.ge(200), attrs.validators.lt(600)])
    body: bytes = attrs.field(default=b"", validator=_allow_no_body_without_content)
    content_type: str | None = attrs.field(default=None, validator=_check_content_type)
    headers: Mapping[str, str | None] = attrs.field(factory=dict[str, str | None], validator=_check_headers)


def text(status_code: int, body: str, headers: Mapping[str, str | None] | None = None) -> SandboxResponse:
    """Return a plain-text response, the format of most of the service's errors (documented)."""
    return SandboxResponse(status_code, body.encode(), PLAIN, headers or {})


def json_text(status_code: int, body: bytes) -> SandboxResponse:
    """Return a response whose body is already encoded as JSON."""
    return SandboxResponse(status_code, body, JSON)


def json_data(status_code: int, data: Any) -> SandboxResponse:
    """Return a JSON response."""
    return json_text(status_code, dumps(data))


def html(status_code: int, body: str = PAGE) -> SandboxResponse:
    """Return an HTML page."""
    return SandboxResponse(status_code, body.encode(), HTML)


def dumps(data: Any) -> bytes:
    """Return ``data`` as compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def wire_headers(response: SandboxResponse, common_headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return the response's headers for ASGI, merged with ``common_headers``."""
    merged: dict[str, str | None] = {"content-type": response.content_type}
    if response.status_code not in BODYLESS:
        merged["content-length"] = str(len(response.body))
    for name, value in (*common_headers.items(), *response.headers.items()):
        merged[name.lower()] = value
    return [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in merged.items()
        if value is not None
    ]
