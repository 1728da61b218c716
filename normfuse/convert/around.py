"""Wrapping what is in a live model: a norm per domain, and weights that are computed from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn import DomainSplitNorm
from .swap import Swap, SwapReport, Where, _selector, channels_of, find_norms, put

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def split_domains(model: nn.Module, num_domains: int = 2, *, where: Where | None = None) -> SwapReport:
    """Replace every norm by a :class:`normfuse.nn.DomainSplitNorm` with a copy of it for each domain.

    Args:
        model: a pretrained model; changed in place. Create the optimiser afterwards. Batches hold the domains one after
            another in training; :func:`normfuse.nn.choose_domain` chooses one for evaluation and export.
        num_domains: at least 1.
        where: which norms, as for :func:`normfuse.convert.swap_norms`; None: all that it finds.

    Returns:
        A :class:`SwapReport`.

    Raises:
        ValueError: nothing was found, the model is split already, or ``num_domains`` is not allowed.

    Example:
        >>> from normfuse.convert import split_domains
        >>> print(split_domains(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), num_domains=2))
        1: BatchNorm1d -> DomainSplitNorm (8 channels)
    """
    if any(isinstance(module, DomainSplitNorm) for module in model.modules()):
        raise ValueError("model has norms for several domains already")
    places, kept = find_norms(model, where)
    wrappers: dict[nn.Module, nn.Module] = {}
    report = SwapReport(kept=kept)
    for name, norm in places:
        if norm not in wrappers:
            wrappers[norm] = DomainSplitNorm(norm, num_domains).train(norm.training)
        report.swaps.append(Swap(name, type(norm).__name__, DomainSplitNorm.__name__, channels_of(name, norm)))
    for name, norm in places:
        put(model, name, wrappers[norm])
    return report


def reparametrize(
    model: nn.Module, function: Callable[..., nn.Module], *, where: Where | None = None, **options: Any
) -> list[str]:
    """Apply ``sigma_reparam``, ``weight_standardization`` or ``center_weight`` to the layers of a model.

    Args:
        model: changed in place. Create the optimiser afterwards.
        function: takes a layer (and ``options``) and changes its weight in place.
        where: which linear layers and convolutions, as for :func:`normfuse.convert.swap_norms`; None: all.
        options: of ``function``.

    Returns:
        The names of the layers.

    Raises:
        ValueError: nothing was selected, or a layer or option is not allowed.

    Example:
        >>> from normfuse.convert import reparametrize
        >>> from normfuse.nn import weight_standardization
        >>> reparametrize(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), weight_standardization)
        ['0']
    """
    selected = _selector(where)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _WEIGHTED) and selected(name, m)]
    if not layers:
        raise ValueError(f"where={where!r} selects no linear layer and no convolution")
    for name, layer in layers:
        try:
            function(layer, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return [name for name, _ in layers]
