"""Parsed JSON as objects of torch's schema of exported programs, and nothing else.

``torch._export.serde.schema`` says which fields an exported program has and of which types. Here every value must be
exactly of its type, every required field there, and no other; torch's own reader lets wrong types pass.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

_FLOAT_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def build(kind: Any, data: Any, what: str) -> Any:
    """An object of ``kind``, a class of torch's schema, from parsed JSON.

    CheckpointError if it is not of that form.
    """
    try:
        return _builder(kind)(data)
    except (_Unfit, RecursionError) as error:
        raise CheckpointError(f"{what} is not of torch's schema ({one_line(error, 160)})") from error


class _Unfit(Exception):
    pass


@cache
def _builder(kind: Any) -> Callable[[Any], Any]:
    """The function that checks and builds one type of the schema. Looked up late where types contain themselves."""
    if typing.get_origin(kind) is typing.Annotated:
        return _builder(typing.get_args(kind)[0])
    if isinstance(kind, typing.ForwardRef):
        return _builder(getattr(schema, kind.__forward_arg__))
    if isinstance(kind, str):
        return _builder(getattr(schema, kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return lambda data: None if data is None else _builder(inner)(data)
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return lambda data: [_builder(inner)(item) for item in _exactly(list, data)]
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        return lambda data: {key: _builder(inner)(item) for key, item in _exactly(dict, data).items()}
    if issubclass(kind, _Union):
        return _union_builder(kind)
    if dataclasses.is_dataclass(kind):
        return _class_builder(kind)
    if issubclass(kind, enum.IntEnum):
        return lambda data: _member(kind, data)
    if kind is float:
        return _float
    return lambda data: _exactly(kind, data)


def _exactly(kind: type, data: Any) -> Any:
    if type(data) is not kind:
        raise _Unfit(f"{type(data).__name__} where {kind.__name__} belongs")
    return data


def _float(data: Any) -> float:
    if type(data) is str and data in _FLOAT_WORDS:  # torch writes those as words
        return _FLOAT_WORDS[data]
    return float(data) if type(data) is int else _exactly(float, data)


def _member(kind: type[enum.IntEnum], data: Any) -> enum.IntEnum:
    try:
        return kind(_exactly(int, data))
    except ValueError:
        raise _Unfit(f"{data} is not a {kind.__name__}") from None


def _union_builder(kind: Any) -> Callable[[Any], Any]:
    fields = typing.get_type_hints(kind, globalns=vars(schema))

    def union(data: Any) -> Any:
        if len(_exactly(dict, data)) != 1:
            raise _Unfit(f"{kind.__name__} with {len(data)} values")
        ((name, value),) = data.items()
        if name not in fields:
            raise _Unfit(f"{kind.__name__} has no {name!r}")
        return kind.create(**{name: _builder(fields[name])(value)})

    return union


def _class_builder(kind: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    required = {f.name for f in fields if f.default is missing and f.default_factory is missing}

    def instance(data: Any) -> Any:
        _exactly(dict, data)
        unknown = [name for name in data if name not in hints]
        if unknown:
            raise _Unfit(f"{kind.__name__} has no {unknown[0]!r}")
        absent = required.difference(data)
        if absent:
            raise _Unfit(f"{kind.__name__} lacks {min(absent)!r}")
        return kind(**{name: _builder(hints[name])(value) for name, value in data.items()})

    return instance
