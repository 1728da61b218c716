"""What trainings put around a model, and how to look through it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint.archive import CheckpointError, one_line

# By the name of a class, where the model is inside; most of these come from packages that need not be installed.
_INSIDE = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils, for SWA and EMA
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DeepSpeedEngine": "module",
    "_FabricModule": "module",  # Lightning Fabric
    "ModelEma": "ema",  # timm, like the next two
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "ModelEMA": "ema",  # ultralytics, YOLO
    "EMA": "ema_model",  # ema-pytorch
}


def unwrapped(model: Any) -> tuple[nn.Module, nn.Module, list[str]]:
    """The model inside its wrappers, and the one to trace in its place.

    Args:
        model: a module, or something that holds one: DataParallel, DistributedDataParallel, torch.compile, moving
            averages (SWA, EMA), Lightning Fabric, DeepSpeed, PEFT.

    Returns:
        The live module; the module to trace, which is another one where adapters are merged into a copy; what was
        taken off, in words.

    Raises:
        CheckpointError: there is no module inside, its weights are spread over processes or quantised, or it is
            TorchScript.
    """
    taken: list[str] = []
    while (wrapper := _wrapper(model)) is not None:
        model = getattr(model, _INSIDE[wrapper])
        taken.append(wrapper)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model is a {type(model).__name__}; give the torch.nn.Module")
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        what = f"model.{scripted[0]}" if scripted[0] else "model"
        raise CheckpointError(
            f"{what} is TorchScript, which cannot be traced again: build the module in Python and give it "
            f"{what}.state_dict()"
        )
    _refuse_shards(model)
    _refuse_quantised(model)
    notes = [f"looked through {', '.join(taken)}"] if taken else []
    if "_original_forward" in vars(model):
        notes.append("without the autocast that accelerate put around forward")
    if not hasattr(model, "merge_and_unload"):
        return model, model, notes
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except Exception as error:  # PEFT's own, and what copying a module raises
        raise CheckpointError(
            f"the adapters of {type(model).__name__} cannot be merged ({type(error).__name__}: "
            f"{one_line(error, 160)}): give the model of its merge_and_unload()"
        ) from error
    return model.get_base_model(), merged, [*notes, f"the adapters of {type(model).__name__} are merged"]


def _wrapper(model: Any) -> str | None:
    """The name of the wrapper that a model is, if it is one."""
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((name for name in names if name in _INSIDE and hasattr(model, _INSIDE[name])), None)


def _refuse_shards(model: nn.Module) -> None:
    way_out = (
        "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True gathers the weights; "
        "load them into a model that is not sharded"
    )
    for part in model.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise CheckpointError(f"the weights of {type(part).__name__} are spread over processes: {way_out}")
    for name, tensor in model.named_parameters():
        if type(tensor).__name__ == "DTensor":
            raise CheckpointError(f"tensor {name!r} is spread over processes (DTensor): {way_out}")


def _refuse_quantised(model: nn.Module) -> None:
    way_out = "save or export the model as it was before (normfuse export --dtype int8 quantises the file)"
    for name, part in model.named_modules():
        if ".quantized" in type(part).__module__ and type(part).__module__.startswith("torch.ao.nn."):
            raise CheckpointError(f"{name or 'model'} is quantised ({type(part).__name__} of torch.ao): {way_out}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # it computes by itself
            raise CheckpointError(f"tensor {name!r} is a {kind.__name__} of {kind.__module__}, no plain one: {way_out}")
