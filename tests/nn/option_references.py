"""The norms of the registry in float64, statement by statement, with every option; they share nothing with the package.

A reference is made of a norm as it is: it copies parameters and buffers, and reads options from ``options``, with which
the norm was built. ``forward(x, **others)`` is one call in training or evaluation. Gradients of the exact norms are
autograd's; the approximate ones are ``spec_numpy`` and ``norm_formulas``.
"""

import math

import norm_formulas
import numpy as np
import spec_numpy
import torch
from torch.nn import functional as F


class Reference:
    """Of a norm whose gradient is autograd's."""

    def __init__(self, norm, **options):
        self.parameters = {n: p.detach().clone().requires_grad_() for n, p in norm.named_parameters()}
        self.buffers = {n: b.clone() for n, b in norm.named_buffers()}
        self.options = options
        self.training = True

    def option(self, name, default):
        return self.options.get(name, default)

    def affine(self, prefix="", width=None):
        """Gain and shift; 1 and 0 where there are none."""
        of = self.parameters.get
        return of(prefix + "weight", torch.tensor(1.0)), of(prefix + "bias", torch.tensor(0.0))


class RowReference(Reference):
    eps = 1e-5

    def forward(self, x, residual=None):
        s = x if residual is None else x + residual
        weight, bias = self.affine()
        gain = 1 + weight if self.option("unit_offset", False) and "weight" in self.parameters else weight
        eps = self.option("eps", self.eps)
        y = gain * self.divided(s, torch.finfo(s.dtype).eps if eps is None else eps) + bias
        return y if residual is None else (y, s)


class LayerReference(RowReference):
    def divided(self, s, eps):
        centred = s - s.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


class RMSReference(RowReference):
    eps = None

    def divided(self, s, eps):
        return s / (s.square().mean(-1, keepdim=True) + eps).sqrt()


class CRMSReference(RowReference):
    def divided(self, s, eps):
        total = s.square().sum(-1, keepdim=True) + s.sum(-1, keepdim=True).square()
        return s / (total / (s.shape[-1] + 1) + eps).sqrt()


class BatchReference(Reference):
    """Batch normalisation with masks and ghost batches; ``prefix`` of its names in a larger module."""

    prefix, channel_dim = "", -1

    def forward(self, x, pad_mask=None):
        dim = self.option("channel_dim", self.channel_dim)
        rows = x.movedim(dim, -1)
        sizes = [len(rows)]
        ghost = self.option("ghost_size", None)
        if self.training and ghost and len(rows) >= 2 * ghost:
            sizes = [ghost] * (len(rows) // ghost - 1) + [len(rows) - ghost * (len(rows) // ghost - 1)]
        masks = [None] * len(sizes) if pad_mask is None else pad_mask.split(sizes)
        return torch.cat([self.part(p, m) for p, m in zip(rows.split(sizes), masks, strict=True)]).movedim(-1, dim)

    def part(self, x, mask):
        p = self.prefix
        mean, var = self.buffers[p + "running_mean"], self.buffers[p + "running_var"]
        if self.training:
            mean, var = self.step(x.reshape(-1, x.shape[-1]) if mask is None else x[~mask], mean, var)
        return self.finish(x, self.normalised(x, mean, var), mask)

    def step(self, valid, running_mean, running_var):
        self.count(valid)
        mean, var = valid.mean(0), valid.var(0, unbiased=False)
        n = len(valid)
        self.move(mean, var * n / max(n - 1, 1))
        return mean, var

    def count(self, valid):
        self.buffers[self.prefix + "num_batches_tracked"] += len(valid) > 0

    def move(self, mean, var):
        momentum = self.option("momentum", 0.1)
        rate = 1 / int(self.buffers[self.prefix + "num_batches_tracked"]) if momentum is None else momentum
        for name, new in (("running_mean", mean), ("running_var", var)):
            self.buffers[self.prefix + name] = (1 - rate) * self.buffers[self.prefix + name] + rate * new.detach()

    def normalised(self, x, mean, var):
        return (x - mean) / (var + self.option("eps", 1e-5)).sqrt()

    def finish(self, x, z, mask):
        weight, bias = self.affine(self.prefix)
        return weight * z + bias


class RepReference(BatchReference):
    def finish(self, x, z, mask):
        return super().finish(x, z, mask) + self.parameters[self.prefix + "alpha"] * x


class RegularisedReference(BatchReference):
    def normalised(self, x, mean, var):
        return (x - mean) / torch.maximum(var, torch.tensor(self.option("eps", 1e-5), dtype=x.dtype)).sqrt()

    def finish(self, x, z, mask):
        y = super().finish(x, z, mask)
        return y if mask is None else torch.where(mask[..., None], 0.0, y)


class EstimatedReference(BatchReference):
    def step(self, valid, running_mean, running_var):
        self.count(valid)
        with torch.no_grad():
            self.move(valid.mean(0), (valid - running_mean).square().mean(0))
        return self.buffers[self.prefix + "running_mean"], self.buffers[self.prefix + "running_var"]


class ProgressiveReference(Reference):
    """The original is a LayerNorm, the static norm a RepBatchNorm. ``steps`` optimiser steps have been counted."""

    def __init__(self, norm, **options):
        super().__init__(norm, **options)
        self.original = Part(LayerReference, self, "original.")
        self.static = Part(RepReference, self, "static.")

    def forward(self, x, pad_mask=None):
        begin, end, r0 = self.option("begin", 0), self.options["end"], self.option("r0", 1.0)
        step = int(self.buffers["step"])
        left = max(0.0, 1 - (step - begin) / (end - begin))
        if self.option("shape", "linear") == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        share = 1.0 if step < begin else r0 * left
        self.static.training = self.training and not self.option("frozen", False)
        if not self.training and (self.option("evaluate_static", False) or share == 0):
            return self.static.forward(x, pad_mask)
        original = self.original.forward(x)
        if self.training and step < begin:
            return original
        return share * original + (1 - share) * self.static.forward(x, pad_mask)


class Part:
    """A reference for what lies below a prefix of another's names, with that other's parameters and buffers."""

    def __new__(cls, kind, whole, prefix, **options):
        part = kind.__new__(kind)
        part.parameters, part.buffers, part.options = whole.parameters, whole.buffers, options
        part.training, part.prefix = True, prefix
        if not issubclass(kind, BatchReference):
            affine = part.affine
            part.affine = lambda: affine(prefix)
        return part


class BatchChannelReference(Reference):
    def __init__(self, norm, **options):
        super().__init__(norm, **options)
        kind = EstimatedReference if self.option("estimated", False) else BatchReference
        given = {name: options[name] for name in ("momentum", "ghost_size") if name in options}
        self.half = Part(kind, self, "batch_norm.", channel_dim=1, **given)  # its eps is 1e-5 whatever this one's is

    def forward(self, x):
        self.half.training = self.training
        groups = self.option("num_groups", 32)
        parts = self.half.forward(x).unflatten(1, (groups, -1)).flatten(2)
        parts = parts - parts.mean(2, keepdim=True)
        parts = parts / (parts.square().mean(2, keepdim=True) + self.option("eps", 1e-5)).sqrt()
        weight, bias = (self.parameters[f"group_{name}"][:, None] for name in ("weight", "bias"))
        return (weight * parts + bias).view(x.shape)


class DomainReference(Reference):
    def __init__(self, norm, **options):
        super().__init__(norm, **options)
        self.parts = [
            Part(BatchReference, self, f"norms.{i}.", **self.option("inner", {}))
            for i in range(self.option("num_domains", 2))
        ]

    def forward(self, x, pad_mask=None):
        for part in self.parts:
            part.training = self.training
        if not self.training:
            return self.parts[self.option("domain", 0)].forward(x, pad_mask)
        n = len(self.parts)
        masks = [None] * n if pad_mask is None else pad_mask.chunk(n)
        return torch.cat([part.forward(v, m) for part, v, m in zip(self.parts, x.chunk(n), masks, strict=True)])


def regions(x, mask, eps, pool):
    """Each region by its own statistics; hard masks [B, 1, H, W]."""
    y = torch.zeros_like(x)
    dims = (0, 2, 3) if pool == "batch" else (2, 3)
    for inside in (mask, ~mask):
        inside = inside.expand_as(x)
        n = inside.to(x.dtype).sum(dims, keepdim=True).clamp(min=1)  # an empty region has no effect
        mean = torch.where(inside, x, 0.0).sum(dims, keepdim=True) / n
        var = torch.where(inside, (x - mean).square(), 0.0).sum(dims, keepdim=True) / n
        total = x.numel() / x.shape[1] / (1 if pool == "batch" else len(x))
        root = (var + (eps * total / n if pool == "batch" else eps)).sqrt()
        y = y + torch.where(inside, (x - mean) / root, 0.0)
    return y


class RegionReference(Reference):
    def forward(self, x, mask):
        (w0, w1), (b0, b1) = (self.parameters[name][..., None, None] for name in ("weight", "bias"))
        z = regions(x, mask, self.option("eps", 1e-5), self.option("pool", "sample"))
        shift = b0 + b1 if self.option("shift_everywhere", False) else torch.where(mask, b1, b0)
        return z * (1 + torch.where(mask, w1, w0)) + shift


class LearnableRegionReference(Reference):
    def convolved(self, name, x):
        weight = self.parameters[f"{name}.weight"]
        return F.conv2d(x, weight, self.parameters.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def forward(self, x):
        level = torch.sigmoid(self.convolved("attention", torch.stack([x.mean(1), x.max(1).values], 1)))
        inside = (level >= self.option("threshold", 0.8)).detach()
        z = regions(x, inside, self.option("eps", 1e-5), self.option("pool", "sample"))
        return z * (1 + self.convolved("gain", level)) + self.convolved("shift", level)


class StyleReference(Reference):
    def forward(self, x, style, alpha=1.0):
        def statistics(v):
            var = v.var(tuple(range(2, v.dim())), unbiased=self.option("unbiased", False), keepdim=True)
            return v.mean(tuple(range(2, v.dim())), keepdim=True), (var + self.option("eps", 1e-5)).sqrt()

        (mean, std), (style_mean, style_std) = statistics(x), statistics(style)
        return alpha * (style_std * (x - mean) / std + style_mean) + (1 - alpha) * x


class TimeReference(Reference):
    def ramp(self, name, t):
        of = {part: self.parameters[f"{name}.{part}"] for part in ("slope", "offset", "start", "end")}
        s = torch.sigmoid(t[:, None] * (of["slope"] + 1) + of["offset"])
        value = of["end"] + s * (of["start"] - of["end"])
        return value.view(len(t), *[1] * self.middle, -1)

    def forward(self, x, log_snr):
        t, self.middle = log_snr / 4, x.dim() - 2
        if self.option("rms", False):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.option("eps", 1e-8)) * self.ramp("gain", t)
        centred = x - x.mean(-1, keepdim=True)
        z = centred / (centred.square().mean(-1, keepdim=True) + self.option("eps", 1e-5)).sqrt()
        return z * self.ramp("gain", t) + self.ramp("shift", t)


class DyTReference(Reference):
    def forward(self, x):
        of = self.parameters
        u = of["alpha"] * x
        return of["weight"] * (torch.erf(u + of["shift"]) if "shift" in of else torch.tanh(u)) + of["bias"]


class LayerOfWeight(Reference):
    """A linear layer whose weight is another's function."""

    def forward(self, x):
        name = self.option("name", "weight")
        return x @ self.weight(self.parameters[f"parametrizations.{name}.original"]).T + self.parameters["bias"]


class StandardisedReference(LayerOfWeight):
    def weight(self, w):
        centred, eps = w - w.mean(1, keepdim=True), self.option("eps", 1e-5)
        var = w.var(1, keepdim=True)
        return centred / ((var + eps).sqrt() if self.option("form", "std") == "variance" else var.sqrt() + eps)


class CentredReference(LayerOfWeight):
    def weight(self, w):
        return w - w.mean(1, keepdim=True)


class SpectralReference(LayerOfWeight):
    def weight(self, w):
        prefix = "parametrizations.weight.0."
        u, v = self.buffers[prefix + "u"], self.buffers[prefix + "v"]
        if self.training or self.option("iterate_in_evaluation", False):
            with torch.no_grad():
                if self.option("program", "speech") == "vision":
                    u = F.normalize(w @ v, dim=0)
                    v = F.normalize(w.T @ u, dim=0)
                else:
                    v = F.normalize(w.T @ u, dim=0)
                    u = F.normalize(w @ v, dim=0)
            if self.training:
                self.buffers[prefix + "u"], self.buffers[prefix + "v"] = u, v
        return self.parameters[prefix + "gain"] * w / (u @ w @ v)


class ApproximateReference(Reference):
    """Of a norm with an approximate gradient: one of the NumPy specifications, on rows and in ghost batches."""

    channel_dim = -1

    def __init__(self, norm, **options):
        super().__init__(norm, **options)
        self.spec = self.make_spec(norm.num_features)
        for name in ("weight", "bias"):
            if name in self.parameters:
                setattr(self.spec, name, self.parameters[name].detach().numpy())

    def forward(self, x, pad_mask=None, residual=None):
        s = x if residual is None else x + residual
        dim = self.option("channel_dim", self.channel_dim)
        rows = s.detach().movedim(dim, -1)
        ghost = self.option("ghost_size", None) if self.training else None
        sizes = [len(rows)]
        if ghost and len(rows) >= 2 * ghost:
            sizes = [ghost] * (len(rows) // ghost - 1) + [len(rows) - ghost * (len(rows) // ghost - 1)]
        masks = [None] * len(sizes) if pad_mask is None else [m.flatten().numpy() for m in pad_mask.split(sizes)]
        parts = [part.reshape(-1, rows.shape[-1]).numpy() for part in rows.split(sizes)]
        if not self.training:
            return torch.from_numpy(self.spec.evaluate(parts[0])).view(rows.shape).movedim(-1, dim)
        results = [self.spec.forward(part, mask) for part, mask in zip(parts, masks, strict=True)]
        y = torch.from_numpy(np.concatenate([y for y, _ in results])).view(rows.shape).movedim(-1, dim)
        saved = [kept for _, kept in results]
        y = WithGradients.apply(self, s, *self.parameters.values(), saved, sizes, dim, y)
        return y if residual is None else (y, s)

    @property
    def buffers(self):
        return {name: torch.as_tensor(getattr(self.spec, name)) for name in self.spec.STATE}

    @buffers.setter
    def buffers(self, _):
        """The specification's own state is what counts."""


class WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reference, s, *rest):
        *_, saved, sizes, dim, y = rest
        ctx.given = reference, saved, sizes, dim, len(reference.parameters)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        reference, saved, sizes, dim, count = ctx.given
        rows = grad.movedim(dim, -1)
        parts, sums = [None] * len(sizes), [0.0, 0.0]
        cut = list(rows.split(sizes))
        for i in reversed(range(len(sizes))):  # the last ghost batch is the first that gradients reach
            dx, *more = reference.spec.backward(cut[i].reshape(-1, rows.shape[-1]).numpy(), saved[i])
            parts[i] = torch.from_numpy(dx).view(cut[i].shape)
            sums = [total + torch.from_numpy(value) for total, value in zip(sums, more, strict=True)]
        return None, torch.cat(parts).movedim(-1, dim), *sums[:count], *[None] * 4


class UnifiedReference(ApproximateReference):
    def make_spec(self, channels):
        window = self.option("window_size", 4)
        return spec_numpy.UnifiedNormSpec(
            channels,
            windows=window if isinstance(window, tuple) else (window, window),
            warmup=self.option("warmup_iters", 4000),
            filtration=self.option("outlier_filtration", False),
            eps=self.option("eps", 1e-5),
            momentum=self.option("momentum", 0.9),
        )


class PowerReference(ApproximateReference):
    def make_spec(self, channels):
        return spec_numpy.PowerNormSpec(
            channels,
            groups=self.option("group_num", 1),
            alpha_fwd=self.option("alpha_fwd", 0.9),
            alpha_bkw=self.option("alpha_bkw", 0.9),
            warmup=self.option("warmup_iters", 10000),
            eps=self.option("eps", 1e-5),
            group_eps=self.option("group_eps", 1e-5),
            paper=self.option("backward", "reference") == "paper",
        )


class MovingAverageReference(ApproximateReference):
    channel_dim = 1

    def make_spec(self, channels):
        return norm_formulas.MovingAverageNormSpec(
            channels,
            window=self.option("window_size", 16),
            warmup=self.option("warmup_iters", 100),
            eps=self.option("eps", 1e-5),
            momentum=self.option("momentum", 0.98),
        )
