"""The fast path of torch's encoders computes LayerNorms of its own, whatever norms the layers hold.

In evaluation without gradients ``torch.nn.TransformerEncoderLayer`` reads ``weight``, ``bias`` and ``eps`` of its norms
and does not call them. A layer with another norm has to be told to stay off that path.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def call_norms(module: nn.Module) -> None:
    """Let ``module``, where it is a layer of torch's encoder or the encoder, call its norms in evaluation too."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # the fast path is for these two activations
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False  # which only layers on the fast path take


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    # Inside compiled code other modules may be half made: nothing must look at them.
    if torch.compiler.is_compiling() or not isinstance(parent, nn.TransformerEncoderLayer) or child is None:
        return
    classes = (base for module in child.modules() for base in type(module).__mro__)
    if any(base.__module__.startswith("normfuse.") for base in classes):
        call_norms(parent)


# People exchange norms by hand too: ``layer.norm1 = UnifiedNorm(64)``.
register_module_module_registration_hook(_registered)
