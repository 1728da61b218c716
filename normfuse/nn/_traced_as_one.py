"""Norms in graphs of torch.fx and TorchScript."""

from __future__ import annotations

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "refuse_script", "traced_as_one"]


def traced_as_one(norm: nn.Module, x: Proxy, *others: object, **named: object) -> Proxy:
    """The call of ``norm`` as one node of the graph that ``torch.fx.symbolic_trace`` makes, as for torch's own modules.

    A norm begins its forward with ``if isinstance(x, Proxy)``: what it decides by shapes, masks and its mode is then
    decided when the traced model runs.
    """
    path = x.tracer.path_of_module(norm)
    if not path:
        raise TypeError(
            f"{type(norm).__name__} cannot be traced symbolically on its own: it is one node of a model's graph. Trace "
            "a model that holds it, such as nn.Sequential(norm)"
        )
    return x.tracer.create_proxy("call_module", path, (x, *others), named)


def refuse_script(norm: nn.Module) -> nn.Module:
    """As ``__prepare_scriptable__``: what ``torch.jit.script`` calls before it reads a module's code."""
    raise TypeError(
        f"torch.jit.script cannot compile {type(norm).__name__}; trace the model in evaluation instead "
        "(torch.jit.trace(model.eval(), x)), or export it with torch.export or normfuse.onnx.export"
    )
