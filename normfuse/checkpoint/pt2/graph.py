"""A graph from a file, gone through operation by operation before torch builds anything from it.

Every name is defined once and before it is read, every target is one that is allowed, every operand fits its
operation, and every shape that the file claims is what the operation gives at the sizes of the example. Bodies of
``torch.no_grad()`` and of autocast that is switched off are put where they are called.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._export.serde import schema

from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2 import arguments, targets
from normfuse.checkpoint.pt2.arguments import CPU, POSITIONAL
from normfuse.checkpoint.pt2.shapes import ShapeRunner
from normfuse.checkpoint.pt2.symbols import LARGEST_SIZE, Number, Symbols, symbol_of
from normfuse.checkpoint.pt2.tensors import DTYPES
from normfuse.errors import one_line

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# What torch.fx calls things of its own in the code that it makes of a graph.
_TAKEN = {"torch", "math", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "self", "output", "as_none"}
_OF_NUMBER = {"as_sym_int": int, "as_sym_float": float, "as_sym_bool": bool}


def sizes_of(graphs: Iterable[schema.Graph]) -> dict[str, int]:
    """The size of each symbol in the example, from everything that says so in the file.

    CheckpointError where it says two things.
    """
    sizes: dict[str, int] = {}
    for graph in graphs:
        metas = [size for meta in graph.tensor_values.values() for size in (*meta.sizes, *meta.strides)]
        for size in (*metas, *graph.sym_int_values.values()):
            hint: Any = size.value.hint if str(size.type) == "as_expr" else None
            symbol = symbol_of(size.value.expr_str) if hint is not None else None
            if symbol is None:
                continue
            if str(hint.type) != "as_int" or not 0 <= hint.value < LARGEST_SIZE:
                raise CheckpointError(f"size {symbol} of the example is not a size")
            if sizes.setdefault(symbol, hint.value) != hint.value:
                raise CheckpointError(f"size {symbol} of the example is {hint.value} here, {sizes[symbol]} there")
    return sizes


def all_graphs(graph: schema.Graph) -> list[schema.Graph]:
    """The graph and the bodies in it."""
    found = [graph]
    for node in graph.nodes:
        for item in node.inputs:
            if str(item.arg.type) == "as_graph":
                found += all_graphs(item.arg.as_graph.graph)
    return found


class GraphReader:
    """Builds a graph that holds checked operations only.

    Args:
        symbols: reads sizes.
        runner: tells shapes.
    """

    def __init__(self, symbols: Symbols, runner: ShapeRunner) -> None:
        self._symbols, self._runner = symbols, runner
        self._values: dict[str, Any] = {}
        self._from_inputs: set[str] = set()
        self._counts: dict[str, int] = {}
        self._results: list[str] = []
        self.graph = schema.Graph([], [], [], {}, {}, {})

    def placeholder(self, name: str, claims: schema.Graph, stored: torch.Tensor | None) -> str:
        """Declares an input of the program, or a stored tensor; returns its name in the new graph.

        Its shape then must be what the file claims.
        """
        meta = _of(claims.tensor_values, name)
        if stored is None:
            dtype, sizes, strides = self._shape(meta, name)
        else:
            dtype, sizes, strides = stored.dtype, list(stored.shape), list(stored.stride())
        new = self._free(name)
        self._define(new, self._runner.tensor(dtype, sizes, strides), meta)
        if stored is None:
            self._from_inputs.add(new)
        else:
            self.graph.tensor_values[new].strides = [schema.SymInt.create(as_int=stride) for stride in strides]
        self.graph.inputs.append(schema.Argument.create(as_tensor=schema.TensorArgument(new)))
        return new

    def walk(self, graph: schema.Graph, names: dict[str, str]) -> None:
        """Checks the operations of one graph and adds them.

        ``names`` leads from names of this graph to names of the new one; it holds the placeholders already, and gets
        what the operations define.
        """
        for node in graph.nodes:
            try:
                if node.target in (targets.GRAD_REGION, targets.AUTOCAST_REGION):
                    self._region(node, names)
                else:
                    self._operation(node, graph, names)
            except CheckpointError as error:
                raise CheckpointError(f"at {one_line(node.name or node.target, 60)}: {error}") from error

    def lookup(self, names: Mapping[str, str], name: str, tensor: bool) -> tuple[str, Any]:
        """The new name and the value of a name.

        CheckpointError if it is not defined, or not a tensor where one belongs.
        """
        if name not in names:
            raise CheckpointError(f"{one_line(name, 60)!r} is read before it is computed")
        value = self._values[names[name]]
        if isinstance(value, torch.Tensor) != tensor:
            raise CheckpointError(f"{one_line(name, 60)!r} is {'no ' if tensor else 'a '}tensor")
        return names[name], value

    # -- operations --------------------------------------------------------------------------------------------

    def _operation(self, node: schema.Node, claims: schema.Graph, names: dict[str, str]) -> None:
        function = targets.resolve(node.target)
        read: list[str] = []

        def lookup(name: str, tensor: bool) -> tuple[str, Any]:
            found = self.lookup(names, name, tensor)
            read.append(found[0])
            return found

        if targets.is_on_sizes(node.target):
            bound, args, kwargs = [], list[Any](), dict[str, Any]()
            for item in node.inputs:
                argument, value = arguments.read(item.arg, lookup)
                bound.append(schema.NamedArgument(item.name, argument, POSITIONAL))
                args.append(_number(value))
            result: Any = _on_sizes(function, args)
        else:
            bound, args, kwargs = arguments.bind(function, node.inputs, lookup)
            constant = self._from_inputs.isdisjoint(read)
            result = self._runner.run(function, args, kwargs, constant)
        earlier = len(self._results)
        outputs = self._outputs(node, result, claims, names)
        if not self._from_inputs.isdisjoint(read):
            self._from_inputs.update(self._results[earlier:])
        metadata = {"nn_module_stack": stack} if (stack := _module_stack(node.metadata)) else {}
        name = self._node_name(node, outputs)
        self.graph.nodes.append(schema.Node(node.target, bound, outputs, metadata, None, name))

    def _node_name(self, node: schema.Node, outputs: list[schema.Argument]) -> str:
        if [str(output.type) for output in outputs] == ["as_tensor"]:
            return outputs[0].as_tensor.name
        return self._free(node.name if node.name and _NAME.fullmatch(node.name) else "parts")

    def _outputs(
        self, node: schema.Node, result: Any, claims: schema.Graph, names: dict[str, str]
    ) -> list[schema.Argument]:
        """The results under their new names, after what the file claims of them was compared with what they are."""
        if result is None:
            if any(str(output.type) != "as_none" for output in node.outputs):
                raise CheckpointError("it names results of an operation that has none")
            return []
        if isinstance(result, list):
            if [str(output.type) for output in node.outputs] != ["as_tensors"] or not result:
                raise CheckpointError("its results are not named as a list")
            items = node.outputs[0].as_tensors
            parts = [self._result(item.name, part, claims, names) for item, part in _paired(items, result)]
            return [schema.Argument.create(as_tensors=[schema.TensorArgument(name) for name in parts])]
        results = result if isinstance(result, tuple) else (result,)
        outputs = []
        for output, value in _paired(node.outputs, results):
            kind = str(output.type)
            if value is None and kind == "as_none":
                outputs.append(output)
            elif isinstance(value, torch.Tensor) and kind == "as_tensor":
                name = self._result(output.as_tensor.name, value, claims, names)
                outputs.append(schema.Argument.create(as_tensor=schema.TensorArgument(name)))
            elif type(value) is _OF_NUMBER.get(kind) and str(output.value.type) == "as_name":
                name = self._result(output.value.as_name, value, claims, names)
                outputs.append(schema.Argument.create(**{kind: type(output.value).create(as_name=name)}))
            else:
                raise CheckpointError(f"a result is a {type(value).__name__}, and named as {kind}")
        return outputs

    def _result(self, name: str, value: Any, claims: schema.Graph, names: dict[str, str]) -> str:
        if name in names:
            raise CheckpointError(f"{one_line(name, 60)!r} is computed twice")
        new = names[name] = self._free(name)
        self._results.append(new)
        if isinstance(value, torch.Tensor):
            self._define(new, value, _of(claims.tensor_values, name))
        elif isinstance(value, bool):
            self.graph.sym_bool_values[new] = self._size(_of(claims.sym_bool_values, name), value, schema.SymBool)
            self._values[new] = value
        elif isinstance(value, int):
            self.graph.sym_int_values[new] = self._size(_of(claims.sym_int_values, name), value, schema.SymInt)
            self._values[new] = value
        else:
            self.graph.sym_float_values[new] = self._size(_of(claims.sym_float_values, name), value, schema.SymFloat)
            self._values[new] = value
        return new

    def _region(self, node: schema.Node, names: dict[str, str]) -> None:
        """Puts the body of a region where it is called; its names become new ones."""
        operands = [item.arg for item in node.inputs]
        kinds = [str(operand.type) for operand in operands]
        if node.target == targets.AUTOCAST_REGION:
            if kinds[2:3] != ["as_bool"] or operands[2].as_bool:
                raise CheckpointError("autocast is on in a part of it: cast there by hand, or export the model without")
            operands, kinds = operands[4:], kinds[4:]
        else:
            operands, kinds = operands[1:], kinds[1:]
        if kinds[:1] != ["as_graph"]:
            raise CheckpointError("a region has no body")
        body = operands[0].as_graph.graph
        inner: dict[str, str] = {}
        for outside, inside in _paired(operands[1:], body.inputs):
            inner[_name_in(inside)] = self.lookup(names, _name_in(outside), str(outside.type) == "as_tensor")[0]
        self.walk(body, inner)
        outputs = node.outputs[0].as_tensors if [str(o.type) for o in node.outputs] == ["as_tensors"] else node.outputs
        for outside, inside in _paired(outputs, body.outputs):
            name = outside.name if isinstance(outside, schema.TensorArgument) else _name_in(outside)
            if name in names:
                raise CheckpointError(f"{one_line(name, 60)!r} is computed twice")
            names[name] = self.lookup(inner, _name_in(inside), str(inside.type) == "as_tensor")[0]

    # -- names and shapes --------------------------------------------------------------------------------------

    def _free(self, name: str) -> str:
        if not _NAME.fullmatch(name) or name.startswith("__") or len(name) > 300:
            raise CheckpointError(f"{one_line(repr(name), 60)} is not a valid name")
        new = name
        while new in self._counts or new in _TAKEN or keyword.iskeyword(new):
            self._counts[name] = self._counts.get(name, 0) + 1
            new = f"{name}_{self._counts[name]}"
        self._counts[new] = 0
        return new

    def _define(self, name: str, value: torch.Tensor, claim: schema.TensorMeta) -> None:
        dtype, sizes, _ = self._shape(claim, name)
        if (dtype, sizes) != (value.dtype, list(value.shape)):
            raise CheckpointError(
                f"{one_line(name, 60)} is said to be {dtype} {sizes}, and is {value.dtype} {list(value.shape)}"
            )
        self._values[name] = value
        self.graph.tensor_values[name] = schema.TensorMeta(
            dtype=claim.dtype,
            sizes=[self._in_sympy(size) for size in claim.sizes],
            requires_grad=False,
            device=CPU,
            strides=[self._in_sympy(size) for size in claim.strides],
            storage_offset=schema.SymInt.create(as_int=0),
            layout=schema.Layout.Strided,
        )

    def _shape(self, claim: schema.TensorMeta, name: str) -> tuple[torch.dtype, list[int], list[int]]:
        """Dtype, sizes and strides that the file claims, at the sizes of the example."""
        if claim.dtype not in DTYPES or claim.layout != schema.Layout.Strided or len(claim.strides) != len(claim.sizes):
            raise CheckpointError(f"{one_line(name, 60)} is not a dense tensor of a dtype that can be read")
        numbers: list[Any] = [self._at_example(size) for size in (*claim.sizes, *claim.strides)]
        for number in numbers:
            if type(number) is not int or not 0 <= number <= LARGEST_SIZE:
                raise CheckpointError(f"{one_line(name, 60)} has a size or stride of {one_line(str(number), 40)}")
        return DTYPES[claim.dtype], numbers[: len(claim.sizes)], numbers[len(claim.sizes) :]

    def _at_example(self, size: Any) -> Number:
        if str(size.type) != "as_expr":
            return size.value
        value = self._symbols.read(size.value.expr_str).value
        # Halves of sizes are fractions on the way to a whole number.
        return int(value) if not isinstance(value, (bool, float)) and value == int(value) else value

    def _size(self, claim: Any, value: Number, kind: Any) -> Any:
        claimed = self._at_example(claim)
        if type(claimed) is not type(value) or claimed != value:
            raise CheckpointError(
                f"a size is said to be {one_line(str(claimed), 40)}, and is {one_line(str(value), 40)}"
            )
        return self._in_sympy(claim, kind)

    def _in_sympy(self, size: Any, kind: Any = schema.SymInt) -> Any:
        """The size with sympy's object in the place of text, so that nothing parses it again."""
        if str(size.type) != "as_expr":
            return size
        expression = self._symbols.read(size.value.expr_str)
        if not expression.sympy.free_symbols and kind is schema.SymInt:
            return schema.SymInt.create(as_int=int(expression.value))
        hint = schema.SymExprHint.create(as_int=int(expression.value)) if kind is schema.SymInt else None
        if kind is schema.SymFloat:
            hint = schema.SymExprHint.create(as_float=float(expression.value))
        return kind.create(as_expr=schema.SymExpr(expression.sympy, hint))


def _of(claims: Mapping[str, Any], name: str) -> Any:
    if name not in claims:
        raise CheckpointError(f"nothing says what {one_line(name, 60)!r} is")
    return claims[name]


def _paired(left: Any, right: Any) -> list[tuple[Any, Any]]:
    if len(left) != len(right):
        raise CheckpointError(f"{len(right)} results or operands are named as {len(left)}")
    return list(zip(left, right, strict=True))


def _name_in(argument: schema.Argument) -> str:
    kind = str(argument.type)
    if kind == "as_tensor":
        return argument.as_tensor.name
    if kind in _OF_NUMBER and str(argument.value.type) == "as_name":
        return argument.value.as_name
    raise CheckpointError(f"a region takes or returns {one_line(repr(argument), 60)}")


def _number(value: Any) -> Number:
    if type(value) not in (int, float, bool):
        raise CheckpointError(f"arithmetic on sizes is given a {type(value).__name__}")
    return value


def _on_sizes(function: Any, args: list[Number]) -> Number:
    try:
        if function.__name__ in ("pow", "lshift", "rshift") and not 0 <= args[1] <= 62:
            raise ArithmeticError("the right operand is not between 0 and 62")
        result: Any = _number(function(*args))
    except CheckpointError:
        raise
    except Exception as error:  # TypeError for operands, ZeroDivisionError, OverflowError
        raise CheckpointError(f"{function.__name__} of sizes fails ({one_line(error, 80)})") from error
    if not abs(result) < 1 << 62:
        raise CheckpointError("a size leaves 62 bits")
    return result


def _module_stack(metadata: Mapping[str, str]) -> str | None:
    """Where in the model an operation comes from, as text; None if it has another form than torch writes."""
    text = metadata.get("nn_module_stack", "")
    if len(text) > 8000 or not text.isprintable():
        return None
    for entry in text.split(";"):
        depth, commas = 0, 0
        for character in entry:
            depth += (character in "[(") - (character in ")]")
            commas += character == "," and depth == 0
        if commas != 2:
            return None
    return text
