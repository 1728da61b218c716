"""Random models at the level of modules that people write; see :mod:`tests.property.parts` for their layers."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.folding import fold
from normfuse.folding.program import Program
from normfuse.programs import own_rounding
from tests.folding.checks import any_gauge

from .parts import (
    IMAGE_NORMS,
    TOKEN_NORMS,
    Attention,
    ConvBlock,
    Draw,
    FeedForward,
    Gain,
    TokenMixer,
)

WIDTH, HEADS, TOKENS, WORDS, IMAGE = 8, 2, 5, 11, 6
# The error that is allowed in float64: rounding, and what extreme gains magnify; an island of float16 rounds to it.
WIDE, NARROW = 1e-9, 1e-2
# The float32 error that is allowed: as many times the model's own, and some units in the last place where that is none.
TIMES, UNITS = 10.0, 16.0 * torch.finfo(torch.float32).eps


class Block(nn.Module):
    """A block of a transformer, or of what is built like one."""

    def __init__(self, norm: Any, draw: Draw, *, tokens: int | None, cross: bool) -> None:
        super().__init__()
        self.placement = draw.pick("placement", ("pre", "post", "peri", "parallel"))
        mixes = tokens is not None and draw.chance("token mixer", 0.2)
        self.mixer = TokenMixer(tokens, draw) if mixes else Attention(WIDTH, HEADS, draw)
        self.cross = Attention(WIDTH, HEADS, draw, cross=True) if cross else None
        self.feed = FeedForward(WIDTH, draw)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(6))
        scaled = draw.chance("layer scale", 0.2)
        self.scales = nn.ModuleList(Gain(WIDTH, "scale") if scaled else nn.Identity() for _ in range(3))
        self.region = draw.pick("region", (None, None, None, None, "no_grad", "wide", "narrow", "autocast"))

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        if self.placement == "parallel":
            y = self.norms[0](x)
            x = x + self.scales[0](self._mix(y)) + self.scales[1](self.feed(y))
        else:
            x = self._residual(x, 0, self._mix)
            x = self._residual(x, 1, self.feed)
        if self.cross is not None and memory is not None:
            x = self._residual(x, 2, lambda y: self.cross(y, memory))
        return x

    def _mix(self, x: Tensor) -> Tensor:
        if self.region == "no_grad":
            with torch.no_grad():
                return self.mixer(x)
        if self.region == "autocast":  # which leaves float64 alone
            with torch.autocast("cpu", torch.bfloat16):
                return self.mixer(x).to(x.dtype)
        return self.mixer(x)

    def _residual(self, x: Tensor, n: int, branch: Any) -> Tensor:
        if self.region in ("wide", "narrow"):
            x = x.to(torch.float64 if self.region == "wide" else torch.float16).to(x.dtype)
        if self.placement == "post":
            return self.norms[2 * n](x + self.scales[n](branch(x)))
        y = branch(self.norms[2 * n](x))
        return x + self.scales[n](self.norms[2 * n + 1](y) if self.placement == "peri" else y)


class Transformer(nn.Module):
    """Tokens, patches or vectors; one or two stacks; blocks that may be one and the same; a head that may be tied."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.source = draw.pick("source", ("words", "vectors", "patches"))
        self.embed: nn.Module = nn.Linear(3, WIDTH)
        if self.source == "words":
            self.embed = nn.Embedding(WORDS, WIDTH)
        elif self.source == "patches":
            self.embed = nn.Conv2d(3, WIDTH, 2, stride=2)
        norms = list(TOKEN_NORMS)
        norm = TOKEN_NORMS[draw.pick("norm", norms)]
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH)) if draw.chance("positions", 0.7) else None
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH)) if draw.chance("class token", 0.3) else None
        length = {"patches": (IMAGE // 2) ** 2}.get(self.source, TOKENS) + (self.token is not None)
        memory = draw.chance("memory", 0.25)
        self.encode = Block(norm, draw, tokens=None, cross=False) if memory else None
        blocks = [Block(norm, draw, tokens=length, cross=memory) for _ in range(draw.randint(1, 3))]
        if draw.chance("shared blocks", 0.2):
            blocks = blocks[:1] * len(blocks)
        self.blocks = nn.ModuleList(blocks)
        self.last = (
            TOKEN_NORMS[draw.pick("last norm", norms)](WIDTH) if draw.chance("last norm", 0.7) else nn.Identity()
        )
        self.pool = draw.pick("pool", ("none", "mean", "first", "max", "sum"))
        tied = self.source == "words" and self.pool == "none" and draw.chance("tied head")
        self.head = nn.Linear(WIDTH, WORDS if tied else 3, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.both = draw.chance("two outputs", 0.2)

    def inputs(self) -> tuple[Tensor, ...]:
        shape = {"vectors": (2, TOKENS, 3), "patches": (2, 3, IMAGE, IMAGE)}.get(self.source)
        first = torch.randint(WORDS, (2, TOKENS)) if shape is None else torch.randn(shape)
        return (first, torch.randn(2, 4, WIDTH)) if self.encode is not None else (first,)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Any:
        x = self.embed(x)
        if self.source == "patches":
            x = x.flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        if self.position is not None:
            x = x + self.position[:, : x.shape[1]]
        memory = self.encode(memory, None) if self.encode is not None else None
        for block in self.blocks:
            x = block(x, memory)
        y = self.last(x)
        if self.pool != "none":
            y = {"mean": y.mean, "first": lambda _: y[:, 0], "max": y.amax, "sum": y.sum}[self.pool](1)
        return (self.head(y), x) if self.both else self.head(y)


class Decoder(nn.Module):
    """One step of decoding: new tokens with the keys and values of the past, which are returned."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        norm = TOKEN_NORMS[draw.pick("norm", list(TOKEN_NORMS))]
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.attention = Attention(WIDTH, HEADS, draw)
        while self.attention.kind == "module":
            self.attention = Attention(WIDTH, HEADS, draw)
        self.attention.causal = False
        self.feed = FeedForward(WIDTH, draw)
        self.norm1, self.norm2, self.last = (norm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS)

    def inputs(self) -> tuple[Tensor, ...]:
        heads = self.attention.groups
        past = (torch.randn(2, heads, 3, WIDTH // HEADS) for _ in range(2))
        return torch.randint(WORDS, (2, 2)), *past

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(x)
        y, keys, values = self.attention(self.norm1(x), past=(keys, values))
        x = x + y
        x = x + self.feed(self.norm2(x))
        return self.head(self.last(x)[:, -1]), keys, values


class ConvNet(nn.Module):
    """A convolutional network for classes, or with an upsampling path."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        norm = IMAGE_NORMS[draw.pick("norm", ("batch", "batch", "batch", *IMAGE_NORMS))]
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3, padding=draw.randint(0, 1), stride=2), norm(WIDTH)
        blocks = [ConvBlock(WIDTH, norm, draw) for _ in range(draw.randint(1, 3))]
        self.blocks = nn.ModuleList(blocks[:1] * 2 if draw.chance("shared blocks", 0.15) else blocks)
        self.frozen = draw.chance("no_grad stem", 0.2)
        self.pool = draw.pick("pool", ("adaptive", "mean", "max", "flatten", "sum"))
        self.grows = draw.pick("grows", (None, None, "nearest", "bilinear", "transposed", "shuffle"))
        self.transposed = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.head = nn.LazyLinear(3)

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 2 * IMAGE, 2 * IMAGE),)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else nullcontext():
            x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        if self.grows == "transposed":
            x = self.transposed(x)
        elif self.grows == "shuffle":
            x = F.pixel_shuffle(x, 2)
        elif self.grows:
            x = F.interpolate(x, scale_factor=2, mode=self.grows)
        if self.pool == "flatten":
            return self.head(x.flatten(1))
        if self.pool == "adaptive":
            return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.head({"mean": x.mean, "max": x.amax, "sum": x.sum}[self.pool]((2, 3)))


FAMILIES = {"transformer": Transformer, "decoder": Decoder, "convolutions": ConvNet}


class Case(NamedTuple):
    """A random model with inputs, and what was drawn."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    words: str
    options: dict[str, Any]


def random_model(number: int, seed: int) -> Case:
    """The model with this number in float32, in evaluation; the same seed gives the same models."""
    draw = Draw(f"{seed}/{number}")
    torch.manual_seed(draw.getrandbits(32))
    model = FAMILIES[draw.pick("family", ("transformer", "transformer", "decoder", "convolutions"))](draw).eval()
    inputs = model.inputs()
    with torch.no_grad():
        model(*inputs)  # gives lazy layers their sizes
    extreme = draw.chance("extreme gains", 0.2)
    for module in model.modules():
        _look_trained(module, extreme)
    options = {
        "copy_shared": not draw.chance("no copies", 0.3),
        "carry_biases": draw.chance("biases travel", 0.3),
        "remove_dead": draw.chance("dead channels go", 0.2),
        "keep_dynamic_norms": draw.chance("dynamic norms stay", 0.1),
    }
    draw.made += ["any gauge"] if number % 4 == 0 else []
    return Case(model, inputs, ", ".join(draw.made), options)


def errors(number: int, seed: int, statuses: Counter) -> tuple[float, float]:
    """What folding changes, relative to what is allowed: in float64 and in float32."""
    case = random_model(number, seed)
    wide_model, wide_inputs = copy.deepcopy(case.model).double(), tuple(map(_double, case.inputs))
    with torch.no_grad():
        expected = _outputs(wide_model(*wide_inputs))
        own = _outputs(case.model(*case.inputs))
        changed = []
        for model, inputs in ((wide_model, wide_inputs), (case.model, case.inputs)):
            program = torch.export.export(model, inputs, strict=False)
            with any_gauge(number) if number % 4 == 0 and model is wide_model else nullcontext():
                folded, report = fold(program, verify=False, **case.options)  # what is compared here as well
            changed.append(_outputs(folded.module(check_guards=False)(*inputs)))
            if model is wide_model:
                statuses.update(record.status for record in report.norms)
                statuses.update(f"core {record.core}" for record in report.dynamic)
    wide, narrow = (max(_differences(expected, got)) for got in changed)
    rounding = max(_differences(expected, own))
    if narrow > TIMES * rounding + UNITS:  # the model may have been lucky: how far does rounding take it otherwise?
        rounding = max(rounding, *own_rounding(Program(program).finish(), own, case.inputs))
    allowed = TIMES * rounding + UNITS
    if "region=narrow" in case.words:  # both round to float16, at other places
        return wide / NARROW, narrow / max(NARROW, allowed)
    return wide / WIDE, narrow / allowed


def _look_trained(module: nn.Module, extreme: bool) -> None:
    """Gains of both signs, sometimes extreme or zero, and statistics that are no whole numbers."""
    named = "Norm" in type(module).__name__ or isinstance(module, Gain)
    with torch.no_grad():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not value.is_floating_point():
                continue
            if name.endswith(("running_var", "running_phi")):
                value.copy_(torch.exp(torch.randn_like(value) / 2))
            elif name == "weight" and named:
                value.copy_(
                    torch.exp(torch.randn_like(value) / 2) * torch.where(torch.rand_like(value) < 0.2, -1.0, 1.0)
                )
                if extreme:
                    value.view(-1)[0] = (0.0, 1e-3, 30.0)[int(torch.randint(3, ()))]
            elif name.endswith(("bias", "running_mean")):
                value.copy_(torch.randn_like(value) / 2)
            elif value.dim() > 1 and isinstance(value, nn.Parameter):
                value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _differences(expected: list[Tensor], got: list[Tensor]) -> list[float]:
    """For each output, the largest difference relative to the largest value."""
    return [
        float((want - have.double()).abs().max()) / max(float(want.abs().max()), 1e-3)
        for want, have in zip(expected, got, strict=True)
    ]
