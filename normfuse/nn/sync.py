"""Statistics over all processes of data-parallel training."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from ._running_norm import running_norms
from .region_norm import LearnableRegionNorm, RegionNorm


def convert_sync(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Compute the training statistics of every norm with running statistics in ``model`` over a process group.

    k ranks then give the same outputs, gradients and statistics as one process with all rows, also if ranks have
    different numbers of rows, none at all, or padding. Each layer costs one collective forward and one backward, of
    about C numbers (2C in the BatchNorm family, which has a mean as well). In evaluation, and in a group of one,
    nothing changes. A DomainSplitNorm shares the statistics of each domain.

    Call it before the model is wrapped (DistributedDataParallel, ``fully_shard``) or compiled. Every rank has to run
    the same norms in the same order. BatchNorms of PyTorch are not changed; use
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` for them.

    Args:
        model: changed in place.
        process_group: the ranks that share statistics; None: all ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such norm, or one has ``ghost_size``, or is a RegionNorm with ``pool="batch"``. The
            model is then unchanged.

    Example:
        >>> from normfuse.nn import UnifiedNorm, convert_sync
        >>> model = convert_sync(nn.Sequential(nn.Linear(4, 8), UnifiedNorm(8)))  # then DistributedDataParallel(model)
    """
    norms = running_norms(model, "to synchronise", "torch.nn.SyncBatchNorm.convert_sync_batchnorm")
    for name, norm in norms.items():
        if norm.ghost_size is not None:
            raise ValueError(
                f"{name} ({type(norm).__name__}) has ghost_size={norm.ghost_size}: ghost batches are parts of a rank's "
                "own batch, so there is nothing to share between ranks; build it without ghost_size"
            )
    for name, module in model.named_modules():
        if isinstance(module, (RegionNorm, LearnableRegionNorm)) and module.pool == "batch":
            raise ValueError(
                f'{name or "model"} ({type(module).__name__} with pool="batch") takes its statistics from the batch in '
                'evaluation too and has no synchronised form; build it with pool="sample"'
            )
    for norm in norms.values():
        norm.synchronised, norm.process_group = True, process_group
    return model
