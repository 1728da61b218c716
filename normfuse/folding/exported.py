"""Copies of the parts of an exported program, and a program made of such parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph


def copy_graph(graph: Graph) -> Graph:
    """The same operations under the same names."""
    result = copy.deepcopy(graph)
    for copied, node in zip(result.nodes, graph.nodes, strict=True):
        copied.name = node.name  # a copy renames what shadows a builtin, such as an input called "input"
    return result


def copy_signature(signature: ExportGraphSignature) -> ExportGraphSignature:
    """A signature whose entries can be replaced."""
    specs = (signature.input_specs, signature.output_specs)
    return ExportGraphSignature(*([replace(spec, arg=replace(spec.arg)) for spec in side] for side in specs))


def rebuild(
    program: ExportedProgram,
    graph: Graph,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
    bodies: Mapping[str, torch.nn.Module],
) -> ExportedProgram:
    """A program that is called like `program` and runs `graph`; `bodies` are the graphs that this one calls."""
    called = {node.target for node in graph.nodes if node.op == "get_attr"}
    result = ExportedProgram(
        root={name: copy.deepcopy(body) for name, body in bodies.items() if name in called},
        graph=graph,
        graph_signature=signature,
        state_dict=dict(state_dict),
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=[_copy_entry(entry) for entry in program.module_call_graph],
        example_inputs=program.example_inputs,
        constants=dict(constants),
        verifiers=program.verifiers,
    )
    result.graph_module.meta.update(program.graph_module.meta)
    return result


def _copy_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    signature = entry.signature
    if signature is not None:
        signature = replace(signature, inputs=list(signature.inputs), outputs=list(signature.outputs))
    return replace(entry, signature=signature)
