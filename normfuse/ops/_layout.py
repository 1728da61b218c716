"""How a tensor of any shape becomes [rows, channels] or [samples, channels, positions], which operations work on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._derivatives import without_view

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and statistics for an input of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` that leaves no node in an exported program where there is nothing to convert."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which torch 2.11 takes for true in all code that it compiles."""
    return torch.compiler._is_exporting_flag


def is_traced() -> bool:
    """Whether a program is being made of what runs: of plain operations, which others know, too."""
    return is_exporting() or torch.jit.is_tracing()


def check_tensor(name: str, x: Tensor) -> None:
    """Raise unless the argument called ``name`` is a tensor that holds all of its numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; give a torch.Tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; allowed are dense ones: convert it with {name}.to_padded_tensor(0.0), or set "
            "use_nested_tensor = False in the torch.nn.TransformerEncoder that makes it"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; allowed is torch.strided: convert it with {name}.to_dense()")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise unless the argument called ``name`` is a tensor of a dtype that the kernels know."""
    check_tensor(name, x)
    if x.dtype not in INPUT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in INPUT_DTYPES)
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}: convert it with {name}.to(...)")


def check_device(x: Tensor, name: str, other: Tensor) -> None:
    """Raise unless the argument called ``name`` is where ``x`` is."""
    if other.device != x.device:
        raise ValueError(f"x is on {x.device} but {name} is on {other.device}: move one with .to(device)")


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise unless each vector, where there is one, has a number for every channel of ``x``, the last dimension."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no channels; they are its last dimension")
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_tensor(name, vector)
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; x of shape {tuple(x.shape)} needs ({x.shape[-1]},): "
                "channels are the last dimension, so move them there with x.movedim(1, -1)"
            )
        check_device(x, name, vector)


def check_input(
    x: Tensor,
    channels: int,
    channel_dim: int,
    pad_mask: Tensor | None,
    statistic: Tensor,
) -> None:
    """Refuse what would otherwise be flattened into a wrong matrix without a complaint."""
    check_dtype("x", x)
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"channel_dim={channel_dim} does not exist in x of shape {tuple(x.shape)}; "
            f"give a dimension from {-x.dim()} to {x.dim() - 1}"
        )
    if x.shape[channel_dim] != channels:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has {x.shape[channel_dim]} channels along "
            f"channel_dim={channel_dim}; expected {channels}: check num_features and channel_dim"
        )
    if statistic.dtype != accumulation_dtype(x.dtype):
        narrow = statistic.dtype not in (torch.float32, torch.float64)
        raise TypeError(
            f"the statistics have dtype {statistic.dtype}, but x of dtype {x.dtype} needs "
            f"{accumulation_dtype(x.dtype)}: "
            + (
                "leave the buffers of norms as they are (no buffer_dtype in the MixedPrecision of FSDP)"
                if narrow
                else "convert the module (module.float() or module.double()) or x"
            )
        )
    check_device(x, "the running statistic", statistic)
    check_pad_mask(x, channel_dim, pad_mask)


def check_pad_mask(x: Tensor, channel_dim: int, pad_mask: Tensor | None) -> None:
    """Raise unless ``pad_mask``, where there is one, is bool and has the shape of ``x`` without its channels."""
    if pad_mask is None:
        return
    check_tensor("pad_mask", pad_mask)
    if pad_mask.dtype != torch.bool:
        raise TypeError(
            f"pad_mask has dtype {pad_mask.dtype}; allowed is torch.bool (True = padding): use pad_mask.bool()"
        )
    expected = list(x.shape)
    del expected[channel_dim]
    if list(pad_mask.shape) != expected:
        raise ValueError(
            f"pad_mask has shape {tuple(pad_mask.shape)}; expected {tuple(expected)}, "
            f"the shape of x {tuple(x.shape)} without its channel dimension {channel_dim}"
        )
    check_device(x, "pad_mask", pad_mask)


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Raise unless ``residual``, where there is one, can be added to ``x`` as it is."""
    if residual is None:
        return
    check_tensor("residual", residual)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)} on {residual.device}; it must be like x, "
            f"{x.dtype} of shape {tuple(x.shape)} on {x.device}: expand or convert it"
        )


def to_rows(x: Tensor, channel_dim: int) -> Tensor:
    """Contiguous [rows, channels] matrix of ``x``; no copy when the channels are last and x is contiguous."""
    if channel_dim % x.dim() != x.dim() - 1:
        x = x.movedim(channel_dim, -1)
    return x.reshape(-1, x.shape[-1]).contiguous()


def channels_last(x: Tensor, channel_dim: int) -> Tensor:
    """Contiguous ``x`` with its channels in the last dimension; itself where it is that already."""
    return (x if channel_dim in (-1, x.dim() - 1) else x.movedim(channel_dim, -1)).contiguous()


def channels_back(x: Tensor, channel_dim: int) -> Tensor:
    """Inverse of :func:`channels_last`."""
    return x if channel_dim in (-1, x.dim() - 1) else x.movedim(-1, channel_dim)


class ChannelsLast:
    """``x`` with its channels moved to the last dimension, and results back: for operations on rows.

    ``own`` is ``back`` for what an autograd function returns, which must be no view.
    """

    def __init__(self, x: Tensor, channel_dim: int) -> None:
        self.channel_dim = channel_dim

    def to(self, t: Tensor) -> Tensor:
        return channels_last(t, self.channel_dim)

    def mask(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1)

    def back(self, t: Tensor) -> Tensor:
        return channels_back(t, self.channel_dim)

    def own(self, t: Tensor) -> Tensor:
        return without_view(self.back, t)


class ThreeAxes:
    """``x`` as contiguous [samples, channels, positions], and results back; else as :class:`ChannelsLast`.

    Where ``x`` lies in memory with its channels last although ``channel_dim`` is another dimension, every position is a
    sample: nothing is copied. ``in_memory=False`` does not look.
    """

    def __init__(self, x: Tensor, channel_dim: int, in_memory: bool = True) -> None:
        self.shape, self.channel_dim = x.shape, channel_dim
        rows = in_memory and not x.is_contiguous() and x.movedim(channel_dim, -1).is_contiguous()
        self.rows = rows or x.numel() == 0

    def to(self, t: Tensor) -> Tensor:
        if self.rows:
            t = t.movedim(self.channel_dim, -1)
            return t.reshape(-1, t.shape[-1], 1).contiguous()
        dim = self.channel_dim % t.dim()
        return t.reshape(math.prod(t.shape[:dim]), t.shape[dim], math.prod(t.shape[dim + 1 :])).contiguous()

    def mask(self, mask: Tensor) -> Tensor:
        if self.rows:
            return mask.reshape(-1, 1).contiguous()
        return mask.reshape(math.prod(self.shape[: self.channel_dim % len(self.shape)]), -1).contiguous()

    def back(self, t: Tensor) -> Tensor:
        if not self.rows:
            return torch.ops.aten._unsafe_view(t, self.shape)  # no view, see without_view
        moved = list(self.shape)
        moved.append(moved.pop(self.channel_dim))
        return t.view(moved).movedim(-1, self.channel_dim)

    def own(self, t: Tensor) -> Tensor:
        return without_view(self.back, t) if self.rows else self.back(t)


def rows_of(x: Tensor) -> Tensor:
    """The [R, C] matrix of a contiguous ``x`` [..., C], in the dtype of sums and statistics."""
    return x.to(accumulation_dtype(x.dtype)).reshape(-1, x.shape[-1])


def like_input(rows: Tensor, x: Tensor) -> Tensor:
    """The [R, C] result ``rows`` in the shape and dtype of ``x``; no view, so that it can be changed in place."""
    return torch.ops.aten._unsafe_view(rows.to(x.dtype), x.shape)


def per_channel(vector: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """View of a [C] vector that broadcasts against ``x`` along ``channel_dim``."""
    trailing = x.dim() - 1 - channel_dim % x.dim()
    return vector if trailing == 0 else vector.reshape(-1, *[1] * trailing)


def affine_map(x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int) -> Tensor:
    """``scale * x + shift`` by [C] vectors, in their dtype, and back in that of ``x``: two operations that fold."""
    y = torch.addcmul(per_channel(shift, x, channel_dim), cast(x, scale.dtype), per_channel(scale, x, channel_dim))
    return cast(y, x.dtype)


def masked(values: Tensor, pad_mask: Tensor | None, channel_dim: int) -> tuple[Tensor, Tensor | int]:
    """``values`` with zeros in place of padding, and the number of valid rows.

    Selecting instead of multiplying keeps a NaN in a padded row out of later sums.
    """
    if pad_mask is None:
        return values, values.numel() // max(values.shape[channel_dim], 1)
    keep = torch.logical_not(pad_mask)
    return torch.where(keep.unsqueeze(channel_dim % values.dim()), values, 0.0), keep.sum()


def gain_and_shift(weight: Tensor | None, bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` and ``bias`` in the dtype of ``like`` [C], ones and zeros where there are none.

    Raises:
        TypeError, ValueError: one is no vector like ``like``.
    """
    check_vectors(like, weight=weight, bias=bias)
    weight = torch.ones_like(like) if weight is None else cast(weight, like.dtype)
    return weight, torch.zeros_like(like) if bias is None else cast(bias, like.dtype)


def sum_squares(x: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Sum of x² over the valid rows of a [R, C] matrix, and their number."""
    square = x.square()
    if pad_mask is None:
        return square.sum(0), x.shape[0]
    # Selecting instead of multiplying keeps a NaN in a padded row out of the sum.
    return torch.where(pad_mask[:, None], 0.0, square).sum(0), torch.logical_not(pad_mask).sum()


def mean_or(total: Tensor, count: Tensor | int, empty: Tensor) -> Tensor:
    """``total / count``, or ``empty`` where nothing was counted. Never syncs."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, total / count.clamp(min=1), empty)
    return total / count if count > 0 else empty.clone()


def mean_square(x: Tensor, pad_mask: Tensor | None, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of x² over the valid rows of a [R, C] matrix, and their number, a scalar. Never syncs.

    The mean is ``empty`` where no row is valid.
    """
    total, count = sum_squares(x, pad_mask)
    return mean_or(total, count, empty), count if isinstance(count, Tensor) else total.new_full((), count)


def add_into(x: Tensor, residual: Tensor | None, s: Tensor | None) -> Tensor:
    """x + residual, written to ``s``; without a residual ``x`` itself."""
    return x if residual is None or s is None else s.copy_(x + residual)


def as_they_are(total: Tensor, count: int) -> tuple[Tensor, int]:
    """The sums of one process, where synchronised training has those of a group."""
    return total, count
