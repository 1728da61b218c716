"""Arguments of every compiled operation, for tests that give it others."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Of inputs [rows, channels] and [samples, channels, positions]; groups divide the channels."""

    rows: int = 6
    channels: int = 8
    samples: int = 4
    positions: int = 5
    window: int = 3
    groups: int = 2
    group_size: int = 2


_PAIRS = ("unified_norm", "power_norm", "row_norm", "dynamic_activation", "batch_norm", "moving_average_norm")
OPERATIONS = ("stat_group_norm_forward", *(f"{name}_{way}" for name in _PAIRS for way in ("forward", "backward")))


def arguments(name: str, dtype: torch.dtype = torch.float32, sizes: Sizes = Sizes()) -> dict[str, object]:
    """What the operation takes, by the names of its schema; optional tensors are there."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    norm, channels, one_group = name.partition("_")[0], sizes.channels, name.startswith(("batch", "stat"))
    three_axes = norm in ("batch", "stat", "moving")
    shape = (sizes.samples, channels, sizes.positions) if three_axes else (sizes.rows, channels)
    groups = max(sizes.samples // sizes.group_size, 1)
    statistics = {"batch": (3, groups, 1, channels), "unified": (2, channels), "power": (3, channels)}
    statistics |= {"moving": (2, channels), "row": (2, sizes.rows)}
    tensors = {
        **dict.fromkeys(("x", "grad_y", "grad_s", "residual", "s"), (shape, dtype)),
        **dict.fromkeys(("mask", "pad_mask"), ((shape[0], shape[2]) if three_axes else shape[:1], torch.bool)),
        **dict.fromkeys(("weight", "bias"), ((1, 1, channels) if one_group else (channels,), acc)),
        **dict.fromkeys(("running_var", "running_mean", "running_phi", "ema_gz"), ((channels,), acc)),
        **dict.fromkeys(("buffer_x2", "buffer_gz"), ((sizes.window, channels), acc)),
        **dict.fromkeys(("grad_mean", "grad_var"), ((groups, 1, channels), acc)),
        **dict.fromkeys(("iters", "skip_counter"), ((1,), torch.int64)),
        **dict.fromkeys(("alpha", "shift"), ((), acc)),
        "num_batches_tracked": ((), torch.int64),
        "step": ((1 if three_axes else 2,), torch.int64),
        "count": ((groups, 1), torch.int64),
        "stats": (statistics.get(norm, ()), acc),
        "row_scale": ((sizes.rows, sizes.groups), acc),
        "shortcut": ((1,), acc),
    }
    numbers = {
        **dict.fromkeys(("kind", "curve", "correction"), 0),
        "group_num": sizes.groups,
        "group_size": sizes.group_size if norm == "batch" else 0,
        "warmup_iters": 2,
        **dict.fromkeys(("eps", "group_eps", "floor", "eps_total"), 1e-5),
        **dict.fromkeys(("momentum", "alpha_fwd", "alpha_bkw"), 0.9),
        **dict.fromkeys(("outlier_filtration", "paper", "regions", "estimated"), False),
    }
    schema = getattr(torch.ops.normfuse, name).default._schema
    return {
        argument.name: _tensor(*tensors[argument.name]) if argument.name in tensors else numbers[argument.name]
        for argument in schema.arguments
    }


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.3
    if dtype == torch.int64:
        return torch.full(shape, 7)
    return (0.5 + torch.rand(shape)).to(dtype)


def call(name: str, given: dict[str, object]) -> tuple[torch.Tensor, ...]:
    results = getattr(torch.ops.normfuse, name)(*given.values())
    return results if isinstance(results, tuple) else (results,)
