"""Exporting small static programs in milliseconds, for the soak: the graph that `torch.export` makes.

`torch.export` runs a model on fake tensors under several layers of modes, which takes a fifth of a second for programs
as small as those of the soak. :func:`quick_export` runs it once on real tensors under one mode at the same dispatch key
and writes down the operations. ``test_quick_export.py`` holds its programs to those of `torch.export`, node by node.

What it does not do, and the soak's plans do not need: dynamic shapes, operations that return sizes or numbers,
autocast, gradients, nested or keyword inputs, tied parameters, and strides (folding reads none).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.graph import _snake_case
from torch.fx.node import map_aggregate
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

aten = torch.ops.aten
_FAKE_MODE = FakeTensorMode()
_FAKES: dict[tuple[object, ...], FakeTensor] = {}


def quick_export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The program of a model in evaluation mode, for these inputs' shapes.

    Args:
        model: takes tensors as positional arguments and returns a tuple of tensors; no parameter is tied.
        inputs: example inputs.
    """
    recorder = _Recorder(model, inputs)
    without_cudnn = torch.backends.cudnn.flags(enabled=False)  # as torch.export sets it: operations carry it around
    with torch.no_grad(), without_cudnn, recorder.modules(), enable_python_dispatcher(), recorder:
        outputs = model(*inputs)
    return recorder.program(model, inputs, outputs)


def _fake(tensor: Tensor) -> FakeTensor:
    """A fake tensor of this shape and dtype; nobody changes those of a graph, so that equal ones are one."""
    key = (tensor.shape, tensor.dtype)
    if key not in _FAKES:
        with _FAKE_MODE:
            _FAKES[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return _FAKES[key]


class _Recorder(ProxyTorchDispatchMode):
    """Writes every ATen operation into a graph. Only the tracer's own mode may stand in front of autograd's kernels."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(None, "real", pre_dispatch=True)
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.alive: list[Tensor] = []  # an id belongs to a tensor while it lives
        self.specs: list[InputSpec] = []
        self.constants: dict[str, Tensor] = {}
        self.paths = {module: path for path, module in model.named_modules()}
        self.calls: dict[str, int] = {}
        self.stack: list[dict[str, tuple[str, str]]] = [{}]
        for name, parameter in model.named_parameters():
            self._placeholder("p_" + name.replace(".", "_"), parameter, InputKind.PARAMETER, name)
        for name, buffer in model.named_buffers():
            self._placeholder("b_" + name.replace(".", "_"), buffer, InputKind.BUFFER, name)
        names = list(inspect.signature(model.forward).parameters)
        first, *_ = [self._placeholder(*named, InputKind.USER_INPUT, None) for named in zip(names, inputs, strict=True)]
        self._behind_constants = first

    def _placeholder(self, name: str, tensor: Tensor, kind: InputKind, target: str | None) -> Node:
        node = self.graph.placeholder(name)
        self._is(tensor, node)
        persistent = True if kind is InputKind.BUFFER else None
        self.specs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
        return node

    def _is(self, tensor: Tensor, node: Node) -> None:
        node.meta["val"] = _fake(tensor)
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            self._lift(args[0])
            func = aten.lift_fresh_copy.default
        elif func is aten.to.dtype:
            about = {"dtype": args[0].dtype, "device": args[0].device, "layout": args[0].layout}
            self._call(aten._assert_tensor_metadata.default, args[:1], about, None)
        self._call(func, args, kwargs, result)
        return result

    def _lift(self, tensor: Tensor) -> None:
        """A tensor that the forward makes of numbers, or closes over, becomes a constant of the program."""
        name = f"lifted_tensor_{len(self.constants)}"
        self.constants[name] = tensor
        with self.graph.inserting_before(self._behind_constants):
            self._placeholder("c_" + name, tensor, InputKind.CONSTANT_TENSOR, name)

    def _call(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        def read(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in self.nodes:
                self._lift(value)
            return self.nodes[id(value)]

        node = self._node(func, map_aggregate(args, read), map_aggregate(kwargs, read))
        if isinstance(result, Tensor):
            self._is(result, node)
        elif result is not None:
            node.meta["val"] = [_fake(part) for part in result]
            for index, part in enumerate(result):
                self._is(part, self._node(operator.getitem, (node, index), {}))

    def _node(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Node:
        check = func is aten._assert_tensor_metadata.default
        name = None if check else _snake_case(getattr(func, "_opname", "getitem"))
        node = self.graph.create_node("call_function", func, args, kwargs, name)
        node.meta["nn_module_stack"] = self.stack[-1]
        return node

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keep track of the modules that are running."""

        def enter(module: nn.Module, args: object) -> None:
            path, kind = self.paths[module], type(module)
            count = self.calls[path] = self.calls.get(path, -1) + 1
            key = f"L__self__{path}" + (f"@{count}" if count else "")
            self.stack.append(self.stack[-1] | {key: (path, f"{kind.__module__}.{kind.__qualname__}")})

        def leave(module: nn.Module, args: object, result: object) -> None:
            self.stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def program(self, model: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> ExportedProgram:
        """The program of what was recorded; of what nobody reads, only inputs stay."""
        results = tuple(self.nodes[id(output)] for output in outputs)
        self.graph.output(results)
        self.graph.eliminate_dead_code()
        order = {node.name: position for position, node in enumerate(self.graph.nodes)}
        signature = ExportGraphSignature(
            sorted(self.specs, key=lambda spec: order[spec.arg.name]),
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
        )
        names = list(inspect.signature(model.forward).parameters)
        spec_in, spec_out = pytree.tree_structure((inputs, {})), pytree.tree_structure(outputs)
        return ExportedProgram(
            root=nn.Module(),
            graph=self.graph,
            graph_signature=signature,
            state_dict=dict(model.named_parameters()) | dict(model.named_buffers()),
            range_constraints={},
            module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], spec_in, spec_out, names))],
            example_inputs=(inputs, {}),
            constants=self.constants,
            verifiers=[TrainingIRVerifier],
        )
