"""Functions of PyTorch that see its own BatchNorms alone, and would leave ours without a word."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

_UPDATE_BN = getattr(update_bn, "__wrapped__", update_bn).__code__
_CONVERT_SYNC = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


def refuse_update_bn(norm: nn.Module) -> None:
    """Called when the modules of a model with ``norm`` are listed: raise if it is ``update_bn`` that lists them.

    Raises:
        RuntimeError: the model has no other norm that ``update_bn`` would set. Where it has some, this is a warning.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _UPDATE_BN:
        if frame.f_code is refuse_update_bn.__code__:
            return
        frame = frame.f_back
    if frame is None:
        return
    model = frame.f_locals["model"]
    others = any(isinstance(module, _BatchNorm) for module in model.modules())
    message = (
        f"torch.optim.swa_utils.update_bn sets the statistics of PyTorch's BatchNorms only, not those of "
        f"{type(norm).__name__}: call normfuse.nn.calibrate(model, loader)"
    )
    if not others:
        raise RuntimeError(f"{message} instead")
    warnings.warn(f"{message} after it", RuntimeWarning, stacklevel=2)


def warn_convert_sync(norm: nn.Module) -> None:
    """Called when the children of ``norm`` are listed: warn if ``convert_sync_batchnorm`` lists them."""
    caller = sys._getframe(1).f_back
    if caller is not None and caller.f_code is _CONVERT_SYNC:
        warnings.warn(
            f"torch.nn.SyncBatchNorm.convert_sync_batchnorm leaves {type(norm).__name__} as it is: call "
            "normfuse.nn.convert_sync(model) after it, for statistics over all processes",
            RuntimeWarning,
            stacklevel=3,
        )
