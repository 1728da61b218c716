"""Every norm of the package in one table: what docs/norms.md, its benchmark and its tests are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive_instance_norm import AdaptiveInstanceNorm
from .batch_channel_norm import BatchChannelNorm, EstimatedBatchNorm
from .batch_norm import MaskedBatchNorm, RegularizedBatchNorm
from .domain_split import DomainSplitNorm
from .dynamic_activation import Derf, DyT
from .moving_average_norm import MovingAverageBatchNorm
from .power_norm import PowerNorm
from .progressive_norm import ProgressiveNorm
from .region_norm import LearnableRegionNorm, RegionNorm
from .rep_batch_norm import RepBatchNorm
from .row_norm import CRMSNorm, LayerNorm, RMSNorm
from .sigma_reparam import sigma_reparam
from .time_layer_norm import TimeDependentLayerNorm
from .unified_norm import UnifiedNorm
from .weight_standardization import center_weight, weight_standardization

NOTHING = "nothing"


def _no_more(x: Tensor) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class NormEntry:
    """One row of the table.

    Attributes:
        name: as in :mod:`normfuse.nn`, with the option that makes the row.
        computes: what training computes.
        use: when to use it.
        paper: where it comes from.
        static: whether evaluation is one constant affine map per channel (or a constant weight).
        remains: what is left of it in a folded program.
        layout: "sequence", x [batch, sequence, C]; "image", x [batch, C, H, W]; "weight", a reparametrised layer.
        make: builds it for C channels ("weight": around a linear layer from C to C), with further options of its class.
        others: what its forward takes besides x.
        exact: whether training's gradient is the derivative of its result; otherwise an approximation by running
            statistics, which has no derivative of its own.
    """

    name: str
    computes: str
    use: str
    paper: str
    static: bool
    remains: str
    make: Callable[..., nn.Module]
    layout: str = "sequence"
    others: Callable[[Tensor], tuple[Tensor, ...]] = _no_more
    exact: bool = True


def _entries() -> tuple[NormEntry, ...]:
    mean_and_var = "x − mean, ÷ deviation, of the batch"
    return (
        NormEntry(
            "LayerNorm",
            "x − mean, ÷ deviation, of each token",
            "the baseline; `torch.nn.LayerNorm` with fused kernels and residual add",
            "1607.06450",
            False,
            "LayerNorm without gain and shift",
            LayerNorm,
        ),
        NormEntry(
            "RMSNorm",
            "x ÷ root mean square of each token",
            "language models; `torch.nn.RMSNorm` with fused kernels and residual add",
            "1910.07467",
            False,
            "RMSNorm without gain",
            RMSNorm,
        ),
        NormEntry(
            "CRMSNorm",
            "RMSNorm of C + 1 channels with mean 0, of which C are given",
            "what LayerNorm becomes where the stream has mean 0",
            "2305.14858",
            False,
            "CRMSNorm without gain",
            CRMSNorm,
        ),
        NormEntry(
            "UnifiedNorm",
            "x ÷ quadratic mean over a window of steps",
            "transformers that are to lose their norms",
            "2208.01313",
            True,
            NOTHING,
            UnifiedNorm,
            exact=False,
        ),
        NormEntry(
            "PowerNorm(group_num=None)",
            "x ÷ running quadratic mean",
            "the same, with less state",
            "2003.07845",
            True,
            NOTHING,
            partial(PowerNorm, group_num=None),
            exact=False,
        ),
        NormEntry(
            "PowerNorm",
            "the same behind an RMS normalisation of each token",
            "as in its authors' program",
            "2003.07845",
            False,
            "an RMS normalisation",
            PowerNorm,
            exact=False,
        ),
        NormEntry(
            "MaskedBatchNorm",
            mean_and_var + ", without padding",
            "BatchNorm over [batch, sequence, C]; `state_dict` of `torch.nn.BatchNorm1d`",
            "1502.03167",
            True,
            NOTHING,
            MaskedBatchNorm,
        ),
        NormEntry(
            "MaskedBatchNorm(ghost_size=…)",
            "the same in parts of the batch; also for UnifiedNorm and PowerNorm",
            "large batches",
            "1705.08741",
            True,
            NOTHING,
            partial(MaskedBatchNorm, ghost_size=2),
        ),
        NormEntry(
            "RegularizedBatchNorm",
            mean_and_var + ", and a loss that pulls them to the running ones",
            "text, where batch and running statistics differ",
            "2210.05153",
            True,
            NOTHING,
            RegularizedBatchNorm,
        ),
        NormEntry(
            "RepBatchNorm",
            "BatchNorm(x) + α·x",
            "the static half of ProgressiveNorm",
            "2405.11582",
            True,
            NOTHING,
            RepBatchNorm,
        ),
        NormEntry(
            "ProgressiveNorm",
            "λ·LayerNorm(x) + (1 − λ)·RepBatchNorm(x), λ falling to 0 (PRepBN)",
            "from a LayerNorm model to a static one",
            "2405.11582",
            True,
            NOTHING + ", once λ is 0 (or with `evaluate_static`)",
            lambda c: ProgressiveNorm(nn.LayerNorm(c), RepBatchNorm(c), end=100),
        ),
        NormEntry(
            "MovingAverageBatchNorm",
            "r·x ÷ quadratic mean over a window of steps (MABN)",
            "convolutions with batches of one or two",
            "2001.06838",
            True,
            NOTHING,
            MovingAverageBatchNorm,
            "image",
            exact=False,
        ),
        NormEntry(
            "EstimatedBatchNorm",
            "x − mean, ÷ deviation, both running",
            "micro-batches; half of BatchChannelNorm",
            "1911.09738",
            True,
            NOTHING,
            partial(EstimatedBatchNorm, channel_dim=1),
            "image",
        ),
        NormEntry(
            "BatchChannelNorm",
            "BatchNorm, then GroupNorm with a gain per group",
            "convolutions with standardised weights",
            "1911.09738",
            False,
            "GroupNorm",
            partial(BatchChannelNorm, num_groups=4),
            "image",
        ),
        NormEntry(
            "BatchChannelNorm(estimated=True)",
            "the same by estimated statistics",
            "micro-batches",
            "1911.09738",
            False,
            "GroupNorm",
            partial(BatchChannelNorm, num_groups=4, estimated=True),
            "image",
        ),
        NormEntry(
            "RegionNorm",
            "x − mean, ÷ deviation, inside and outside of a mask",
            "inpainting (RN-B)",
            "1911.10375",
            False,
            "all of it",
            RegionNorm,
            "image",
            lambda x: ((torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.3).to(x.device),),
        ),
        NormEntry(
            "LearnableRegionNorm",
            "the same, mask and gains from the features",
            "inpainting (RN-L)",
            "1911.10375",
            False,
            "all of it",
            lambda c: LearnableRegionNorm(),
            "image",
        ),
        NormEntry(
            "AdaptiveInstanceNorm",
            "the content with mean and deviation of a style (AdaIN)",
            "style transfer",
            "1703.06868",
            False,
            "all of it; of a fixed style the instance normalisation",
            lambda c: AdaptiveInstanceNorm(),
            "image",
            lambda x: (torch.randn_like(x),),
        ),
        NormEntry(
            "TimeDependentLayerNorm",
            "LayerNorm, gain and shift following the time step",
            "diffusion transformers",
            "2406.09416",
            False,
            "all of it; at a fixed time LayerNorm without gain and shift",
            TimeDependentLayerNorm,
            "sequence",
            lambda x: (torch.linspace(-4, 4, x.shape[0]).to(x),),
        ),
        NormEntry(
            "DyT",
            "γ·tanh(α·x) + β",
            "no statistics at all",
            "2503.10622",
            False,
            "tanh, and α on a residual stream",
            DyT,
        ),
        NormEntry(
            "Derf",
            "γ·erf(α·x + s) + β",
            "no statistics at all",
            "2512.10938",
            False,
            "erf, and α on a residual stream",
            Derf,
        ),
        NormEntry(
            "DomainSplitNorm",
            "one copy of a norm per domain, around shared weights",
            "two domains in one training",
            "1911.09665",
            True,
            NOTHING + " of a static norm: the chosen domain folds",
            lambda c: DomainSplitNorm(MaskedBatchNorm(c)),
        ),
        NormEntry(
            "weight_standardization",
            "(W − mean) ÷ deviation, per output filter",
            "convolutions with BatchChannelNorm or GroupNorm",
            "1903.10520",
            True,
            NOTHING + ": a plain weight",
            lambda c: weight_standardization(nn.Linear(c, c)),
            "weight",
        ),
        NormEntry(
            "center_weight",
            "W − mean, per output filter",
            "with MovingAverageBatchNorm",
            "2001.06838",
            True,
            NOTHING + ": a plain weight",
            lambda c: center_weight(nn.Linear(c, c)),
            "weight",
        ),
        NormEntry(
            "sigma_reparam",
            "γ·W ÷ largest singular value of W (σReparam)",
            "transformers whose attention collapses; no norm needed",
            "2303.06296",
            True,
            NOTHING + ": a plain weight",
            lambda c: sigma_reparam(nn.Linear(c, c)),
            "weight",
        ),
    )


NORMS = _entries()

_HEAD = """# The norms

Made by `python benchmarks/norm_costs.py` from `normfuse.nn.registry`; change that, not this page.

*Static* norms multiply by constants once training is over, and folding removes them ([folding.md](folding.md));
*dynamic* ones compute something from each input, which stays. The column says what folding leaves between two weights;
gain and shift of every norm go into the weights that read its result. Papers are arXiv numbers.
"""


def page(costs: Mapping[str, Any]) -> str:
    """docs/norms.md, with the costs that benchmarks/norm_costs.py measured (``{"where": …, "ratios": {name: …}}``)."""
    lines = [
        _HEAD,
        "The last column is the time of a training step, forward and backward, as a multiple of "
        f"`torch.nn.LayerNorm`'s on as many numbers. {costs['where']}",
        "",
        "| norm | computes | use | paper | at inference | remains after folding | ÷ LayerNorm |",
        "|---|---|---|---|---|---|---:|",
    ]
    for entry in NORMS:
        cells = (
            f"`{entry.name}`",
            entry.computes,
            entry.use,
            f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})",
            "static" if entry.static else "dynamic",
            entry.remains,
            f"{costs['ratios'][entry.name]:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
