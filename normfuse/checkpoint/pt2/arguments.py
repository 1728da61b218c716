"""Operands in a file: what they are, and the names in them."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

import torch
from torch._export.serde import schema

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2.tensors import DTYPES
from normfuse.errors import one_line

_MEMORY_FORMATS = {
    schema.MemoryFormat.ContiguousFormat: torch.contiguous_format,
    schema.MemoryFormat.ChannelsLast: torch.channels_last,
    schema.MemoryFormat.ChannelsLast3d: torch.channels_last_3d,
    schema.MemoryFormat.PreserveFormat: torch.preserve_format,
}
_PLAIN = {"as_int", "as_float", "as_bool", "as_ints", "as_floats", "as_bools"}
_SIZES = {"as_sym_int", "as_sym_float", "as_sym_bool"}
_SIZE_LISTS = {"as_sym_ints", "as_sym_floats", "as_sym_bools"}
_LONGEST_TEXT = 1000
# Which kinds of operands each type of ATen's schemas takes. ATen itself takes some numbers for others and does not
# survive every one of them.
_KINDS = {
    "Tensor": {"as_tensor", "as_int", "as_float", "as_bool", "as_complex", *_SIZES},
    "List[Tensor]": {"as_tensors"},
    "List[Optional[Tensor]]": {"as_optional_tensors", "as_tensors"},
    "int": {"as_int", "as_sym_int"},
    "List[int]": {"as_ints", "as_sym_ints"},
    "float": {"as_float", "as_int", "as_sym_float", "as_sym_int"},
    "List[float]": {"as_floats", "as_ints", "as_sym_floats"},
    "number": {"as_int", "as_float", "as_bool", "as_complex", *_SIZES},
    "List[number]": {"as_ints", "as_floats", "as_bools", *_SIZE_LISTS},
    "bool": {"as_bool", "as_sym_bool"},
    "List[bool]": {"as_bools", "as_sym_bools"},
    "str": {"as_string"},
    "ScalarType": {"as_scalar_type"},
    "MemoryFormat": {"as_memory_format"},
    "Layout": {"as_layout"},
    "Device": {"as_device"},
}

Lookup = Callable[[str, bool], tuple[str, Any]]
POSITIONAL, KEYWORD = schema.ArgumentKind.POSITIONAL, schema.ArgumentKind.KEYWORD


def read(argument: schema.Argument, lookup: Lookup) -> tuple[schema.Argument, Any]:
    """The operand with the names that ``lookup`` gives it, on the CPU, and its value.

    CheckpointError for kinds that have no place in a file (other functions, objects, graphs).

    ``lookup(name, tensor)`` returns the new name and the value of a name in the file.
    """
    kind, value = str(argument.type), argument.value
    if kind in _PLAIN:
        return argument, value
    if kind == "as_none":
        return argument, None
    if kind == "as_tensor":
        name, found = lookup(value.name, True)
        return _made(kind, schema.TensorArgument(name)), found
    if kind == "as_tensors":
        named = [lookup(item.name, True) for item in value]
        return _made(kind, [schema.TensorArgument(name) for name, _ in named]), [found for _, found in named]
    if kind == "as_optional_tensors":
        pairs = [_optional(item, lookup) for item in value]
        return _made(kind, [item for item, _ in pairs]), [found for _, found in pairs]
    if kind in _SIZES:
        item, found = _size(value, lookup)
        return _made(kind, item), found
    if kind in _SIZE_LISTS:
        pairs = [_size(item, lookup) for item in value]
        return _made(kind, [item for item, _ in pairs]), [found for _, found in pairs]
    if kind == "as_string" and len(value) <= _LONGEST_TEXT:
        return argument, value
    if kind == "as_complex":
        return argument, complex(value.real, value.imag)
    if kind == "as_scalar_type" and value in DTYPES:
        return argument, DTYPES[value]
    if kind == "as_memory_format" and value in _MEMORY_FORMATS:
        return argument, _MEMORY_FORMATS[value]
    if kind == "as_layout" and value == schema.Layout.Strided:
        return argument, torch.strided
    if kind == "as_device":
        return _made(kind, CPU), torch.device("cpu")
    raise CheckpointError(f"an operand is {one_line(repr(argument), 80)}, which cannot be in a file")


CPU = schema.Device("cpu", None)


def bind(
    operation: torch._ops.OpOverload, inputs: list[schema.NamedArgument], lookup: Lookup
) -> tuple[list[schema.NamedArgument], list[Any], dict[str, Any]]:
    """Operands in the order of the operation's schema, positional or not, and the values to call it with.

    CheckpointError if one has a name that the schema has not, is there twice, or would be taken for another.
    """
    given = {item.name: item for item in inputs}
    known = [argument.name for argument in operation._schema.arguments]
    if len(given) != len(inputs) or not set(given) <= set(known):
        raise CheckpointError(f"{operation} takes {', '.join(known)}; given are {', '.join(i.name for i in inputs)}")
    bound, args, kwargs = [], list[Any](), dict[str, Any]()
    for index, expected in enumerate(operation._schema.arguments):
        item = given.get(expected.name)
        if item is None:
            continue
        argument, value = read(item.arg, lookup)
        if not _fits(str(expected.real_type), str(argument.type), value):
            raise CheckpointError(f"operand {expected.name!r} of {operation} is {argument.type}, not {expected.type}")
        by_name = expected.kwarg_only or item.kind == KEYWORD
        if item.kind not in (POSITIONAL, KEYWORD):  # files of older torch do not say
            by_name = expected.kwarg_only or expected.has_default_value()
        if by_name and not keyword.iskeyword(expected.name):
            kwargs[expected.name] = value
        elif len(args) == index:
            args.append(value)
        else:
            raise CheckpointError(f"operand {expected.name!r} of {operation} stands where another belongs")
        bound.append(schema.NamedArgument(expected.name, argument, POSITIONAL if len(args) > index else KEYWORD))
    return bound, args, kwargs


def _fits(expected: str, kind: str, value: Any) -> bool:
    if expected.startswith("Optional["):
        return kind == "as_none" or _fits(expected.removeprefix("Optional[")[:-1], kind, value)
    empty = isinstance(value, list) and not value and expected.startswith("List[")  # torch writes it as any list
    return empty or kind in _KINDS.get(expected, ())


def _made(kind: str, value: Any) -> schema.Argument:
    return schema.Argument.create(**{kind: value})


def _optional(item: schema.OptionalTensorArgument, lookup: Lookup) -> tuple[schema.OptionalTensorArgument, Any]:
    if str(item.type) == "as_none":
        return item, None
    name, found = lookup(item.value.name, True)
    return schema.OptionalTensorArgument.create(as_tensor=schema.TensorArgument(name)), found


def _size(item: Any, lookup: Lookup) -> tuple[Any, Any]:
    if str(item.type) != "as_name":
        return item, item.value
    name, found = lookup(item.as_name, False)
    return type(item).create(as_name=name), found
