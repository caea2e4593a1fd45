r"""The wire form as text: JSON that every database can keep, and that PostgreSQL's ``jsonb`` accepts.

``jsonb`` refuses U+0000 and halves of surrogate pairs, which a guest can type into a form. Each such
``\uXXXX`` is stored as ``\ufffcXXXX``; U+FFFC, which nobody types, marks it, and is marked itself.
"""

import json
import re
from typing import Any, Final

_SUSPECT: Final = re.compile(r"\\u(?:0000|d[89a-f]|fffc)", re.IGNORECASE)
_ESCAPE: Final = re.compile(
    r"\\(?:ud[89ab]..\\ud[c-f]..|u(0000|d[89a-f]..|fffc)|.)",  # a whole pair; what is refused; anything else
    re.IGNORECASE,
)
_STORED_ESCAPE: Final = re.compile(r"\\(?:ufffc(....)|.)", re.IGNORECASE)


def dump(value: Any) -> str:
    """Return a JSON value as ASCII text that can be stored."""
    return storable_json(json.dumps(value))


def load(text: str) -> Any:
    """Return the value of a stored text."""
    if "\\ufffc" in text:
        text = _STORED_ESCAPE.sub(_restore, text)
    return json.loads(text)


def storable_json(text: str) -> str:
    """Return an ASCII JSON text as it can be stored."""
    return text if _SUSPECT.search(text) is None else _ESCAPE.sub(_mark, text)


def _mark(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else f"\\ufffc{found[1]}"


def _restore(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else f"\\u{found[1]}"
