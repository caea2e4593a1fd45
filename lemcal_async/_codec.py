"""The wire format: converts JSON data to models and back, with one cattrs converter.

Reading is strict about types, because a wrong value would cause an error much later and elsewhere: nothing
is coerced except a number sent as a string. Reading is lenient about rows: an unreadable optional field
loses only that field, and only a row without a usable id is bad. Generated functions (``_codegen.py``) read
rows of the usual shape. HTTP and JSON text are handled elsewhere.
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

MAX_BAD_ROWS: Final = 1000
"""Maximum number of bad rows kept per list; the rest are only counted."""

_MAX_PROBLEMS: Final = 100  # described per model; the rest are only counted

logger = logging.getLogger("lemcal_async")
_logged: set[tuple[type, str]] = set()  # (model, field); bounded by the number of fields


class MismatchError(Exception):
    """A value does not have the expected type. The message names types, never the value.

    ``is_text`` means that some text would be accepted, so that the type alone does not explain the problem.
    """

    def __init__(self, expected: str, value: Any, *, field: str = "", is_text: bool = False) -> None:
        found = "null" if value is None else type(value).__name__
        if is_text and isinstance(value, str):
            found = "text that is not one"
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
    """Read a number, or a string that contains one; an integer stays an int."""
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf:
        return number
    raise MismatchError("a finite number", value, is_text=True)


def read_minutes(value: Any, _: Any) -> timedelta:
    """Read a number of minutes. Rejects a number that a timedelta would round."""
    minutes = read_number(value, None)
    try:
        duration = timedelta(minutes=minutes)
    except OverflowError:
        duration = None
    if duration is None or write_minutes(duration) != minutes:
        raise MismatchError("minutes that a timedelta can hold", value)
    return duration


def write_minutes(duration: timedelta) -> float:
    """Write a duration in minutes; a whole number is written as an integer."""
    minutes = duration / timedelta(minutes=1)
    return int(minutes) if minutes.is_integer() else minutes


# datetime.fromisoformat alone accepts junk: it reads the half minute in 08:02.5Z as half a second.
_is_iso_time = re.compile(
    r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}T[0-9]{2}:?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?"
    r"(?:Z|[+-][0-9]{2}(?::?[0-5][0-9]){0,2})"
).fullmatch


def read_time(value: Any, _: Any) -> datetime:
    """Read an instant; digits beyond microseconds are dropped."""
    time: datetime | None = None
    if isinstance(value, str) and _is_iso_time(value):
        try:
            time = in_utc(datetime.fromisoformat(value))
        except (ValueError, OverflowError):  # nonexistent day or hour, or out of range in UTC
            time = None
    if time is None:
        raise MismatchError("an ISO 8601 time with an offset", value, is_text=True)
    return time


def write_time(time: datetime) -> str:
    """Write an instant in UTC, with milliseconds as the service does, or with microseconds if nonzero."""
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
    """The unreadable fields of one object."""

    def __init__(self, model: type) -> None:
        self._model = model
        self._described: list[str] = []
        self.count = 0

    @property
    def is_full(self) -> bool:
        """Whether further problems are only counted."""
        return self.count >= _MAX_PROBLEMS

    def add(self, field: str, place: str, problem: object) -> None:
        """Record that a field, or its item at ``place``, cannot be read; log the first case per field."""
        self.describe(f"{place}: {problem}")
        if (self._model, field) not in _logged:
            _logged.add((self._model, field))
            logger.warning(
                "cannot read %s.%s: %s; the value is kept in .extra (logged once per field)",
                self._model.__name__,
                field,
                problem,
            )

    def describe(self, problem: str) -> None:
        """Record a problem without logging, because a nested model has logged it."""
        self.count += 1
        if len(self._described) < _MAX_PROBLEMS:
            self._described.append(problem)

    def all(self) -> tuple[str, ...]:
        """Return the descriptions, followed by the number of problems without one."""
        more = self.count - len(self._described)
        return (*self._described, f"and {more} more") if more else tuple(self._described)


class _FieldReader:
    """Reads one field of an object, and records its problems."""

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
        """Return the field's value, from the first spelling that is not null and can be read.

        Values that are not used go to ``extra``. A field with only nulls counts as absent.
        """
        value: Any = () if self._is_list else None
        chosen = None
        unused: dict[str, Any] = {}
        for name in self._spellings:
            if name not in wire:
                continue
            found = unused[name] = wire[name]
            if found is None or chosen is not None:
                continue
            try:
                value, is_whole = self.read(name, found, problems)
            except MismatchError as mismatch:
                problems.add(name, name, mismatch)
                continue
            chosen = name
            if is_whole:
                del unused[name]
        if chosen is not None or any(found is not None for found in unused.values()):
            extra |= unused
        if chosen is not None and self._is_remembered:
            wire_names.append(chosen)
        return value

    def read(self, name: str, value: Any, problems: _Problems) -> tuple[Any, bool]:
        """Return the readable part of a value, and whether that is all of it.

        Raises MismatchError if nothing can be read.
        """
        if not self._is_list:
            return self._read_one(name, value, problems), True
        if not _is_list(value):
            raise MismatchError("a list", value)
        items: list[Any] = []
        for index, item in enumerate(value):
            if problems.is_full and self._holds_models and not _is_object(item):
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
                problems.describe(f"{place}.{problem}")
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
                is_same = field.is_list and name in extra and _is_original(value, reader, name, extra[name])
                wire[name] = extra[name] if is_same else write_value(value)
        for name, value in extra.items():
            wire.setdefault(name, value)  # attributes take precedence over extra
        return wire

    def _is_original(value: Any, reader: _FieldReader, name: str, original: Any) -> bool:
        """Whether a list is still the readable part of ``original``, which is then written unchanged."""
        try:
            return bool(value == reader.read(name, original, _Problems(model))[0])
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
    converter = Converter(detailed_validation=False)  # the hooks record problems themselves
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
    """Convert a model, or an arbitrarily nested list or tuple of models, to JSON-serializable data.

    Data from the wire keeps its meaning: unknown and unreadable fields are unchanged, alternative spellings
    are kept, instants are exact to the microsecond, and nulls are omitted. Free-form JSON is not copied: the
    result shares it with the model.

    Args:
        obj: The model, or the list or tuple.

    Raises:
        TypeError: If ``obj`` is, or contains, anything else.
    """
    if isinstance(obj, list | tuple):
        return [to_wire(item) for item in cast("list[Any]", obj)]
    if type(obj) not in _MODELS:
        raise TypeError(f"cannot write {type(obj).__name__}: it is neither a model nor a list of models")
    return _converter.get_unstructure_hook(type(obj))(obj)


def from_wire(data: Any, into: type[T]) -> T:
    """Convert JSON data to a model, or to a list of models: ``from_wire(data, list[Meeting])``.

    An unreadable optional field stays in ``extra`` and is described in ``problems``. ``data`` is not
    modified; free-form JSON is not copied.

    Args:
        data: The data, as ``json.loads`` returns it.
        into: A model, or a list of a model.

    Raises:
        ResponseDecodeError: If the data is not an object or has no usable ``_id``. For a list, the error's
            ``rows`` holds the models of the good rows.
        TypeError: If ``into`` is neither a model nor a list of models.
    """
    result: T
    if _is_model(into):  # checked first, because a store calls this for every row
        result = _model_from_wire(data, into)
        return result
    if _is_model(data) or get_origin(data) is list:
        raise TypeError("from_wire() takes the data first and the model second: from_wire(data, Meeting)")
    is_list = get_origin(into) is list
    result = _list_from_wire(data, get_args(into)[0]) if is_list else _model_from_wire(data, into)
    return result


def check_into(into: Any) -> None:
    """Raise TypeError if ``from_wire`` does not accept ``into``."""
    kind = get_args(into)[0] if get_origin(into) is list else into
    if not _is_model(kind):
        raise TypeError(
            f"into={_name(into)}: pass a model such as Meeting, or list[Meeting]; omit it for plain JSON"
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
    """Reads the rows of a list into models, in batches. A bad row does not affect other rows.

    ``good`` holds the models, ``bad`` the first thousand bad rows; ``count`` is the number of all rows and
    ``bad_count`` the number of bad rows. Raises TypeError if ``into`` is not a model.
    """

    def __init__(self, into: type[T]) -> None:
        self.good: list[T] = []
        self.bad: list[BadRow] = []
        self.bad_count = 0
        self.count = 0
        self._into = into
        self._read = _reader(into)

    def add(self, rows: list[Any]) -> None:
        """Read the next batch of rows."""
        read, good = self._read, self.good
        with _gc.paused():
            for index, row in enumerate(rows, self.count):
                if self.bad_count >= MAX_BAD_ROWS:
                    self._add_usable(rows[index - self.count :])
                    break
                try:
                    good.append(read(row, None))
                except MismatchError as mismatch:
                    self.bad_count += 1
                    self.bad.append(BadRow(index, row, str(mismatch)))
        self.count += len(rows)

    def _add_usable(self, rows: list[Any]) -> None:
        """Read the good rows and count the bad ones, without an exception for each of possibly millions."""
        usable: list[dict[str, Any]] = [row for row in rows if isinstance(row, dict)]
        if "id" in attrs.fields_dict(cast("Any", self._into)):
            usable = [row for row in usable if row and isinstance(row_id := row.get("_id"), str) and row_id]
        self.good += [self._read(row, None) for row in usable]
        self.bad_count += len(rows) - len(usable)

    def problem(self) -> str:
        """Describe how many rows are bad."""
        return f"{self.bad_count} of {self.count} rows cannot be read"
