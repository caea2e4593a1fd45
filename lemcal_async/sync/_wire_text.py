r"""The wire form as text: JSON that every database can keep, and that PostgreSQL's ``jsonb`` accepts.

``jsonb`` refuses U+0000 and halves of surrogate pairs, which a guest can type into a form. Each such
``\uXXXX`` is stored as ``\ufffcXXXX``; U+FFFC, which nobody types, marks it, and is marked itself.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

_SUSPECT: Final = re.compile(r"\\u(?:0000|d[89a-f]|fffc)", re.IGNORECASE)
_ESCAPE: Final = re.compile(
    r"\\(?:ud[89ab]..\\ud[c-f]..|u(0000|d[89a-f]..|fffc)|.)",  # a whole pair; what is refused; anything else
    re.IGNORECASE,
)
_STORED_ESCAPE: Final = re.compile(r"\\(?:ufffc(....)|.)", re.IGNORECASE)


def encoder(separators: tuple[str, str], *, sort_keys: bool) -> Callable[[Any], str]:
    """Return what ``json.JSONEncoder.encode`` is, without what it makes anew for each value.

    For the small values here, that is half of its time. Nothing that was read from JSON is circular.
    """
    item, key = separators
    plain = json.JSONEncoder(separators=separators, sort_keys=sort_keys, check_circular=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    try:
        chunks = make(
            None,
            plain.default,
            json.encoder.encode_basestring_ascii,
            None,
            key,
            item,
            sort_keys,
            *(False, True),
        )
        "".join(chunks({"": [None]}, 0))
    except TypeError:  # another interpreter, or a later version of this one
        return plain.encode
    return lambda value: "".join(chunks(value, 0))


def load(text: str) -> Any:
    """Return the value of a text that ``storable_json`` made."""
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
