"""Statistics at test time: BatchNorms that adapt to the data they meet, and constants again when that is done."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..nn import MaskedBatchNorm, RepBatchNorm
from .adapting_norms import AdaptingNorm, AlphaBatchNorm, DecayingBatchNorm, UnMixBatchNorm
from .swap import Swap, SwapReport, Where, _selector, put


def _is_batch_norm(module: nn.Module) -> bool:
    # Not RepBatchNorm: its shortcut takes the input as it is, which rescaling would change.
    return isinstance(module, (_BatchNorm, MaskedBatchNorm)) and not isinstance(module, RepBatchNorm)


_METHODS: dict[str, type[AdaptingNorm]] = {
    "alpha": AlphaBatchNorm,
    "decay": DecayingBatchNorm,
    "unmix": UnMixBatchNorm,
}


def adapt(model: nn.Module, method: str = "alpha", *, where: Where | None = None, **options: Any) -> SwapReport:
    """Make the BatchNorms of a trained ``model`` adapt to new data; changes the model in place.

    Then run the model on new data, in any mode: its BatchNorms are always in evaluation mode. :func:`freeze` makes the
    adapted statistics constant again. Without it an exported program computes statistics from each batch (``"alpha"``)
    or sample (``"unmix"``); with ``"decay"`` they are constants.

    Args:
        model: contains BatchNorms of PyTorch or :class:`normfuse.nn.MaskedBatchNorm`, or of classes derived from them
            (but no RepBatchNorm), with running statistics. Where the model gives them a ``pad_mask``, padding is left
            out of what they adapt to.
        method: ``"alpha"`` (:class:`AlphaBatchNorm`), ``"decay"`` (:class:`DecayingBatchNorm`) or ``"unmix"``
            (:class:`UnMixBatchNorm`).
        where: which norms, as for :func:`swap_norms`; None: all.
        options: of the method: ``test_weight``; ``rate``, ``decay``; ``components``, ``momentum``, ``temperature``,
            ``generator``.

    Returns:
        A :class:`SwapReport`.

    Raises:
        ValueError: nothing was found, a norm has no statistics, the model adapts already, or an option is out of its
            range. The model is then as before.
        TypeError: an option is unknown or has a wrong type.

    Example:
        >>> from normfuse.convert import adapt, freeze
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
        >>> _ = adapt(model, "alpha", test_weight=0.2)
        >>> _ = model(torch.randn(32, 4))
        >>> print(freeze(model))
        1: AlphaBatchNorm -> BatchNorm1d (8 channels)
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown; give one of {', '.join(map(repr, _METHODS))}")
    if any(isinstance(module, AdaptingNorm) for module in model.modules()):
        raise ValueError("model adapts already; call freeze(model) first, or load it anew")
    if _is_batch_norm(model):
        raise ValueError("model is itself a norm; give the module that contains it")
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if _is_batch_norm(m)]
    selected = _selector(where)
    chosen = [(name, norm) for name, norm in places if selected(name, norm)]
    report = SwapReport(kept=[name for name, norm in places if not selected(name, norm)])
    if not places:
        raise ValueError(
            f"model of class {type(model).__name__} has no BatchNorm to adapt, of PyTorch or "
            "MaskedBatchNorm and its kin (but no RepBatchNorm)"
        )
    if not chosen:
        raise ValueError(f"where={where!r} selects nothing; the BatchNorms are {', '.join(report.kept)}")
    adapting: dict[nn.Module, AdaptingNorm] = {}
    for name, norm in chosen:
        if norm.running_mean is None or is_lazy(norm.running_mean):
            raise ValueError(f"{name}, a {type(norm).__name__}, has no running statistics to start from")
        if norm not in adapting:
            training = norm.training
            try:
                adapting[norm] = _METHODS[method](norm, **options)
            finally:
                norm.train(training)
        report.swaps.append(Swap(name, type(norm).__name__, _METHODS[method].__name__, norm.num_features))
    for name, norm in chosen:
        norm.eval()
        put(model, name, adapting[norm])
    return report


def freeze(model: nn.Module) -> SwapReport:
    """End the adaptation of :func:`adapt`: the adapted statistics become those of the BatchNorms.

    Otherwise the model is as it was before :func:`adapt`, and its norms fold like any BatchNorm. A norm that has seen
    no data keeps its original statistics.

    Args:
        model: changed in place; :func:`adapt` was called on it.

    Returns:
        A :class:`SwapReport`.

    Raises:
        ValueError: the model does not adapt, no norm has seen data, or statistics are computed from each sample
            (UnMix-TNS). The model is then unchanged.

    Example:
        >>> from normfuse.convert import adapt, freeze
        >>> model = nn.Sequential(nn.BatchNorm1d(8))
        >>> _ = adapt(model, "decay")
        >>> _ = model(torch.randn(32, 8))
        >>> _ = freeze(model)
        >>> type(model[0]).__name__
        'BatchNorm1d'
    """
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, AdaptingNorm)]
    if not places:
        raise ValueError(f"model of class {type(model).__name__} does not adapt; call adapt(model) first")
    for name, module in places:
        if module.refusal is not None:
            raise ValueError(f"{name}: {module.refusal}")
    settled = [module.settle() for module in dict.fromkeys(module for _, module in places)]
    if not any(settled):
        raise ValueError("no norm of the model met data; run the model on data to adapt to first")
    report = SwapReport()
    for name, module in places:
        module.norm.train(module.training)
        put(model, name, module.norm)
        after = type(module.norm).__name__
        report.swaps.append(Swap(name, type(module).__name__, after, module.norm.num_features))
    return report
