"""Operations of the ``normfuse`` namespace: one dispatcher entry each, whoever computes it.

The compiled library declares the operations and brings kernels for the devices it was built for. Wherever it
has none (it was not built, or the tensors are on another device) the dispatcher falls back to the PyTorch
reference registered here. Callers see one operation either way, and so do ``torch.compile`` and its
partitioner, which must not look inside: recomputing a part of a forward pass in the backward pass would read
statistics that have moved on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from .. import _native
from ._derivatives import transformed
from ._recompute import FORWARDS, keep_in_checkpoints, recompute_safe

library = torch.library.Library("normfuse", "FRAGMENT")


@cache
def _warn_slow(device_type: str) -> None:
    reason = f"has no kernels for {device_type}" if _native.available else f"is {_native.unavailable_reason}"
    warnings.warn(
        f"normfuse runs its PyTorch reference on {device_type}, which is slow: the compiled library {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def register_operation(
    name: str,
    reference: Callable[..., object],
    fake: Callable[..., object],
    *,
    mutates: tuple[str, ...] = (),
    in_library: bool = True,
) -> torch._ops.OpOverload:
    """Make ``reference`` the fallback of operation ``name``, which is declared if the library has not.

    ``fake`` makes empty results of the right shapes, for programs that are traced. ``mutates`` names the arguments
    updated in place. ``in_library=False``: the compiled library knows nothing of this operation, ``reference`` is all
    there is. Returns the operation.
    """
    if not hasattr(torch.ops.normfuse, name):
        library.define(name + torch.library.infer_schema(reference, mutates_args=mutates))

    @wraps(reference)
    def fallback(x: Tensor, *args: object) -> object:
        _warn_slow(x.device.type)
        return reference(x, *args)

    library.impl(name, fallback if in_library else reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normfuse::{name}", fake, lib=library)
    return getattr(torch.ops.normfuse, name).default


def register_forward(
    name: str,
    reference: Callable[..., object],
    fake: Callable[..., object],
    *,
    statistics: tuple[str, ...],
    mutates: tuple[str, ...] = (),
    in_library: bool = True,
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """:func:`register_operation` of a forward that moves ``statistics``, and the form of it for compiled code.

    That form knows a recomputation at run time, see :mod:`._recompute`. ``mutates``: what else is updated in place.
    """
    operation = register_operation(name, reference, fake, mutates=(*statistics, *mutates), in_library=in_library)
    positions = [i for i, argument in enumerate(operation._schema.arguments) if argument.name in statistics]
    safe = f"{name}_recompute_safe"
    library.define(safe + str(operation._schema).removeprefix(operation._schema.name))
    library.impl(safe, recompute_safe(operation, positions), "CompositeExplicitAutograd")
    torch.library.register_fake(f"normfuse::{safe}", fake, lib=library)
    forms = operation, getattr(torch.ops.normfuse, safe).default
    FORWARDS.update(forms)
    keep_in_checkpoints(forms[1])
    return forms


def register_composition(function: Callable[..., object]) -> None:
    """Make ``function``, a composition of ATen operations that autograd sees through, an operation of that name.

    ``csrc/autograd.cpp`` reaches it so.
    """
    library.define(function.__name__ + torch.library.infer_schema(function, mutates_args=()))
    library.impl(function.__name__, function, "CompositeImplicitAutograd")


def can_run_cpp_autograd(x: Tensor, channel_dim: int = -1, skipped: Tensor | None = None) -> bool:
    """Whether a training step on ``x`` can run its autograd in C++: see ``csrc/autograd.cpp``."""
    return (
        _native.autograd is not None
        and skipped is None
        and type(x) is Tensor
        and channel_dim in (-1, x.dim() - 1)
        and not torch.compiler.is_compiling()
        and not transformed()
    )
