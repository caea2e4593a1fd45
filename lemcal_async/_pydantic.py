"""Supports the models as pydantic fields, and as FastAPI request and response models.

Imported only when pydantic asks for a model's schema. The codec reads and writes the data, so the JSON has
the wire format. Field descriptions come from the models' docstrings.
"""

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, get_args

import attrs
from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from lemcal_async._codec import from_wire, to_wire
from lemcal_async._codegen import Field, fields_of
from lemcal_async.errors import ResponseDecodeError

_VALUES: dict[Any, Callable[[], core_schema.CoreSchema]] = {
    Any: core_schema.any_schema,
    bool: core_schema.bool_schema,
    datetime: core_schema.datetime_schema,
    float: core_schema.float_schema,
    str: core_schema.str_schema,
    timedelta: core_schema.float_schema,  # minutes
}


def schema_of(model: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
    """Return a model's pydantic schema. The field schemas serve only to generate the JSON schema."""

    def read(value: Any, _: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, model):
            return value
        try:
            return from_wire(value, model)
        except ResponseDecodeError as error:
            problem = str(error)
        raise PydanticCustomError("lemcal_model", "{problem}", {"problem": problem})

    descriptions = _descriptions(model)
    fields = core_schema.typed_dict_schema(
        {
            field.names.default: core_schema.typed_dict_field(
                _schema_of_field(field, handler),
                required=field.names.default == "_id",
                metadata={"pydantic_js_updates": {"description": descriptions.get(field.attribute, "")}},
            )
            for field in fields_of(model)
        },
        extra_behavior="allow",
        config={"title": model.__name__},
    )
    return core_schema.no_info_wrap_validator_function(
        read,
        fields,
        ref=f"{model.__module__}.{model.__name__}:{id(model)}",
        metadata={"pydantic_js_updates": {"description": (model.__doc__ or "").partition("\n")[0]}},
        serialization=core_schema.plain_serializer_function_ser_schema(to_wire),
    )


def _schema_of_field(field: Field, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
    if field.is_list:
        item = get_args(field.type)[0]
        return core_schema.list_schema(_schema_of_value(item, handler))
    value = _schema_of_value(field.type, handler)
    return value if field.names.default == "_id" or field.type is Any else core_schema.nullable_schema(value)


def _schema_of_value(kind: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
    return handler.generate_schema(kind) if attrs.has(kind) else _VALUES[kind]()


def _descriptions(model: Any) -> dict[str, str]:
    """Return each attribute's description from the docstring; empty if Python runs without docstrings."""
    listed = (model.__doc__ or "").partition("Attributes:\n")[2]
    return dict(re.findall(r"^\s+(\w+): (.+)$", listed, re.MULTILINE))
