"""Typical inputs of a program, by which something is chosen: looked at before anything runs on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from .report import FoldError


def typical_runs(program: ExportedProgram, given: Any, what: str) -> list[tuple[Any, ...]]:
    """The arguments of each run, in the order of the program's inputs.

    Args:
        program: that takes them.
        given: a tensor, a sequence of arguments, or a sequence of such sequences.
        what: the name of the argument, for messages.

    Raises:
        FoldError: there are none, or the program does not take them.
    """
    if isinstance(given, torch.Tensor):
        given = [(given,)]
    elif isinstance(given, Sequence) and len(given) and all(isinstance(one, torch.Tensor) for one in given):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(run, Sequence) for run in given):
        raise FoldError(f"{what} is no sequence of tensors, nor a sequence of such sequences")
    if not given:
        raise FoldError(f"{what} holds no inputs; give at least one sequence of tensors")
    wanted = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = program.graph_signature.user_inputs
    for number, run in enumerate(given):
        if len(run) != len(names):
            raise FoldError(f"{what}[{number}] holds {len(run)} inputs; the program takes {len(names)}")
        for name, value in zip(names, run, strict=True):
            like = wanted.get(name)
            if isinstance(like, torch.Tensor) and (problem := _problem(value, like)):
                raise FoldError(f"{what}[{number}], input {name!r}: {problem}")
    return [tuple(run) for run in given]


def _problem(value: Any, like: torch.Tensor) -> str:
    """Why a value cannot be this input; empty where it can."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} is no tensor"
    if value.dtype != like.dtype:
        return f"it is {value.dtype}, not {like.dtype}"
    fits = value.dim() == like.dim() and all(
        size == wanted for size, wanted in zip(value.shape, like.shape, strict=True) if isinstance(wanted, int)
    )
    if not fits:
        sizes = ", ".join(str(size) if isinstance(size, int) else "any" for size in like.shape)
        return f"its shape is {list(value.shape)}, not [{sizes}]"
    return "" if value.numel() else f"it is empty, of shape {list(value.shape)}"
