"""Unified and Power Norm in float64 NumPy, one statement per sentence of the papers.

Written to be read, not to be fast, and sharing nothing with the package: what the operations are compared
with. Inputs are [rows, channels]; ``pad`` is bool [rows], True = padding. ``forward`` returns ``(y, saved)``,
``backward`` takes ``saved`` and returns ``(dx, dw, db)``. State is kept in attributes named like the buffers
of the modules.
"""

import numpy as np


def mean_square(x, pad, empty):
    valid = x if pad is None else x[~pad]
    return (valid**2).mean(axis=0) if len(valid) else empty.copy()


def count_valid(x, pad):
    return len(x) if pad is None else int((~pad).sum())


def column_mean(x):
    return x.mean(axis=0) if len(x) else np.zeros(x.shape[1])


class UnifiedNormSpec:
    STATE = ("running_var", "ema_gz", "buffer_x2", "buffer_gz", "iters", "skip_counter")

    def __init__(self, channels, windows=(4, 4), warmup=4000, filtration=False, eps=1e-5, momentum=0.9):
        self.warmup, self.filtration, self.eps, self.momentum = warmup, filtration, eps, momentum
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.running_var, self.ema_gz = np.ones(channels), np.zeros(channels)
        self.buffer_x2, self.buffer_gz = np.zeros((windows[0], channels)), np.zeros((windows[1], channels))
        self.iters, self.skip_counter = 0, 0

    def forward(self, x, pad=None):
        window = len(self.buffer_x2)
        q = mean_square(x, pad, self.running_var)
        if not count_valid(x, pad):  # no step: nothing moves
            z = x / np.sqrt(self.running_var + self.eps)
            return self.weight * z + self.bias, (z, self.running_var, np.ones_like(q), 0, False)
        self.iters += 1
        t = self.iters
        skip = window <= 1
        numbers = np.sqrt(self.buffer_x2).ravel()
        spread = numbers.var(ddof=1) if len(numbers) > 1 else np.inf
        self.buffer_x2[t % window] = q
        with np.errstate(divide="ignore"):
            geometric = np.exp(np.log(self.buffer_x2).mean(axis=0))
        if self.filtration and t >= self.warmup:
            arithmetic = self.buffer_x2.mean(axis=0)
            if np.any(arithmetic - geometric > spread * window):
                skip = True
                self.buffer_x2[t % window] = self.running_var
                self.skip_counter += 1
        var = q if (t <= window or t < self.warmup or skip) else geometric
        if t <= max(1000, self.warmup) or skip:
            ratio = np.ones_like(var)
        else:
            ratio = np.clip(np.sqrt(var + self.eps) / np.sqrt(self.running_var + self.eps), 1 / 5, 5)
        z = x / np.sqrt(var + self.eps)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * var
        return self.weight * z + self.bias, (z, var, ratio, t, skip)

    def backward(self, dy, saved):
        z, var, ratio, t, skip = saved
        window = len(self.buffer_gz)
        g = dy * self.weight * ratio
        mean_gz = column_mean(g * z)
        if t == 0:
            dx = (g - self.ema_gz * z) / np.sqrt(var + self.eps)
            return dx, (dy * ratio * z).sum(axis=0), dy.sum(axis=0)
        self.buffer_gz[t % window] = self.ema_gz if skip else mean_gz
        smoothed = mean_gz if (t <= window or t < self.warmup or skip) else self.buffer_gz.mean(axis=0)
        self.ema_gz = self.momentum * self.ema_gz + (1 - self.momentum) * smoothed
        dx = (g - (smoothed if skip else self.ema_gz) * z) / np.sqrt(var + self.eps)
        return dx, (dy * ratio * z).sum(axis=0), dy.sum(axis=0)

    def evaluate(self, x):
        return self.weight * x / np.sqrt(self.running_var + self.eps) + self.bias


class PowerNormSpec:
    STATE = ("running_phi", "ema_gz", "iters")

    def __init__(
        self, channels, groups=1, alpha_fwd=0.9, alpha_bkw=0.9, warmup=10000, eps=1e-5, group_eps=1e-5, paper=False
    ):
        self.group_eps = group_eps
        self.groups, self.alpha_fwd, self.alpha_bkw = groups, alpha_fwd, alpha_bkw
        self.warmup, self.eps, self.paper = warmup, eps, paper
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.running_phi, self.ema_gz, self.iters = np.ones(channels), np.zeros(channels), 0

    def scale_groups(self, x):
        if not self.groups:
            return x, None
        parts = x.reshape(len(x), self.groups, x.shape[1] // self.groups)
        root = np.sqrt((parts**2).mean(axis=2, keepdims=True) + self.group_eps)
        return (parts / root).reshape(x.shape), root

    def forward(self, x, pad=None):
        scaled, root = self.scale_groups(x)
        q = mean_square(scaled, pad, self.running_phi)
        t = self.iters + 1
        used = q if t <= self.warmup else self.running_phi
        z = scaled / np.sqrt(used + self.eps)
        if not count_valid(x, pad):  # no step: nothing moves
            return self.weight * z + self.bias, (z, scaled, root, q, used, False)
        self.iters = t
        if t < self.warmup:
            self.running_phi = self.running_phi * (t - 1) / t + q / t
        self.running_phi = self.alpha_fwd * self.running_phi + (1 - self.alpha_fwd) * q
        return self.weight * z + self.bias, (z, scaled, root, q, used, True)

    def backward(self, dy, saved):
        z, scaled, root, q, used, moves = saved
        a = dy * self.weight - (1 - self.alpha_bkw) * self.ema_gz * z
        if moves:
            self.ema_gz = self.ema_gz + column_mean(a * z)
        dx = a / np.sqrt((used if self.paper else q) + self.eps)
        if self.groups:
            # d(x/root): the part of the gradient along the scaled row drops out, the rest is divided by root.
            shape = (len(dx), self.groups, dx.shape[1] // self.groups)
            d, s = dx.reshape(shape), scaled.reshape(shape)
            dx = ((d - s * (d * s).mean(axis=2, keepdims=True)) / root).reshape(dx.shape)
        return dx, (dy * z).sum(axis=0), dy.sum(axis=0)

    def evaluate(self, x):
        return self.weight * self.scale_groups(x)[0] / np.sqrt(self.running_phi + self.eps) + self.bias
