"""What the sandbox answers, as a value: a status, a body, headers. Pure.

How an answer travels (delay, rate limit headers, a connection that breaks) is the business of app.py.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

JSON: Final = "application/json; charset=utf-8"
PLAIN: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"

BODYLESS: Final = frozenset({204, 304})
"""The statuses that HTTP forbids a body."""

PAGE: Final = (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8"><title>lemcal</title></head>'
    '<body><div id="app"></div></body></html>\n'
)
"""What the service shows to those who come by a wrong path or base URL, with status 200 (observed)."""


def _only_where_allowed(answer: "Answer", _attribute: object, body: bytes) -> None:
    if body and answer.status in BODYLESS:
        raise ValueError(f"an answer with status {answer.status} has no body")


@attrs.frozen
class Answer:
    """An answer; ``headers`` win over those that every answer carries, and None leaves one out."""

    status: int = attrs.field(validator=[attrs.validators.ge(200), attrs.validators.lt(600)])
    body: bytes = attrs.field(default=b"", validator=_only_where_allowed)
    content_type: str | None = None
    headers: Mapping[str, str | None] = attrs.field(factory=dict[str, str | None])


def text(status: int, body: str, headers: Mapping[str, str | None] | None = None) -> Answer:
    """Return a plain text answer, the form of most of the service's errors (documented)."""
    return Answer(status, body.encode(), PLAIN, headers or {})


def json_text(status: int, body: bytes) -> Answer:
    """Return an answer of JSON that is encoded already."""
    return Answer(status, body, JSON)


def json_data(status: int, data: Any) -> Answer:
    """Return an answer of JSON."""
    return json_text(status, dumps(data))


def html(status: int, body: str = PAGE) -> Answer:
    """Return an HTML page."""
    return Answer(status, body.encode(), HTML)


def dumps(data: Any) -> bytes:
    """Return ``data`` as compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def wire_headers(answer: Answer, standing: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return the answer's headers for ASGI; ``standing`` are those that every answer carries."""
    merged: dict[str, str | None] = {"content-type": answer.content_type}
    if answer.status not in BODYLESS:
        merged["content-length"] = str(len(answer.body))
    for name, value in (*standing.items(), *answer.headers.items()):
        merged[name.lower()] = value
    return [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in merged.items()
        if value is not None
    ]
