"""The wire format: JSON data to models and back, with one cattrs converter.

Reading is strict about types, because a wrong value that slips through shows up much later and far away:
nothing is coerced except a number sent as a string. It is lenient about rows: an optional field that
cannot be read costs that field alone, and only a row without a usable id is bad. Rows of the usual shape
are read by generated functions (``_codegen.py``). HTTP and JSON text are the business of others.
"""

import logging
import math
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Final, Generic, TypeGuard, TypeVar, cast, get_args, get_origin, overload

import attrs
from cattrs import Converter

from lemcal_async import _gc
from lemcal_async._codegen import WIRE_NAMES, Field, Reader, fast_reader, fields_of
from lemcal_async.errors import BadRow, ResponseDecodeError
from lemcal_async.models import Model, in_utc

MOST_BAD_ROWS: Final = 1000
"""How many bad rows of a list are kept; the rest are counted."""

_MOST_PROBLEMS: Final = 100  # that one model names; the rest are counted

logger = logging.getLogger("lemcal_async")
_logged: set[tuple[type, str]] = set()  # models and their fields; there are only so many


class MismatchError(Exception):
    """A value that is not what was expected. The message names types, never the value."""

    def __init__(self, expected: str, value: Any, *, field: str = "") -> None:
        found = "null" if value is None else type(value).__name__
        super().__init__(f"{field}: " * bool(field) + f"expected {expected}, got {found}")


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
    """Read a number, or a string that holds one; an integer stays an int."""
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf:
        return number
    raise MismatchError("a finite number", value)


def read_minutes(value: Any, _: Any) -> timedelta:
    """Read a number of minutes, unless a timedelta would round it."""
    minutes = read_number(value, None)
    try:
        duration = timedelta(minutes=minutes)
    except OverflowError:
        duration = None
    if duration is None or write_minutes(duration) != minutes:
        raise MismatchError("minutes that a timedelta can hold", value)
    return duration


def write_minutes(duration: timedelta) -> float:
    """Write a duration as minutes, whole ones as an integer."""
    minutes = duration / timedelta(minutes=1)
    return int(minutes) if minutes.is_integer() else minutes


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
    """Write an instant in UTC, with milliseconds as the service does, or microseconds if there are any."""
    time = in_utc(time)
    precision = "microseconds" if time.microsecond % 1000 else "milliseconds"
    return time.replace(tzinfo=None).isoformat(timespec=precision) + "Z"


M = TypeVar("M", bound=Model)
T = TypeVar("T")

_MODELS: frozenset[Any] = frozenset(get_args(Model))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and kind in _MODELS


def _is_object(data: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict)


def _is_list(data: Any) -> TypeGuard[list[Any]]:
    return isinstance(data, list)


class _Problems:
    """What cannot be read in one object."""

    def __init__(self, model: type) -> None:
        self._model = model
        self._named: list[str] = []
        self.count = 0

    @property
    def are_many(self) -> bool:
        """Whether no more are named."""
        return self.count >= _MOST_PROBLEMS

    def add(self, field: str, place: str, problem: object) -> None:
        """Note that a field cannot be read, or the item of it at ``place``."""
        self.name(f"{place}: {problem}")
        if (self._model, field) not in _logged:
            _logged.add((self._model, field))
            logger.warning(
                "%s.%s cannot be read: %s; such values stay in .extra (logged once per field)",
                self._model.__name__,
                field,
                problem,
            )

    def name(self, problem: str) -> None:
        """Note what a nested model has noted before."""
        self.count += 1
        if len(self._named) < _MOST_PROBLEMS:
            self._named.append(problem)

    def all(self) -> tuple[str, ...]:
        """Return them, with the number of those that are not named."""
        unnamed = self.count - len(self._named)
        return (*self._named, f"and {unnamed} more") if unnamed else tuple(self._named)


class _FieldReader:
    """Reads one field out of an object, and says what is wrong with it."""

    def __init__(self, field: Field, converter: Converter) -> None:
        self._spellings = field.names.spellings
        self._is_list = field.is_list
        self._is_remembered = field.is_remembered
        kind = get_args(field.type)[0] if field.is_list else field.type
        self._holds_models = _is_model(kind)
        self._read = converter.get_structure_hook(kind)

    def take(
        self, wire: dict[str, Any], extra: dict[str, Any], wire_names: list[str], problems: _Problems
    ) -> Any:
        """Return the field's value: of several spellings, the first that is not null and can be read.

        What is not part of it goes to ``extra``. Nulls alone are no different from nothing.
        """
        value: Any = () if self._is_list else None
        chosen = None
        left: dict[str, Any] = {}
        for name in self._spellings:
            if name not in wire:
                continue
            found = left[name] = wire[name]
            if found is None or chosen is not None:
                continue
            try:
                value, is_whole = self.read(name, found, problems)
            except MismatchError as mismatch:
                problems.add(name, name, mismatch)
                continue
            chosen = name
            if is_whole:
                del left[name]
        if chosen is not None or any(found is not None for found in left.values()):
            extra |= left
        if chosen is not None and self._is_remembered:
            wire_names.append(chosen)
        return value

    def read(self, name: str, value: Any, problems: _Problems) -> tuple[Any, bool]:
        """Return what can be read, and whether that is all of it; MismatchError if nothing can."""
        if not self._is_list:
            return self._read_one(name, value, problems), True
        if not _is_list(value):
            raise MismatchError("a list", value)
        items: list[Any] = []
        for index, item in enumerate(value):
            if problems.are_many and self._holds_models and not _is_object(item):
                problems.count += 1  # there may be millions
                continue
            place = f"{name}[{index}]"
            try:
                items.append(self._read_one(place, item, problems))
            except MismatchError as mismatch:
                problems.add(name, place, mismatch)
        return tuple(items), len(items) == len(value)

    def _read_one(self, place: str, value: Any, problems: _Problems) -> Any:
        found = self._read(value, None)
        if self._holds_models:
            for problem in found.problems:
                problems.name(f"{place}.{problem}")
        return found


def _check_id(value: Any) -> None:
    if not isinstance(value, str) or not value:
        is_missing = value is None or value == ""
        raise MismatchError("a non-empty string" if is_missing else "a string", value, field="_id")


def _model_reader(model: Any, converter: Converter) -> Reader:
    fields = fields_of(model)
    readers = [_FieldReader(field, converter) for field in fields]
    known = frozenset(name for field in fields for name in field.names.spellings)
    has_id = "_id" in known

    def read(data: Any, _: Any) -> Any:
        if not _is_object(data):
            raise MismatchError("an object", data)
        if has_id:
            _check_id(data.get("_id"))
        extra = {name: value for name, value in data.items() if name not in known}
        wire_names: list[str] = []
        problems = _Problems(model)
        values = [reader.take(data, extra, wire_names, problems) for reader in readers]
        remembered = {WIRE_NAMES: tuple(wire_names)} if wire_names else {}
        return model(*values, extra, _problems=problems.all(), **remembered)

    return fast_reader(model, fields, read, MismatchError, converter)


def _model_writer(model: Any, converter: Converter) -> Callable[[Any], dict[str, Any]]:
    fields = fields_of(model)
    plan = [(field, _field_writer(field, converter), _FieldReader(field, converter)) for field in fields]
    values_of = attrgetter(*(field.attribute for field in fields))

    def write(obj: Any) -> dict[str, Any]:
        wire_names: tuple[str, ...] = getattr(obj, WIRE_NAMES, ())
        extra: dict[str, Any] = obj.extra
        wire: dict[str, Any] = {}
        for (field, write_value, reader), value in zip(plan, values_of(obj), strict=True):
            if value is None:
                continue
            name = field.names.default
            for spelling in field.names.spellings:
                if spelling in wire_names:
                    name = spelling
            if value or not field.is_list or name in wire_names:
                is_part = field.is_list and name in extra and _is_part(value, reader, name, extra[name])
                wire[name] = extra[name] if is_part else write_value(value)
        for name, value in extra.items():
            wire.setdefault(name, value)  # a field of ours is not overridden
        return wire

    def _is_part(value: Any, reader: _FieldReader, name: str, whole: Any) -> bool:
        """Whether a list is still what could be read of the whole: that goes back as it came."""
        try:
            return bool(value == reader.read(name, whole, _Problems(model))[0])
        except MismatchError:
            return False

    return write


def _field_writer(field: Field, converter: Converter) -> Callable[[Any], Any]:
    if not field.is_list:
        return converter.get_unstructure_hook(field.type)
    write_item = converter.get_unstructure_hook(get_args(field.type)[0])
    return lambda items: [write_item(item) for item in items]


def _is_any(kind: Any) -> bool:
    return kind is Any


def _unchanged_reader(_: Any) -> Callable[[Any, Any], Any]:
    return lambda value, _: value


def _unchanged_writer(_: Any) -> Callable[[Any], Any]:
    return lambda value: value


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=False)  # problems are kept by the hooks themselves
    converter.register_structure_hook(str, read_str)
    converter.register_structure_hook(bool, read_bool)
    converter.register_structure_hook(float, read_number)
    converter.register_structure_hook(timedelta, read_minutes)
    converter.register_structure_hook(datetime, read_time)
    converter.register_structure_hook_factory(_is_any, _unchanged_reader)
    converter.register_structure_hook_factory(_MODELS.__contains__, _model_reader)
    converter.register_unstructure_hook(timedelta, write_minutes)
    converter.register_unstructure_hook(datetime, write_time)
    converter.register_unstructure_hook_factory(_is_any, _unchanged_writer)
    converter.register_unstructure_hook_factory(_MODELS.__contains__, _model_writer)
    return converter


_converter = _make_converter()


def _reader(into: Any) -> Reader:
    if not _is_model(into):
        raise TypeError(f"cannot read into {_name(into)}: pass a model such as Meeting, or list[Meeting]")
    return _converter.get_structure_hook(into)


@overload
def to_wire(obj: Model) -> dict[str, Any]: ...
@overload
def to_wire(obj: list[M] | tuple[M, ...]) -> list[dict[str, Any]]: ...
@overload
def to_wire(obj: list[Any] | tuple[Any, ...]) -> list[Any]: ...
def to_wire(obj: Any) -> Any:
    """Turn a model, or a list or tuple of them however nested, into data that is ready for JSON.

    What came from the wire goes back with the same meaning: unknown and unreadable fields to the letter,
    alternative spellings as they were, instants to the microsecond, nothing where there was null. Free-form
    JSON is not copied: the result shares it with the model.

    Args:
        obj: The model, or the list or tuple.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(obj, list | tuple):
        return [to_wire(item) for item in cast("list[Any]", obj)]
    if type(obj) not in _MODELS:
        raise TypeError(f"cannot write {type(obj).__name__}: it is neither a model nor a list of models")
    return _converter.get_unstructure_hook(type(obj))(obj)


def from_wire(data: Any, into: type[T]) -> T:
    """Turn JSON data into a model, or into a list of them: ``from_wire(data, list[Meeting])``.

    An optional field that cannot be read is left in ``extra`` and named in ``problems``. The data is left
    alone; free-form JSON is not copied.

    Args:
        data: The data, as ``json.loads`` returns it.
        into: The model, or a list of it.

    Raises:
        ResponseDecodeError: For data that is no object or has no usable ``_id``; for a list with such rows,
            the error carries the models of the others in ``rows``.
        TypeError: If ``into`` is neither a model nor a list of models.
    """
    answer: T
    if _is_model(into):  # looked at first, because a store does this for every row
        answer = _model_from_wire(data, into)
        return answer
    if _is_model(data) or get_origin(data) is list:
        raise TypeError("from_wire() takes the data first and the model second: from_wire(data, Meeting)")
    is_list = get_origin(into) is list
    answer = _list_from_wire(data, get_args(into)[0]) if is_list else _model_from_wire(data, into)
    return answer


def check_into(into: Any) -> None:
    """Raise TypeError if ``from_wire`` could not make an ``into`` of anything."""
    kind = get_args(into)[0] if get_origin(into) is list else into
    if not _is_model(kind):
        raise TypeError(
            f"into={_name(into)}: pass a model such as Meeting, or list[Meeting]; leave it out for plain JSON"
        )


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else repr(kind)


def _model_from_wire(data: Any, into: Any) -> Any:
    read = _reader(into)
    try:
        return read(data, into)
    except MismatchError as mismatch:
        problem = str(mismatch)
    raise ResponseDecodeError(problem)


def _list_from_wire(data: Any, into: Any) -> Any:
    reader = RowReader[Any](into)
    if not _is_list(data):
        raise ResponseDecodeError(str(MismatchError("a list", data)))
    reader.add(data)
    if reader.bad:
        raise ResponseDecodeError(
            f"{reader.problem()}; row {reader.bad[0].index}: {reader.bad[0].reason}",
            rows=reader.good,
            bad_rows=reader.bad,
            bad_row_count=reader.bad_count,
        )
    return reader.good


class RowReader(Generic[T]):
    """Makes models of the rows of a list, a part at a time. A bad row never costs another.

    ``good`` holds the models, ``bad`` the first thousand of the bad rows; ``count`` and ``bad_count`` are
    how many rows, and bad ones, there were. Raises TypeError if ``into`` is no model.
    """

    def __init__(self, into: type[T]) -> None:
        self.good: list[T] = []
        self.bad: list[BadRow] = []
        self.bad_count = 0
        self.count = 0
        self._into = into
        self._read = _reader(into)

    def add(self, rows: list[Any]) -> None:
        """Read the rows that come next."""
        read, good = self._read, self.good
        with _gc.paused():
            for index, row in enumerate(rows, self.count):
                if self.bad_count >= MOST_BAD_ROWS:
                    self._add_usable(rows[index - self.count :])
                    break
                try:
                    good.append(read(row, None))
                except MismatchError as mismatch:
                    self.bad_count += 1
                    self.bad.append(BadRow(index, row, str(mismatch)))
        self.count += len(rows)

    def _add_usable(self, rows: list[Any]) -> None:
        """Count the bad rows, of which there may be millions, without an exception for each."""
        usable: list[dict[str, Any]] = [row for row in rows if isinstance(row, dict)]
        if "id" in attrs.fields_dict(cast("Any", self._into)):
            usable = [row for row in usable if row and isinstance(row_id := row.get("_id"), str) and row_id]
        self.good += [self._read(row, None) for row in usable]
        self.bad_count += len(rows) - len(usable)

    def problem(self) -> str:
        """Say how many rows are bad."""
        return f"{self.bad_count} of {self.count} rows cannot be read"
