"""The norms of the family in float64 NumPy, loop by loop, sharing nothing with the package.

Inputs are [rows, channels] unless said otherwise; ``pad`` is bool [rows], True = padding.
"""

import math

import numpy as np


def batch_norm(x, weight, bias, pad, eps):
    """(y, mean, biased variance, rows counted)."""
    y, means, variances = np.empty_like(x), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    valid = [r for r in range(len(x)) if pad is None or not pad[r]]
    for c in range(x.shape[1]):
        column = [x[r, c] for r in valid]
        if column:
            means[c] = sum(column) / len(column)
            variances[c] = sum((v - means[c]) ** 2 for v in column) / len(column)
        for r in range(len(x)):
            y[r, c] = weight[c] * (x[r, c] - means[c]) / math.sqrt(variances[c] + eps) + bias[c]
    return y, means, variances, len(valid)


class BatchNormSpec:
    """Batch normalisation with ghost batches: one after another, each moving the statistics."""

    def __init__(self, channels, eps=1e-5, momentum=0.1):
        self.eps, self.momentum, self.steps = eps, momentum, 0
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.mean, self.var = np.zeros(channels), np.ones(channels)

    def train(self, parts, pads):
        results = []
        for x, pad in zip(parts, pads, strict=True):
            y, mean, var, count = batch_norm(x, self.weight, self.bias, pad, self.eps)
            if count:
                self.steps += 1
                rate = self.momentum if self.momentum is not None else 1 / self.steps
                self.mean = (1 - rate) * self.mean + rate * mean
                self.var = (1 - rate) * self.var + rate * var * count / max(count - 1, 1)
            results.append(y)
        return np.concatenate(results)

    def evaluate(self, x):
        return self.weight * (x - self.mean) / np.sqrt(self.var + self.eps) + self.bias


class EstimatedBatchNormSpec(BatchNormSpec):
    def train(self, x, pad=None):
        valid = x if pad is None else x[~pad]
        old = self.mean.copy()
        if len(valid):
            self.mean = old + self.momentum * (valid.mean(0) - old)
            self.var = self.var + self.momentum * (((valid - old) ** 2).mean(0) - self.var)
        return self.evaluate(x)


class MovingAverageNormSpec:
    STATE = ("running_var", "buffer_x2", "buffer_gz", "iters")

    def __init__(self, channels, window=16, warmup=100, eps=1e-5, momentum=0.98):
        self.warmup, self.eps, self.momentum, self.iters = warmup, eps, momentum, 0
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.running_var = np.ones(channels)
        self.buffer_x2, self.buffer_gz = np.zeros((window, channels)), np.zeros((window, channels))

    def forward(self, x, pad=None):
        valid = x if pad is None else x[~pad]
        if not len(valid):  # no step: nothing moves
            z = x / np.sqrt(self.running_var + self.eps)
            return self.weight * z + self.bias, (z, self.running_var, np.ones_like(self.weight), 0)
        q = (valid**2).mean(0)
        self.iters += 1
        window = len(self.buffer_x2)
        self.buffer_x2[self.iters % window] = q
        young = self.iters <= window or self.iters < self.warmup
        var = q if young else self.buffer_x2.mean(0)
        ratio = np.sqrt(var + self.eps) / np.sqrt(self.running_var + self.eps)
        ratio = np.ones_like(var) if self.iters <= max(1000, self.warmup) else np.clip(ratio, 1 / 5, 5)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * var
        z = x / np.sqrt(var + self.eps)
        return self.weight * ratio * z + self.bias, (z, var, ratio, self.iters)

    def backward(self, dy, saved):
        z, var, ratio, t = saved
        window = len(self.buffer_gz)
        g = dy * self.weight * ratio
        mean = (g * z).mean(0) if len(z) else np.zeros_like(self.weight)
        if t:
            self.buffer_gz[t % window] = mean
        if not t or not (t <= window or t < self.warmup):
            mean = self.buffer_gz.mean(0)
        return (g - mean * z) / np.sqrt(var + self.eps), (dy * ratio * z).sum(0), dy.sum(0)

    def evaluate(self, x):
        return self.weight * x / np.sqrt(self.running_var + self.eps) + self.bias


def standardized_weight(weight, eps=1e-5, form="std"):
    """Filter by filter; the first axis is the output."""
    result = np.empty_like(weight)
    for o in range(weight.shape[0]):
        values = weight[o].ravel()
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        divisor = math.sqrt(var) + eps if form == "std" else math.sqrt(var + eps)
        result[o] = (weight[o] - mean) / divisor
    return result


def group_norm(x, groups, weight, bias, eps):
    """x [N, C, ...]; one gain and shift per group."""
    y, width = np.empty_like(x), x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * width : (g + 1) * width]
            y[n, g * width : (g + 1) * width] = (part - part.mean()) / np.sqrt(part.var() + eps) * weight[g] + bias[g]
    return y


def region_norm(x, mask, eps, pool):
    """x [B, C, H, W], mask bool [B, H, W]. Pooled over the batch, eps counts N / n times for a region of n of N."""
    y = np.zeros_like(x)
    for c in range(x.shape[1]):
        for region in (False, True):
            for which in [[b] for b in range(x.shape[0])] if pool == "sample" else [list(range(x.shape[0]))]:
                chosen = [x[b, c][mask[b] == region] for b in which]
                values = np.concatenate(chosen)
                added = eps * mask.size / max(len(values), 1) if pool == "batch" else eps
                for b in which if len(values) else []:
                    at = mask[b] == region
                    y[b, c][at] = (x[b, c][at] - values.mean()) / np.sqrt(values.var() + added)
    return y


def time_ramp(t, slope, offset, start, end):
    s = 1 / (1 + np.exp(-(t * (slope + 1) + offset)))
    return end + s * (start - end)


def layer_norm(x, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def rms_norm(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def divided_by_rms(x, eps):
    return x / (np.sqrt((x**2).mean(-1, keepdims=True)) + eps)


def adaptive_instance_norm(x, style, eps, unbiased, alpha):
    """x, style [B, C, H, W]."""
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            deviations = [np.sqrt(np.var(v[b, c], ddof=int(unbiased)) + eps) for v in (x, style)]
            new = deviations[1] * (x[b, c] - x[b, c].mean()) / deviations[0] + style[b, c].mean()
            y[b, c] = alpha * new + (1 - alpha) * x[b, c]
    return y
