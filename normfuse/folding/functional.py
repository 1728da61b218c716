"""Programs without in-place operations and without torch.vmap, whose operations are those on whole batches."""

from __future__ import annotations

from torch._C import _functorch
from torch.export import ExportedProgram

from .spellings import make_norm_whole


def has_vmap(program: ExportedProgram) -> bool:
    """Whether torch.vmap ran while the program was traced: it is then recorded, and not what it made of operations."""
    return any(getattr(node.target, "__module__", "") == "torch._functorch.predispatch" for node in program.graph.nodes)


def functionalised(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operations and without torch.vmap, its norms whole."""
    level = _functorch.maybe_current_level()
    try:
        program = program.run_decompositions({})
    finally:
        while _functorch.maybe_current_level() != level:  # a run that fails inside of torch.vmap leaves it open
            _functorch._vmap_decrement_nesting()
    for node in program.graph.nodes:
        make_norm_whole(node)
    program.graph.eliminate_dead_code()
    return program
