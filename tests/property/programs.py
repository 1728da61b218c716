"""Random programs for folding: streams, branches, convolutions, embeddings, reshapes, shared layers, dead ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from normfuse.nn import DomainSplitNorm, RepBatchNorm
from tests.norms import makers

from .steps import Steps


class Map(nn.Module):
    """A static norm as plain arithmetic: ``x * scale + shift`` along one axis."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


# Every norm of the package that is one affine map in evaluation.
FAMILY = (
    *makers(static=True, channel_dim=-1).values(),
    lambda width: DomainSplitNorm(RepBatchNorm(width), domain=1),
)


@dataclass(frozen=True)
class Step:
    """One operation: what it is, which earlier values it reads, which layer it uses (layers can be shared)."""

    kind: str
    inputs: tuple[int, ...]
    layer: int = 0


@dataclass
class Plan:
    """A program over values of shape [batch, length, width]."""

    width: int
    seed: int
    steps: list[Step]
    outputs: tuple[int, ...]
    source: str = "tokens"
    extremes: bool = field(default=False)


UNARY = (
    "norm norm norm norm batch_norm family linear linear linear no_bias gelu relu attention conv padded_conv "
    "gate_by_self heads roll_channels add_constant add_position scale mean_back layer_norm rms_norm written_rms_norm "
    "neg matmul_weight padded double masked_attention product_attention einsum per_position rotate choose repeat "
    "pad_channels shuffle unshuffle resize max_pool average_pool grouped_conv transposed_conv glu rotary fill "
    "flat_linear centre absolute positions experts turn differences power quantile channel_mask shares"
).split()
BINARY = (
    "add add add sub mul concat_channels concat_positions cross_attention gated join add_first stack weigh mixture"
).split()
# The members of `Program` that an operation uses.
PARTS = {
    "norm": "norms",
    "batch_norm": "batch_norms",
    "family": "family",
    "linear": "linears",
    "no_bias": "linears",
    "attention": "qkv",
    "conv": "convs",
    "padded_conv": "convs",
    "gate_by_self": "linears",
    "add_constant": "constant",
    "add_position": "position",
    "scale": "constant",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_weight",
    "written_rms_norm": "rms_weight",
    "matmul_weight": "weight linears",
    "masked_attention": "qkv",
    "product_attention": "qkv",
    "einsum": "weight",
    "per_position": "per_position",
    "grouped_conv": "grouped",
    "transposed_conv": "transposed",
    "glu": "gate up linears",
    "rotary": "angles",
    "flat_linear": "flat",
    "positions": "per_position",
    "experts": "per_position",
    "channel_mask": "constant",
    "concat_channels": "wide",
    "concat_positions": "token",
    "cross_attention": "linears up",
}


class Program(Steps):
    """The module that a plan describes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        generator = torch.Generator().manual_seed(plan.seed)
        width = plan.width

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def layer(module: nn.Module) -> nn.Module:
            for parameter in module.parameters():
                parameter.data = rand(*parameter.shape) / max(width, 1) ** 0.5
            return module.double()

        def norm() -> Map:
            scale = torch.exp(rand(width)) * torch.where(rand(width) < -0.8, -1.0, 1.0)
            if plan.extremes:
                scale[0] = (0.0, 1e-6, -1e-3)[plan.seed % 3]
            return Map(scale, rand(width))

        def batch_norm() -> nn.Module:
            module = layer(nn.BatchNorm1d(width))
            module.running_mean, module.running_var = rand(width), torch.exp(rand(width))
            return module

        def member(module: nn.Module) -> nn.Module:
            module = layer(module)
            for name, statistic in module.named_buffers():
                if statistic.is_floating_point():
                    statistic.copy_(torch.exp(rand(*statistic.shape)) if "mean" not in name else rand(*statistic.shape))
            return module

        used = sorted({self._member(step.layer) for step in plan.steps if step.kind == "family"})
        makers: dict[str, Callable[[], nn.Module | nn.Parameter]] = {
            "embed": lambda: layer(nn.Embedding(9, width)),
            "norms": lambda: nn.ModuleList(norm() for _ in range(3)),
            "batch_norms": lambda: nn.ModuleList(batch_norm() for _ in range(2)),
            "family": lambda: nn.ModuleDict({str(i): member(FAMILY[i](width)) for i in used}),
            "linears": lambda: nn.ModuleList(layer(nn.Linear(width, width, bias=i != 1)) for i in range(3)),
            "wide": lambda: nn.ModuleList(layer(nn.Linear(2 * width, width)) for _ in range(2)),
            "qkv": lambda: layer(nn.Linear(width, 3 * width)),
            "convs": lambda: nn.ModuleList(layer(nn.Conv1d(width, width, 3, padding=p)) for p in (0, 1)),
            "grouped": lambda: nn.ModuleList(layer(nn.Conv1d(width, width, 3, 1, 1, groups=g)) for g in (2, width)),
            "transposed": lambda: layer(nn.ConvTranspose1d(width, width, 3, padding=1, groups=2)),
            "up": lambda: layer(nn.Linear(width, width)),
            "gate": lambda: layer(nn.Linear(width, width, bias=False)),
            "flat": lambda: layer(nn.Linear(self.LENGTH * width, self.LENGTH * width)),
            "per_position": lambda: nn.Parameter(rand(self.LENGTH, width, width) / width**0.5),
            "angles": lambda: nn.Parameter(rand(self.LENGTH, width)),
            "layer_norm": lambda: layer(nn.LayerNorm(width)),
            "rms_weight": lambda: nn.Parameter(rand(width)),
            "position": lambda: nn.Parameter(rand(1, self.LENGTH, width)),
            "weight": lambda: nn.Parameter(rand(width, width)),
            "constant": lambda: nn.Parameter(rand(width)),
            "token": lambda: nn.Parameter(rand(1, 1, width)),
        }
        needed = {part for step in plan.steps for part in PARTS.get(step.kind, "").split()}
        needed |= {"embed"} if plan.source == "tokens" else set()
        self.order = tuple(torch.randperm(width, generator=generator).tolist())
        for name, make in makers.items():
            if name in needed:
                setattr(self, name, make())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self.values(x)
        return tuple(values[i] for i in self.plan.outputs)

    def values(self, x: Tensor) -> list[Tensor]:
        """Every value, in the plan's order."""
        values = [self.embed(x) if self.plan.source == "tokens" else x]
        for step in self.plan.steps:
            values.append(getattr(self, "do_" + step.kind)(*(values[i] for i in step.inputs), step.layer))
        return values

    def _member(self, n: int) -> int:
        return (n + self.plan.seed) % len(FAMILY)


@st.composite
def plans(draw: st.DrawFn, max_steps: int = 12) -> Plan:
    """Random programs whose later steps read recent values more often, so that streams form."""
    steps: list[Step] = []
    for index in range(draw(st.integers(1, max_steps))):
        kind = draw(st.sampled_from(BINARY if draw(st.integers(0, 2)) == 0 else UNARY))
        recent = st.one_of(st.just(index), st.integers(max(0, index - 3), index))
        inputs = tuple(draw(recent) for _ in range(2 if kind in BINARY else 1))
        steps.append(Step(kind, inputs, draw(st.integers(0, 2))))
    last = len(steps)
    outputs = (last, *draw(st.lists(st.integers(0, last), max_size=2)))
    return Plan(
        width=draw(st.sampled_from((2, 4, 6))),
        seed=draw(st.integers(0, 2**16)),
        steps=steps,
        outputs=outputs,
        source=draw(st.sampled_from(("tokens", "values"))),
        extremes=draw(st.booleans()),
    )


def example_input(plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(plan.seed)
    if plan.source == "tokens":
        return torch.randint(0, 9, (3, Program.LENGTH), generator=generator)
    return torch.randn(3, Program.LENGTH, plan.width, generator=generator, dtype=torch.float64)
