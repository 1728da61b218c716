"""Classes that are a norm and something behind it: an activation (timm's ``BatchNormAct2d``), a gain for each head."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.foreign_norms import ForeignNorm, eps_of, is_measurable, measure, shape_of_channels, trials
from ..nn.head_affine import HeadAffine

_TOLERANCE = 1e-2  # relative, as trials may be in 16 bits


def split(name: str, norm: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A norm alone, and what its class does behind it.

    Args:
        name: for messages.
        norm: not changed.

    Returns:
        ``norm``, or where it holds other modules, one that shares its parameters and buffers but for them; then those
        modules by name, in their order. Where every head has a gain of its own, torch's norm without a gain, and a
        module with those gains.

    Raises:
        ValueError: the class does something else, when it is tried: a model without it would be another one.
    """
    known = type(norm).__module__.startswith(("torch.nn.", "normfuse."))
    if known or any(p.is_meta for p in norm.parameters()):
        return norm, {}
    found = measure(norm) if is_measurable(norm) else None
    if found is not None and found.has_heads:
        return _heads(norm, found)
    alone, behind = _parts(norm)
    if behind or isinstance(norm, _BatchNorm):
        _check(name, norm)
    return (alone, behind) if behind else (norm, {})


def _heads(norm: nn.Module, found: ForeignNorm) -> tuple[nn.Module, dict[str, nn.Module]]:
    kind = nn.LayerNorm if found.centred else nn.RMSNorm
    eps = eps_of(norm)
    options = {} if eps is None else {"eps": eps}
    alone = kind(found.channels, elementwise_affine=False, **options)
    like = next(norm.parameters())
    shifted = found.shift_parameter is not None or bool(found.shift.ne(0).any())
    affine = HeadAffine(found.gain.to(like), found.shift.to(like) if shifted else None)
    for parameter, own in ((affine.weight, found.gain_parameter), (affine.bias, found.shift_parameter)):
        if parameter is not None and own is not None:
            parameter.requires_grad_(own.requires_grad)
    return alone.train(norm.training), {"affine": affine.train(norm.training)}


def _parts(norm: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    alone = copy.copy(norm)
    alone._modules = {label: nn.Identity() for label in norm._modules}
    return alone, {label: child for label, child in norm.named_children() if not isinstance(child, nn.Identity)}


def joined(norm: nn.Module, behind: dict[str, nn.Module]) -> nn.Module:
    """A norm and what is to stand behind it."""
    if not behind:
        return norm
    whole = nn.Sequential(OrderedDict(norm=norm, **behind))
    whole.training = norm.training  # its parts have their modes
    return whole


_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks"),
)


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Moves a norm's hooks to what takes its place, handles included: ``handle.remove()`` still removes them.

    What torch.nn.utils computes a weight with in front of a forward stays: it is for the weight of that norm.
    """
    for kind in _HOOKS:
        hooks = getattr(old, kind)
        own = [key for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")]
        setattr(old, kind, OrderedDict((key, hooks.pop(key)) for key in own))
        setattr(new, kind, hooks)
    new._is_full_backward_hook = old._is_full_backward_hook


@torch.no_grad()
def _check(name: str, norm: nn.Module) -> None:
    whole = copy.deepcopy(norm).eval()
    for number, own in enumerate((*whole.parameters(recurse=False), *whole.buffers(recurse=False))):
        if own.is_floating_point():  # new ones are zeros and ones, which hide what they are for
            own.copy_(0.5 + torch.rand(own.shape, generator=torch.Generator().manual_seed(number)))
    alone, behind = _parts(whole)
    shape = (norm.num_features,) if isinstance(norm, _BatchNorm) else shape_of_channels(norm)
    differs = []
    for _, x, y in trials(whole, shape[0]) if len(shape) == 1 else ():
        if isinstance(norm, _BatchNorm):
            of_batch = whole.running_mean is None
            result = F.batch_norm(
                x, whole.running_mean, whole.running_var, whole.weight, whole.bias, of_batch, 0.0, whole.eps
            )
        else:
            result = alone.eval()(x)
        for child in behind.values():
            result = child(result)
        differs.append(not torch.allclose(result, y, _TOLERANCE, _TOLERANCE * float(y.abs().max())))
    if any(differs) or not differs:
        parts = f" and then {', '.join(behind)}" if behind else ""
        raise ValueError(
            f"{name}, a {type(norm).__name__} of {type(norm).__module__}, does not behave like a norm{parts} when it "
            "runs on random input: leave it out with `where`"
        )
