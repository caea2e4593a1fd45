"""How single values travel: strings, booleans, numbers and times, as hooks for the converter of ``codec.py``.

Reading is strict, because a value of the wrong type that slips through is found much later and far
away: nothing is coerced, except a number that came as a string.

The one place that knows the wire format: JSON data to models and back.

One cattrs converter holds a hook for every kind of value; those of the models are built from their
fields on first use, and for rows of the usual shape by ``codegen.py``; those of single values are in
``wire_values.py``. What a bad row means for the list it came in is for the caller to say; HTTP and
JSON text are for others.
"""

import math
import re
from collections.abc import Callable
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeGuard, TypeVar, cast, get_args, get_origin, overload

from cattrs import Converter

from lemcal_async import _gc
from lemcal_async._codegen import WIRE_NAMES, Reader, fast_reader, fields_of
from lemcal_async.errors import BadRow, ResponseDecodeError
from lemcal_async.models import Model, in_utc


class MismatchError(Exception):
    """Data that is not what a hook reads. It says where and which type came, never the value."""

    def __init__(self, expected: str, value: Any, *, path: str = "") -> None:
        super().__init__(f"expected {expected}, got {'null' if value is None else type(value).__name__}")
        self.path = path

    def inside(self, step: str) -> None:
        """Put a step before the path: the mismatch lies inside of that field or list item."""
        joint = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{step}{joint}{self.path}"

    def __str__(self) -> str:
        problem = super().__str__()
        return f"{self.path}: {problem}" if self.path else problem


def read_str(value: Any, _: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise MismatchError("a string", value)
    return value


def read_bool(value: Any, _: Any) -> bool:
    """Read a boolean."""
    if not isinstance(value, bool):
        raise MismatchError("a boolean", value)
    return value


_is_json_number = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch


def _parsed(text: str) -> float | None:
    match = _is_json_number(text)
    if match is None:
        return None
    number = float(text)
    is_integer = match.lastindex is None and math.isfinite(number)  # int() has a limit on digits
    return int(text) if is_integer else number


def read_number(value: Any, _: Any) -> float:
    """Read a number, or a string that is one; an integer stays an int."""
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf:
        return number
    raise MismatchError("a finite number", value)


# datetime.fromisoformat alone lets junk through: 08:02.5Z, half a minute, becomes half a second.
_is_iso_time = re.compile(
    r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}T[0-9]{2}:?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?"
    r"(?:Z|[+-][0-9]{2}(?::?[0-5][0-9]){0,2})"
).fullmatch


def read_time(value: Any, _: Any) -> datetime:
    """Read an instant; digits after the microseconds are dropped."""
    time: datetime | None = None
    if isinstance(value, str) and _is_iso_time(value):
        try:
            time = in_utc(datetime.fromisoformat(value))
        except (ValueError, OverflowError):  # no such day or hour, or out of range once in UTC
            time = None
    if time is None:
        raise MismatchError("an ISO 8601 time with an offset", value)
    return time


def write_time(time: datetime) -> str:
    """Write an instant in UTC: milliseconds as the service does, microseconds where there are some."""
    precision = "microseconds" if time.microsecond % 1000 else "milliseconds"
    return time.replace(tzinfo=None).isoformat(timespec=precision) + "Z"


M = TypeVar("M", bound=Model)
T = TypeVar("T")

_MODELS: frozenset[Any] = frozenset(get_args(Model))


def _is_object(data: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict)


def _is_list(data: Any) -> TypeGuard[list[Any]]:
    return isinstance(data, list)


def _list_reader(kind: Any, converter: Converter) -> Callable[[Any, Any], tuple[Any, ...]]:
    read_item = converter.get_structure_hook(get_args(kind)[0])

    def read(data: Any, _: Any) -> tuple[Any, ...]:
        if not _is_list(data):
            raise MismatchError("a list", data)
        items: list[Any] = []
        try:
            for item in data:
                items.append(read_item(item, None))  # noqa: PERF401 - their count is the bad one's index
        except MismatchError as mismatch:
            mismatch.inside(f"[{len(items)}]")
            raise
        return tuple(items)

    return read


def _list_writer(kind: Any, converter: Converter) -> Callable[[Any], list[Any]]:
    write_item = converter.get_unstructure_hook(get_args(kind)[0])
    return lambda items: [write_item(item) for item in items]


def _checked(wire: dict[str, Any], rivals: list[tuple[str, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the id, which is never made up, and split off what lost to another spelling of its field.

    Of two spellings that are both there, the first that is not null wins.
    """
    if wire.get("_id") in (None, ""):
        raise MismatchError("a non-empty string", wire.get("_id"), path="_id")
    losers: dict[str, Any] = {}
    for first, second in rivals:
        if first in wire and second in wire:
            if wire[first] is not None:
                losers[second] = wire[second]
            elif wire[second] is not None:
                losers[first] = None
    if losers:
        wire = {name: value for name, value in wire.items() if name not in losers}
    return wire, losers


def _model_reader(model: Any, converter: Converter) -> Reader:
    fields = fields_of(model)
    defaults = [() if field.is_list else None for field in fields]
    hooks = {
        name: (place, converter.get_structure_hook(field.type), field.is_remembered)
        for place, field in enumerate(fields)
        for name in field.names.spellings
    }
    rivals = [field.names.spellings for field in fields if len(field.names.spellings) > 1]
    has_id = "_id" in hooks

    def read(data: Any, _: Any) -> Any:
        if not _is_object(data):
            raise MismatchError("an object", data)
        wire, extra = _checked(data, rivals) if has_id else (data, {})
        values: list[Any] = [*defaults, extra]  # in the order of the model's fields
        wire_names: list[str] = []
        name = ""
        try:
            for name, value in wire.items():
                hook = hooks.get(name)
                if hook is None:
                    extra[name] = value
                elif value is not None:
                    place, read_value, is_remembered = hook
                    values[place] = read_value(value, None)
                    if is_remembered:
                        wire_names.append(name)
        except MismatchError as mismatch:
            mismatch.inside(name)
            raise
        return model(*values, _wire_names=tuple(wire_names)) if wire_names else model(*values)

    return fast_reader(model, fields, read, MismatchError, converter)


def _model_writer(model: Any, converter: Converter) -> Callable[[Any], dict[str, Any]]:
    fields = fields_of(model)
    plan = [(field.names, field.is_list, converter.get_unstructure_hook(field.type)) for field in fields]
    values_of = attrgetter(*(field.attribute for field in fields))

    def write(obj: Any) -> dict[str, Any]:
        wire_names: tuple[str, ...] = getattr(obj, WIRE_NAMES, ())
        wire: dict[str, Any] = {}
        for (names, is_list, write_value), value in zip(plan, values_of(obj), strict=True):
            if value is None:
                continue
            name = names.default
            for spelling in names.spellings:
                if spelling in wire_names:
                    name = spelling
            if value or not is_list or name in wire_names:
                wire[name] = write_value(value)
        for name, value in obj.extra.items():
            wire.setdefault(name, value)  # a field of ours is not overridden
        return wire

    return write


def _is_any(kind: Any) -> bool:
    return kind is Any


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _unchanged_writer(_: Any) -> Callable[[Any], Any]:
    return lambda value: value


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=False)  # the hooks keep the path themselves
    converter.register_structure_hook(str, read_str)
    converter.register_structure_hook(bool, read_bool)
    converter.register_structure_hook(float, read_number)
    converter.register_structure_hook(datetime, read_time)
    converter.register_structure_hook_factory(_is_tuple, _list_reader)
    converter.register_structure_hook_factory(_MODELS.__contains__, _model_reader)
    converter.register_unstructure_hook(datetime, write_time)
    converter.register_unstructure_hook_factory(_is_any, _unchanged_writer)
    converter.register_unstructure_hook_factory(_is_tuple, _list_writer)
    converter.register_unstructure_hook_factory(_MODELS.__contains__, _model_writer)
    return converter


_converter = _make_converter()


def _reader(into: Any) -> Reader:
    if into not in _MODELS:
        raise TypeError(f"cannot read into {into!r}: it is neither a model nor a list of models")
    return _converter.get_structure_hook(into)


@overload
def to_wire(obj: Model) -> dict[str, Any]: ...
@overload
def to_wire(obj: list[Any] | tuple[Any, ...]) -> list[Any]: ...
def to_wire(obj: Any) -> Any:
    """Turn a model, or a list or tuple of them however nested, into data that is ready for JSON.

    What came from the wire goes back with the same meaning: unknown fields and alternative spellings
    as they were, instants to the microsecond, nothing where there was null. JSON of unknown shape is
    not copied: the answer shares it with the model. Raises TypeError for anything else.
    """
    if isinstance(obj, list | tuple):
        return [to_wire(item) for item in cast("list[Any]", obj)]
    if type(obj) not in _MODELS:
        raise TypeError(f"cannot write {type(obj).__name__}: it is neither a model nor a list of models")
    return _converter.get_unstructure_hook(type(obj))(obj)


def from_wire(data: Any, into: type[T]) -> T:
    """Turn data from JSON into a model, or into a list of them: ``from_wire(data, list[Meeting])``.

    Raises ResponseDecodeError, which names the field and the type found there and no value; when
    rows of a list cannot be read it carries the others in ``rows``. Raises TypeError if ``into`` is
    neither a model nor a list of models. The data is left alone; JSON of unknown shape is not copied.
    """
    is_list = get_origin(into) is list
    answer: T = _list_from_wire(data, get_args(into)[0]) if is_list else _model_from_wire(data, into)
    return answer


def check_into(into: Any) -> None:
    """Raise TypeError if ``from_wire`` could not make an ``into`` of anything."""
    _reader(get_args(into)[0] if get_origin(into) is list else into)


def _model_from_wire(data: Any, into: Any) -> Any:
    read = _reader(into)
    try:
        return read(data, into)
    except MismatchError as mismatch:
        problem = str(mismatch)
    raise ResponseDecodeError(problem)


def _list_from_wire(data: Any, into: Any) -> Any:
    _reader(into)
    if not _is_list(data):
        raise ResponseDecodeError(str(MismatchError("a list", data)))
    rows, bad_rows = decode_rows(data, into)
    if bad_rows:
        raise ResponseDecodeError(problem_of(rows, bad_rows), rows=rows, bad_rows=bad_rows)
    return rows


def problem_of(good: list[Any], bad: list[BadRow]) -> str:
    """Say what is wrong with a list of which some rows are bad."""
    return f"{len(bad)} of {len(good) + len(bad)} rows cannot be read; row {bad[0].index}: {bad[0].reason}"


def decode_rows(rows: list[Any], into: type[M], *, first: int = 0) -> tuple[list[M], list[BadRow]]:
    """Read each row of a list as a model; return those that are good, in order, and the bad ones.

    One bad row never costs another. ``first`` is the index of the first row, where these are a part
    of a longer list. Raises TypeError if ``into`` is no model.
    """
    read = _reader(into)
    good: list[M] = []
    bad: list[BadRow] = []
    with _gc.paused():
        for index, row in enumerate(rows, first):
            try:
                good.append(read(row, into))
            except MismatchError as mismatch:
                bad.append(BadRow(index, row, str(mismatch)))
    return good, bad
