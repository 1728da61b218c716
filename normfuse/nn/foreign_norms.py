"""Norms that other libraries and people wrote themselves: what one does is measured, not guessed from its names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Such classes have no base in common; their names all end like this.
_NAMED = re.compile(r"(Layer_?Norm|RMS_?Norm)(2d)?$", re.IGNORECASE)
_SIZES = (3, 5, 7)  # of the axes beside the channels in a trial; none may be taken for them
_CLOSE = 1e-2  # relative: above rounding to 16 bits and what a usual eps changes, far below another map


@dataclass(frozen=True)
class ForeignNorm:
    """What a LayerNorm or RMSNorm of another library was seen to do: gain · normalised + shift, per channel.

    Attributes:
        channel_dim: the axis over which it normalises: -1, or 1.
        gain, shift: float64 [channels]; what its parameters say where they agree with what was measured.
        gain_parameter, shift_parameter: the parameters that hold them; None where there are none.
        neutral: what ``gain_parameter`` holds where the gain is one: 1, or 0 for norms that add one to it.
    """

    channel_dim: int
    gain: Tensor
    shift: Tensor
    gain_parameter: nn.Parameter | None
    shift_parameter: nn.Parameter | None
    neutral: float


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
    """The shape of its parameters without axes of length one, or else its ``normalized_shape``."""
    for parameter in norm.parameters(recurse=False):
        return tuple(size for size in parameter.shape if size != 1) or (1,)
    shape = getattr(norm, "normalized_shape", ())
    return (shape,) if isinstance(shape, int) else tuple(shape)


@torch.no_grad()
def measure(norm: nn.Module) -> ForeignNorm | None:
    """Runs a norm on random values in the layouts that people use.

    Args:
        norm: see :func:`is_measurable`.

    Returns:
        What it does to them; None where in no layout it is a LayerNorm or RMSNorm over one axis.
    """
    shape = shape_of_channels(norm)
    if len(shape) != 1:
        return None
    for channel_dim, x, y in trials(norm, shape[0]):
        rows, results = (t.detach().cpu().double().movedim(channel_dim, -1).flatten(0, -2) for t in (x, y))
        for centred in (True, False):
            affine = _affine(rows - rows.mean(1, keepdim=True) if centred else rows, results)
            if affine is not None:
                return _of_parameters(norm, channel_dim, *affine)
    return None


def trials(norm: nn.Module, channels: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Axis of the channels, random values, and what the norm makes of them, for every layout that it takes."""
    anchor = next(norm.parameters(recurse=False), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    a, b, c = (*(size for size in _SIZES if size != channels), 2)[:3]
    last = [(2, a, b, channels), (2, a, channels)]
    first = [(2, channels, a, b), (2, channels, a), (2, channels, a, b, c)]
    matrix = (a, channels)  # last, as both layouts are the same there
    for channel_dim, shape in (*((-1, s) for s in last), *((1, s) for s in first), (-1, matrix)):
        x = (4 * torch.randn(shape, generator=generator) + 1).to(anchor.device, anchor.dtype)
        try:
            y = norm(x.clone())
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            continue  # not its layout
        if isinstance(y, Tensor) and y.shape == x.shape:
            yield channel_dim, x, y


def _affine(rows: Tensor, results: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gain and shift [channels] with results = gain · rows ÷ their root mean square + shift, by least squares."""
    normalised = rows * rows.square().mean(1, keepdim=True).rsqrt()
    mean, mean_result = normalised.mean(0), results.mean(0)
    around = normalised - mean
    gain = (around * results).sum(0) / around.square().sum(0)
    shift = mean_result - gain * mean
    left = results - (gain * normalised + shift)
    return (gain, shift) if left.norm() <= _CLOSE * results.norm() else None


def _of_parameters(norm: nn.Module, channel_dim: int, gain: Tensor, shift: Tensor) -> ForeignNorm:
    """With the values of parameters in the place of the measured ones that they agree with."""
    values = {p: p.detach().cpu().double().flatten() for p in norm.parameters(recurse=False)}
    gain_parameter, neutral = None, 1.0
    for parameter, value in values.items():
        for added in (0.0, 1.0):
            if gain_parameter is None and _agree(value + added, gain):
                gain, gain_parameter, neutral = value + added, parameter, 1.0 - added
    shift_parameter = None
    for parameter, value in values.items():
        if shift_parameter is None and parameter is not gain_parameter and _agree(value, shift, gain):
            shift, shift_parameter = value, parameter
    if shift_parameter is None and _agree(torch.zeros_like(shift), shift, gain):
        shift = torch.zeros_like(shift)
    return ForeignNorm(channel_dim, gain, shift, gain_parameter, shift_parameter, neutral)


def _agree(value: Tensor, measured: Tensor, *others: Tensor) -> bool:
    size = max(float(t.abs().max()) for t in (value, measured, *others))
    return bool((value - measured).abs().max() <= 3 * _CLOSE * size)
