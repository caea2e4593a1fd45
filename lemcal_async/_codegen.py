"""The wire names of the models' fields, and generated functions that quickly read rows of the usual shape.

Each model has one flat function, built once: it needs no dispatch per field and does not call the model's
``__init__``, which in a frozen class takes longer than everything else. A row with anything unusual (another
type, two spellings of a field, an odd time) is passed to the general reader in ``_codec.py``, which alone
decides whether the row is valid.
"""

from collections.abc import Callable, Iterator
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeAlias, get_args, get_origin

import attrs
from cattrs import Converter

from lemcal_async.models import Attendee, Hook, Meeting, MeetingType, User

EXTRA = "extra"
WIRE_NAMES = "_wire_names"


class Names(NamedTuple):
    """The wire names of a field: the name for new objects, and all spellings in lookup order."""

    default: str
    spellings: tuple[str, ...]


# Fields whose wire name is not the attribute's name in camelCase.
_IRREGULAR = {
    (Hook, "id"): Names("_id", ("_id",)),
    (Meeting, "id"): Names("_id", ("_id",)),
    (MeetingType, "id"): Names("_id", ("_id",)),
    (User, "id"): Names("_id", ("_id",)),
    (Attendee, "is_owner"): Names("owner", ("owner",)),
    (Attendee, "is_primary"): Names("primary", ("primary",)),
    (Meeting, "timezone"): Names("timezone", ("attendeeTimezone", "timezone")),
    (Meeting, "answers"): Names("questions", ("questions", "surveyAnswers")),
}


class Field(NamedTuple):
    """A field of a model: its attribute, the type of a value that is present, and its wire names."""

    attribute: str
    type: Any
    names: Names
    is_list: bool

    @property
    def is_remembered(self) -> bool:
        """Whether the model must record what was on the wire: which spelling, or `[]` instead of nothing."""
        return self.is_list or len(self.names.spellings) > 1


def fields_of(model: Any) -> list[Field]:
    """Return a model's wire fields, in the order in which the model defines them."""
    found: list[Field] = []
    for field in attrs.fields(model):
        if field.name == EXTRA or field.name.startswith("_"):
            continue
        kind = field.type
        if get_origin(kind) is UnionType:  # X | None: None means absent, and hooks never see it
            kind = next(arm for arm in get_args(kind) if arm is not NoneType)
        head, *tail = field.name.split("_")
        regular = head + "".join(word.capitalize() for word in tail)
        names = _IRREGULAR.get((model, field.name), Names(regular, (regular,)))
        found.append(Field(field.name, kind, names, get_origin(kind) is tuple))
    return found


Reader: TypeAlias = Callable[[Any, Any], Any]

# Times in the service's format: 2021-02-16T08:02:42.000Z. This checks everything except the digits, so that
# fromisoformat cannot accept anything else.
_IS_USUAL_TIME = 'type(v) is str and len(v) == 24 and v[4:20:3] == "--T::." and v[23] == "Z"'
_GIVE_UP = "return general(data, None)"


def fast_reader(
    model: Any, fields: list[Field], general: Reader, mismatch: type[Exception], converter: Converter
) -> Reader:
    """Return a faster function that returns and raises the same as ``general``.

    ``mismatch`` is the exception that the converter's hooks raise for an unreadable value.
    """
    spellings = [name for field in fields if field.is_remembered for name in field.names.spellings]
    scope: dict[str, Any] = {
        "general": general,
        "model": model,
        "draft": _draft_of(model),
        "new": object.__new__,
        "mismatch": mismatch,
        "known": frozenset(name for field in fields for name in field.names.spellings),
        "from_iso": datetime.fromisoformat,
        # The model's _wire_names, indexed by the bit set of the spellings seen in a row.
        "wire_names": [_in_bit_set(spellings, bits) for bits in range(1 << len(spellings))],
    }
    body = [f"    {line}" for line in _body(model, fields, spellings, scope, converter)]
    source = "\n".join(
        [
            "def read(data, _):",
            "  if type(data) is not dict:",
            f"    {_GIVE_UP}",
            "  try:",
            *body,
            "  except (mismatch, ValueError):",
            f"    {_GIVE_UP}",
            "  return row",
        ]
    )
    exec(compile(source, f"<reader of {model.__name__}>", "exec"), scope)  # noqa: S102 - as attrs and cattrs do
    reader: Reader = scope["read"]
    return reader


def _draft_of(model: Any) -> Any:
    """Return a class with the model's memory layout that is not frozen.

    A row is built as a draft, at 5 ns per field instead of 70, and its class is then set to the model.
    """
    thawed = {
        "__slots__": (),
        "__setattr__": object.__setattr__,
        "__delattr__": object.__delattr__,  # CPython's fast path requires both to be object's
    }
    return type(f"_{model.__name__}Draft", (model,), thawed)


def _in_bit_set(spellings: list[str], bits: int) -> tuple[str, ...]:
    return tuple(name for place, name in enumerate(spellings) if bits >> place & 1)


def _body(
    model: Any, fields: list[Field], spellings: list[str], scope: dict[str, Any], converter: Converter
) -> Iterator[str]:
    yield "get = data.get"
    yield "row = new(draft)"
    yield "seen = 0"
    for place, field in enumerate(fields):
        yield from _value(field, spellings)
        if field.names.spellings == ("_id",):
            yield f"if not v: {_GIVE_UP}"
        yield from _check(field, f"hook_{place}", spellings, scope, converter)
        yield f"row.{field.attribute} = v"
    yield "row.extra = {} if known.issuperset(data) else {k: x for k, x in data.items() if k not in known}"
    for field in attrs.fields(model):
        if field.name.startswith("_"):
            default = f"default{field.name}"
            scope[default] = field.default
            yield f"row.{field.name} = {'wire_names[seen]' if field.name == WIRE_NAMES else default}"
    yield "row.__class__ = model"


def _value(field: Field, spellings: list[str]) -> Iterator[str]:
    """Read a value into ``v``; record its spelling in ``seen``."""
    first, *others = field.names.spellings
    yield f"v = get({first!r})"
    if not others:
        return
    (other,) = others
    yield "if v is not None:"
    yield f"  if {other!r} in data: {_GIVE_UP}"
    yield f"  seen |= {1 << spellings.index(first)}"
    yield f"elif {other!r} in data:"
    yield f"  if {first!r} in data: {_GIVE_UP}"
    yield f"  v = get({other!r})"
    yield f"  if v is not None: seen |= {1 << spellings.index(other)}"


def _check(
    field: Field, hook: str, spellings: list[str], scope: dict[str, Any], converter: Converter
) -> Iterator[str]:
    """Convert ``v`` to the model's value, or give up."""
    if field.type is str:
        yield f"if type(v) is not str and v is not None: {_GIVE_UP}"
    elif field.type is bool:
        yield f"if v is not None and v is not True and v is not False: {_GIVE_UP}"
    elif field.is_list:
        (item, _) = get_args(field.type)
        yield "if v is None: v = ()"
        yield f"elif type(v) is not list: {_GIVE_UP}"
        yield "else:"
        if len(field.names.spellings) == 1:
            yield f"  seen |= {1 << spellings.index(field.names.default)}"
        if item is Any:
            yield "  v = tuple(v)"
        else:
            scope[hook] = _usual_only(item, scope["mismatch"], converter)
            yield f"  v = tuple([{hook}(item, None) for item in v])"
    elif attrs.has(field.type):
        scope[hook] = _usual_only(field.type, scope["mismatch"], converter)
        yield f"if v is not None: v = {hook}(v, None)"
    elif field.type is not Any:
        scope[hook] = converter.get_structure_hook(field.type)
        quick = f"from_iso(v) if {_IS_USUAL_TIME} else " if field.type is datetime else ""
        yield f"if v is not None: v = {quick}{hook}(v, None)"


def _usual_only(model: Any, mismatch: type[Exception], converter: Converter) -> Reader:
    """Return a reader for a nested model that raises on anything unusual: the outer reader then gives up."""

    def unusual(data: Any, _: Any) -> Any:
        raise mismatch("the usual shape", data)

    return fast_reader(model, fields_of(model), unusual, mismatch, converter)
