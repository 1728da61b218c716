"""Norms that other libraries and people wrote themselves: what one does is measured, not guessed from its names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Such classes have no base in common; their names all end like this.
_NAMED = re.compile(r"(Layer_?Norm|RMS_?Norm)(2d)?$", re.IGNORECASE)
_SIZES = (3, 5, 7)  # of the axes beside the channels in a trial; none may be taken for them
_CLOSE = 1e-2  # relative: above rounding to 16 bits and what a usual eps changes, far below another map


@dataclass(frozen=True)
class ForeignNorm:
    """What a LayerNorm or RMSNorm of another library was seen to do: gain · normalised + shift.

    Attributes:
        channels: how many there are along the axis over which it normalises.
        channel_dim: that axis: -1, or 1.
        centred: whether it is a LayerNorm.
        gain, shift: float64 [channels]; for a norm whose heads have their own, of the shape that broadcasts against the
            last axes of its input, such as [heads, 1, channels]. What its parameters say where they agree with what
            was measured.
        gain_parameter, shift_parameter: the parameters that hold them; None where there are none.
        neutral: what ``gain_parameter`` holds where the gain is one: 1, or 0 for norms that add one to it.
    """

    channels: int
    channel_dim: int
    centred: bool
    gain: Tensor
    shift: Tensor
    gain_parameter: nn.Parameter | None
    shift_parameter: nn.Parameter | None
    neutral: float

    @property
    def has_heads(self) -> bool:
        """Whether every head has a gain of its own."""
        return self.gain.dim() > 1


def is_foreign_norm(module: nn.Module) -> bool:
    """Whether a module of another library that holds no others is a LayerNorm or RMSNorm, by its name or its base."""
    if type(module).__module__.startswith(("torch.nn.", "normfuse.")):
        return False
    if any(not isinstance(child, nn.Identity) for child in module.children()):
        return False
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _NAMED.search(type(module).__name__) is not None


def is_measurable(module: nn.Module) -> bool:
    """Whether :func:`measure` says what a module does: a foreign norm whose parameters hold numbers."""
    return is_foreign_norm(module) and not any(p.is_meta for p in module.parameters())


def shape_of_channels(norm: nn.Module) -> tuple[int, ...]:
    """The shape of its parameters without axes of length one, or else what its attributes say."""
    for parameter in norm.parameters(recurse=False):
        return tuple(size for size in parameter.shape if size != 1) or (1,)
    if isinstance(getattr(norm, "normalized_shape", None), (int, tuple, list)):
        return _as_shape(norm.normalized_shape)
    told = {_as_shape(value) for name, value in vars(norm).items() if not name.startswith("_") and _is_shape(value)}
    return told.pop() if len(told) == 1 else ()


def _is_shape(value: object) -> bool:
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    return bool(sizes) and all(isinstance(size, int) and not isinstance(size, bool) and size > 1 for size in sizes)


def _as_shape(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def eps_of(norm: nn.Module) -> float | None:
    """What a norm adds to its variance, by the usual names; None where it says nothing."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


@torch.no_grad()
def measure(norm: nn.Module) -> ForeignNorm | None:
    """Runs a norm on random values in the layouts that people use.

    Args:
        norm: see :func:`is_measurable`.

    Returns:
        What it does to them; None where in no layout it is a LayerNorm or RMSNorm over one axis.
    """
    shape = shape_of_channels(norm)
    for channel_dim, x, y in trials(norm, shape[0]) if len(shape) == 1 else ():
        rows, results = (t.detach().cpu().double().movedim(channel_dim, -1).flatten(0, -2) for t in (x, y))
        for centred in (True, False):
            affine = _affine(_normalised(rows, centred), results)
            if affine is not None:
                return _of_parameters(norm, channel_dim, centred, *affine)
    return _measure_heads(norm)


def _measure_heads(norm: nn.Module) -> ForeignNorm | None:
    """The same for a norm over the last axis whose gain has further axes: [heads, 1, channels], [heads, channels]."""
    shape = max((p.shape for p in norm.parameters(recurse=False)), key=len, default=torch.Size())
    while shape and shape[0] == 1:
        shape = shape[1:]
    if len(shape) < 2 or shape[-1] == 1:
        return None
    own = [axis - len(shape) for axis, size in enumerate(shape) if size != 1]
    others = [size for size in _SIZES if size not in shape]
    sizes = [size if size != 1 else others[0] for size in shape]
    for x, y in _results(norm, [(8, *sizes), (8, others[1], *sizes)]):
        values, results = (t.detach().cpu().double() for t in (x, y))
        axes = range(-len(own), 0)
        for centred in (True, False):
            pair = (_normalised(values, centred), results)
            affine = _affine(*(t.movedim(own, list(axes)).flatten(-len(own)).flatten(0, -2) for t in pair))
            if affine is not None:
                return _of_parameters(norm, -1, centred, *(vector.reshape(shape) for vector in affine))
    return None


def trials(norm: nn.Module, channels: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Axis of the channels, random values, and what the norm makes of them, for every layout that it takes."""
    a, b, c = (*(size for size in _SIZES if size != channels), 2)[:3]
    last: list[tuple[int, ...]] = [(2, a, b, channels), (2, a, channels)]
    first: list[tuple[int, ...]] = [(2, channels, a, b), (2, channels, a), (2, channels, a, b, c)]
    matrix: tuple[int, ...] = (a, channels)  # last, as both layouts are the same there
    for channel_dim, shapes in ((-1, last), (1, first), (-1, [matrix])):
        for x, y in _results(norm, shapes):
            yield channel_dim, x, y


def _results(norm: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Random values of each shape, and what the norm makes of them, where it takes them."""
    anchor = next(norm.parameters(recurse=False), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        x = (4 * torch.randn(shape, generator=generator) + 1).to(anchor.device, anchor.dtype)
        try:
            y = norm.forward(x.clone())  # without its hooks
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            continue  # not its layout
        if isinstance(y, Tensor) and y.shape == x.shape:
            yield x, y


def _normalised(values: Tensor, centred: bool) -> Tensor:
    """Values ÷ their root mean square over the last axis, without their mean where ``centred``."""
    values = values - values.mean(-1, keepdim=True) if centred else values
    return values * values.square().mean(-1, keepdim=True).rsqrt()


def _affine(normalised: Tensor, results: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gain and shift [channels] with results [rows, channels] = gain · normalised + shift, by least squares."""
    mean, mean_result = normalised.mean(0), results.mean(0)
    around = normalised - mean
    gain = (around * results).sum(0) / around.square().sum(0)
    shift = mean_result - gain * mean
    left = results - (gain * normalised + shift)
    return (gain, shift) if left.norm() <= _CLOSE * results.norm() else None


def _of_parameters(norm: nn.Module, channel_dim: int, centred: bool, gain: Tensor, shift: Tensor) -> ForeignNorm:
    """With the values of parameters in the place of the measured ones that they agree with."""
    own = {p: p.detach().cpu().double() for p in norm.parameters(recurse=False)}
    values = {p: value.reshape(gain.shape) for p, value in own.items() if value.numel() == gain.numel()}
    gain_parameter, neutral = None, 1.0
    for parameter, value in values.items():
        for added in (0.0, 1.0):
            if gain_parameter is None and _agree(value + added, gain):
                gain, gain_parameter, neutral = value + added, parameter, 1.0 - added
    if gain_parameter is None and _agree(torch.ones_like(gain), gain):
        gain = torch.ones_like(gain)
    shift_parameter = None
    for parameter, value in values.items():
        if shift_parameter is None and parameter is not gain_parameter and _agree(value, shift, gain):
            shift, shift_parameter = value, parameter
    if shift_parameter is None and _agree(torch.zeros_like(shift), shift, gain):
        shift = torch.zeros_like(shift)
    return ForeignNorm(gain.shape[-1], channel_dim, centred, gain, shift, gain_parameter, shift_parameter, neutral)


def _agree(value: Tensor, measured: Tensor, *others: Tensor) -> bool:
    size = max(float(t.abs().max()) for t in (value, measured, *others))
    return bool((value - measured).abs().max() <= 3 * _CLOSE * size)
