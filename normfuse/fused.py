"""Models for inference in PyTorch without their static norms."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from normfuse.checkpoint import CheckpointError, structure
from normfuse.checkpoint.archive import one_line
from normfuse.checkpoint.arguments import signature_of
from normfuse.checkpoint.capture import Captured, capture_model
from normfuse.checkpoint.inputs import consistent_sizes, dimensions
from normfuse.checkpoint.structure import Path
from normfuse.folding import FoldError, FoldReport, fold


def fuse(
    model: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep_dynamic_norms: bool = False,
    verify: bool = True,
) -> FusedModel:
    """Return a module for inference in PyTorch with the outputs of ``model.eval()`` and without its static norms.

    Args:
        model: the model; the mode of each of its modules, its parameters and buffers stay as they are.
        example_inputs: arguments in order, a mapping by argument name, or a single argument, in any structure.
        dynamic_shapes: which sizes may vary, such as ``({0: "batch"},)``; see :meth:`ExportableModel.from_model`.
            None: all are fixed.
        kwargs: more arguments by name.
        keep_dynamic_norms: see :func:`fold`.
        verify: see :func:`fold`.

    Returns:
        A module that is called as ``model`` is. Its ``report`` says what became of each norm, its ``notes`` what
        tracing decided, such as sizes that cannot vary.

    Raises:
        FoldError: the model fails on the example inputs, cannot be traced, or holds invalid numbers; see also
            :func:`fold`.

    Example:
        >>> import normfuse
        >>> from normfuse.nn import UnifiedNorm
        >>> model, x = nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8), nn.Linear(8, 2)), torch.randn(3, 4)
        >>> fused = normfuse.fuse(model, x, ({0: "batch"},))
        >>> torch.allclose(fused(x), model.eval()(x), atol=1e-5)
        True
    """
    try:
        captured = capture_model(model, example_inputs, dynamic_shapes, kwargs, widen=False)
    except CheckpointError as error:  # there is no checkpoint here
        raise FoldError(str(error)) from error
    folded, report = fold(captured.model.program, keep_dynamic_norms=keep_dynamic_norms, verify=verify)
    return FusedModel(captured, folded, report)


class FusedModel(nn.Module):
    """A model without its static norms, for evaluation; made by :func:`fuse`.

    It is called as the model is, moves to other devices and dtypes, and can be copied and pickled. Gradients reach its
    inputs. Its parameters do not train, and ``train()`` leaves it in evaluation mode.

    Args:
        captured: the model as it was traced.
        program: the folded program.
        report: what became of each norm.

    Raises:
        ValueError: it is called with other arguments than it was made for, or with another size where sizes are fixed.

    Example:
        >>> import normfuse
        >>> fused = normfuse.fuse(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval(), (torch.randn(3, 4),))
        >>> type(fused).__name__, fused(torch.randn(3, 4)).shape
        ('FusedModel', torch.Size([3, 8]))
    """

    def __init__(self, captured: Captured, program: ExportedProgram, report: FoldReport) -> None:
        super().__init__()
        self.name, self.report = type(captured.live).__name__, report
        self.inputs, self.notes = captured.model.inputs, captured.model.notes
        self.program = _plain_module(program)
        signature = signature_of(captured.live)
        # Annotations may be of classes that cannot be pickled.
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        self.__signature__ = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        # The program takes tensors in the order in which they were given by name, which need not be the signature's.
        order = [torch.empty(0) for _ in self.inputs]
        given = self._leaves(*captured.call.with_tensors(order))
        paths = {id(leaf): path for path, leaf in given.items() if isinstance(leaf, torch.Tensor)}
        self._tensor_paths = [paths[id(tensor)] for tensor in order]
        self._constants = {path: leaf for path, leaf in given.items() if not isinstance(leaf, torch.Tensor)}
        self._returned, self._output_paths = captured.returned, captured.paths
        numbers = {path for path, leaf in structure.leaves(self._returned) if not isinstance(leaf, torch.Tensor)}
        self._is_number = [path in numbers for path in self._output_paths]
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Args:
            args: what the model takes.
            kwargs: what the model takes by name.

        Returns:
            The same structure, as computed without the norms.
        """
        tensors = self._tensors(args, kwargs)
        results = self.program(*tensors)
        results = [x.item() if number else x for x, number in zip(results, self._is_number, strict=True)]
        return structure.rebuilt(self._returned, dict(zip(self._output_paths, results, strict=True)))

    def train(self, mode: bool = True) -> FusedModel:
        """Leave the module in evaluation mode, which it was traced in.

        Args:
            mode: counts for nothing.

        Returns:
            This module.
        """
        return self

    def extra_repr(self) -> str:
        return f"{self.name}({', '.join(map(str, self.inputs))})"

    def _leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Path, Any]:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(structure.leaves(bound.arguments))

    def _tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors among the arguments; the rest must be what it was when the model was traced."""
        given = self._leaves(args, kwargs)
        tensors = [given.pop(path, None) for path in self._tensor_paths]
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"{spec.name} is {one_line(repr(tensor), 40)}; {self.name} was fused with the tensor {spec}"
                )
        for path in given.keys() | self._constants.keys():
            now, before = given.get(path), self._constants.get(path)
            if isinstance(now, torch.Tensor) or (now is not before and now != before):
                name = structure.identifier(path, "input")
                raise ValueError(
                    f"{name} is {one_line(repr(now), 40)}, but {self.name} was fused with "
                    f"{one_line(repr(before), 40)}: fuse it again with the new value"
                )
        if not torch.jit.is_tracing():  # which makes tensors of sizes
            self._check_sizes(tensors)
        return tensors

    def _decided(self) -> str:
        return f"; tracing decided: {'; '.join(self.notes)}" if self.notes else ""

    def _check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            axes = zip(spec.dims, tensor.shape, strict=False)
            if len(spec.dims) != tensor.dim() or any(isinstance(dim, int) and dim != size for dim, size in axes):
                raise ValueError(
                    f"{spec.name} has shape {list(tensor.shape)}, but {self.name} was fused for {spec}; sizes that "
                    f"vary are given a name in dynamic_shapes of fuse, such as {{0: 'batch'}}{self._decided()}"
                )
        specs = [replace(spec, dtype=tensor.dtype) for spec, tensor in zip(self.inputs, tensors, strict=True)]
        sizes = consistent_sizes(specs, tensors)
        for name, dim in dimensions(specs).items():
            if sizes[name] < dim.minimum > 1:  # nothing forbids empty tensors
                raise ValueError(f"{name} is {sizes[name]}, but {self.name} takes {dim.minimum} or more")
            if dim.maximum is not None and sizes[name] > dim.maximum:
                raise ValueError(f"{name} is {sizes[name]}, but {self.name} takes {dim.maximum} at most")


def _plain_module(program: ExportedProgram) -> GraphModule:
    """A module of tensors in and tensors out, without the hooks of torch.export, which cannot be pickled."""
    module = program.module(check_guards=False)
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph).eval().requires_grad_(False)
