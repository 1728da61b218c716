"""Random programs for folding: streams, branches, convolutions, embeddings, reshapes, shared layers, dead ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.nn import (
    DomainSplitNorm,
    EstimatedBatchNorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    UnifiedNorm,
)


class Map(nn.Module):
    """A static norm as plain arithmetic: ``x * scale + shift`` along one axis."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


# Every norm of the package that is one affine map in evaluation.
FAMILY = (
    UnifiedNorm,
    lambda width: PowerNorm(width, group_num=None),
    MaskedBatchNorm,
    RegularizedBatchNorm,
    EstimatedBatchNorm,
    RepBatchNorm,
    lambda width: MovingAverageBatchNorm(width, channel_dim=-1),
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
    "flat_linear centre absolute positions"
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
    "concat_channels": "wide",
    "concat_positions": "token",
    "cross_attention": "linears up",
}


class Program(nn.Module):
    """The module that a plan describes."""

    LENGTH = 4
    # What is compared must not be the rounding of a zero, such as the mean of centred values.
    THRESHOLD = 0.1234

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

    def do_norm(self, x: Tensor, n: int) -> Tensor:
        return self.norms[n % 3](x)

    def do_batch_norm(self, x: Tensor, n: int) -> Tensor:
        return self.batch_norms[n % 2](x.transpose(1, 2)).transpose(1, 2)

    def do_family(self, x: Tensor, n: int) -> Tensor:
        return self.family[str(self._member(n))](x)

    def _member(self, n: int) -> int:
        return (n + self.plan.seed) % len(FAMILY)

    def do_linear(self, x: Tensor, n: int) -> Tensor:
        return self.linears[n % 3](x)

    def do_no_bias(self, x: Tensor, n: int) -> Tensor:
        return self.linears[1](x)

    def do_matmul_weight(self, x: Tensor, n: int) -> Tensor:
        return x @ (self.weight if n % 2 else self.linears[0].weight.t())

    def do_gelu(self, x: Tensor, n: int) -> Tensor:
        return F.gelu(x)

    def do_relu(self, x: Tensor, n: int) -> Tensor:
        return F.relu(x)

    def do_neg(self, x: Tensor, n: int) -> Tensor:
        return -x

    def do_double(self, x: Tensor, n: int) -> Tensor:
        return x + x

    def do_attention(self, x: Tensor, n: int) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(n % 2))
        return y.transpose(1, 2).reshape(b, s, c)

    def do_conv(self, x: Tensor, n: int) -> Tensor:
        return F.pad(self.convs[0](x.transpose(1, 2)), (1, 1), mode="replicate").transpose(1, 2)

    def do_padded_conv(self, x: Tensor, n: int) -> Tensor:
        return self.convs[1](x.transpose(1, 2)).transpose(1, 2)

    def do_padded(self, x: Tensor, n: int) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]

    def do_gate_by_self(self, x: Tensor, n: int) -> Tensor:
        return torch.sigmoid(self.linears[n % 3](x)) * x

    def do_heads(self, x: Tensor, n: int) -> Tensor:
        b, s, c = x.shape
        return x.view(b, s, 2, c // 2).transpose(2, 3).reshape(b, s, c)

    def do_roll_channels(self, x: Tensor, n: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1)

    def do_add_constant(self, x: Tensor, n: int) -> Tensor:
        return x + self.constant if n % 2 else x + 0.5

    def do_add_position(self, x: Tensor, n: int) -> Tensor:
        return x + (self.position, F.dropout(self.position, 0.1, training=False), self.position.type_as(x))[n % 3]

    def do_scale(self, x: Tensor, n: int) -> Tensor:
        return (x * self.constant, x * -0.5, x / 3.0)[n % 3]

    def do_mean_back(self, x: Tensor, n: int) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, self.LENGTH, -1)

    def do_layer_norm(self, x: Tensor, n: int) -> Tensor:
        return self.layer_norm(x)

    def do_rms_norm(self, x: Tensor, n: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.rms_weight if n % 2 else None, 1e-5)

    def do_masked_attention(self, x: Tensor, n: int) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        mask = (
            (x.mean(-1) > self.THRESHOLD)[:, None, None, :].to(x.dtype) * -3.0
            if n % 2
            else (x @ x.mT).unsqueeze(1) / 2.0
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)

    def do_product_attention(self, x: Tensor, n: int) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = torch.einsum("bqc,bkc->bqk", q, k) if n % 2 else q @ k.mT
        return (scores * 0.3).softmax(-1) @ v

    def do_einsum(self, x: Tensor, n: int) -> Tensor:
        return torch.einsum(("bsi,io->bso", "...i,oi->...o", "bsi,io->bso")[n % 3], x, self.weight)

    def do_per_position(self, x: Tensor, n: int) -> Tensor:
        if n % 2:
            return torch.einsum("bsi,sio->bso", x, self.per_position)
        return (x.transpose(0, 1) @ self.per_position).transpose(0, 1)

    def do_rotate(self, x: Tensor, n: int) -> Tensor:
        return x.roll((1, -1, (1, 1))[n % 3], (1, 2, (1, 2))[n % 3])

    def do_choose(self, x: Tensor, n: int) -> Tensor:
        if n % 3 == 0:
            return x.index_select(1, torch.tensor([2, 0, 1, 1]))
        return x.index_select(-1, torch.tensor(self.order)) if n % 3 == 1 else x[:, [3, 0, 0, 1]]

    def do_repeat(self, x: Tensor, n: int) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., :half].repeat(1, 1, 2) if n % 2 else x[:, 1:3].repeat(1, 2, 1)

    def do_pad_channels(self, x: Tensor, n: int) -> Tensor:
        return F.pad(x, (1, -1)) if n % 2 else F.pad(x[..., 1:], (0, 1))

    def do_shuffle(self, x: Tensor, n: int) -> Tensor:
        return F.pixel_shuffle(x.unsqueeze(2), 2).reshape(x.shape)

    def do_unshuffle(self, x: Tensor, n: int) -> Tensor:
        return F.pixel_unshuffle(x.mT.unflatten(-1, (2, 2)), 2).reshape(x.shape)

    def do_resize(self, x: Tensor, n: int) -> Tensor:
        return F.interpolate(x.mT[..., 1:3], self.LENGTH, mode=("nearest", "linear")[n % 2]).mT

    def do_max_pool(self, x: Tensor, n: int) -> Tensor:
        return F.max_pool1d(x.mT, 3, 1, 1).mT if n % 2 else x - x.amax(1, keepdim=True)

    def do_average_pool(self, x: Tensor, n: int) -> Tensor:
        return F.avg_pool1d(x.mT, 3, 1, 1, count_include_pad=bool(n % 2)).mT

    def do_grouped_conv(self, x: Tensor, n: int) -> Tensor:
        return self.grouped[n % 2](x.mT).mT

    def do_transposed_conv(self, x: Tensor, n: int) -> Tensor:
        return self.transposed(x.mT).mT

    def do_glu(self, x: Tensor, n: int) -> Tensor:
        gate, up = F.silu(self.gate(x)), self.up(x)
        return self.linears[n % 3](gate * up if n % 2 else up * gate)

    def do_rotary(self, x: Tensor, n: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.angles.cos() + torch.cat([-second, first], dim=-1) * self.angles.sin()

    def do_fill(self, x: Tensor, n: int) -> Tensor:
        return x.masked_fill(x.mean(-1, keepdim=True) > self.THRESHOLD, float(n % 2))

    def do_flat_linear(self, x: Tensor, n: int) -> Tensor:
        return self.flat(x.flatten(1)).unflatten(-1, x.shape[1:])

    def do_centre(self, x: Tensor, n: int) -> Tensor:
        return x - x.mean((1, -1)[n % 2], keepdim=True)

    def do_absolute(self, x: Tensor, n: int) -> Tensor:
        return x.abs() if n % 2 else F.leaky_relu(x, 0.1)

    def do_positions(self, x: Tensor, n: int) -> Tensor:
        return self.per_position[:, :, 0].mT[: self.LENGTH, :2].tanh() @ x[:, :2] if x.shape[-1] >= 4 else x

    def do_cross_attention(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        q, k, v = self.linears[0](x), self.linears[n % 3](y), self.up(y)
        return F.scaled_dot_product_attention(q, k, v)

    def do_gated(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return torch.sigmoid(x) * y if n % 2 else y / (1 + torch.sigmoid(x))

    def do_join(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return torch.cat([x[..., :1], y[..., 1:]], dim=-1) if n % 2 else torch.cat([x[:, 1:], y[:, :1]], dim=1)

    def do_add_first(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x + y[:, :1] if n % 2 else y[..., :1] - x

    def do_stack(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half], y[..., half:]], -1).flatten(-2)

    def do_weigh(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x * y.mean(-1, keepdim=True) if n % 2 else y[:, :1].tanh() * x

    def do_mixture(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return (x @ x.mT / 4.0) @ y if n % 2 else torch.bmm(x.softmax(1).mT.mT @ x.mT, y)

    def do_written_rms_norm(self, x: Tensor, n: int) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if n == 2 else x
        return self.rms_weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def do_add(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x + y

    def do_sub(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x - y

    def do_mul(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x * torch.tanh(y)

    def do_concat_channels(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return self.wide[n % 2](torch.cat([x, y], dim=-1))

    def do_concat_positions(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.cat([token, x[:, :1], y[:, 2:]], dim=1)


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
