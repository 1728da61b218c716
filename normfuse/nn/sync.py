"""Statistics over all processes of data-parallel training."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from ._running_norm import RunningNorm


def convert_sync(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Let every Unified and Power Norm in ``model`` take its training statistics over a process group.

    k ranks with rows of their own then give what one process with all rows gives: output, gradient and
    statistics, also where ranks have different numbers of rows, none at all, or padding. A layer and
    direction costs one collective of C + 1 numbers. In evaluation, and in a group of one, nothing changes.

    Call it before the model is wrapped (DistributedDataParallel, ``fully_shard``) or compiled. Every rank has
    to run the same norms in the same order.

    Args:
        model: changed in place.
        process_group: the ranks that share statistics; None: all, whoever they are when training begins.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no Unified or Power Norm in ``model``.
    """
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    if not norms:
        raise ValueError(
            f"model of class {type(model).__name__} has no UnifiedNorm or PowerNorm to synchronise; "
            "put them in first, for example with normfuse.convert.swap_norms"
        )
    for norm in norms:
        norm.synchronised, norm.process_group = True, process_group
    return model
