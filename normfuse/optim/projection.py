"""What AdamP and SGDP (Heo et al., 2021, arXiv 2006.08217) share: the step, and the projection.

A weight w [out, ...] in front of a norm may grow without changing the function. Where its gradient is orthogonal to it,
``max_i |cos(grad_i, w_i)| < delta / sqrt(entries of w_i)``, per output channel or else for the whole layer, the update
loses its component along w and weight decay is multiplied by ``wd_ratio``. The component is linear in the update, so it
is one factor per channel on w itself, next to weight decay's:

    w ← w * (1 - lr * weight_decay * scale + lr * (p·w) / (‖w‖ + eps)²) - lr * p

The test is taken on the device, for all channels of all weights at once: no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

CPU_ENTRIES = 1 << 18
SMALL = 1 << 14


class Projected(Optimizer):
    """Base of AdamP and SGDP, which bring their updates."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        _check(defaults)
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        # Not part of the state: memory, and what follows from shapes.
        self._scratch: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._layouts: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Also what load_state_dict comes to, with the groups of torch's optimiser or of the authors' program.
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise ValueError(
                    f"the state is that of an optimiser with amsgrad=True, which {type(self).__name__} does not have; "
                    "start a new optimiser"
                )
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for parameter, entries in self.state.items():
            self._adopt(parameter, entries)
        self._forget()

    def _adopt(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        """The state of one parameter as other programs keep it, turned into this optimiser's; in place."""
        raise NotImplementedError

    def _memory(self, like: Tensor, entries: int, number: int) -> Tensor:
        """A vector with any content for what is like ``like``: the same memory in every step and for every batch."""
        key = (like.device, like.dtype, number)
        if key not in self._scratch or self._scratch[key].numel() < entries:
            self._scratch[key] = like.new_empty(entries)
        return self._scratch[key][:entries]

    def _workspace(self, params: list[Tensor], zero: bool = False) -> list[Tensor]:
        """Tensors like ``params`` in such memory, with any content or zeros."""
        if torch.compiler.is_compiling():
            return [torch.empty_like(p) for p in params]
        sizes = [p.numel() for p in params]
        memory = self._memory(params[0], sum(sizes), 0)
        if zero:
            memory.zero_()
        return [
            piece.view_as(p) if p.is_contiguous() else piece.as_strided(p.size(), p.stride(), piece.storage_offset())
            for piece, p in zip(memory.split(sizes), params, strict=True)
        ]

    def _joined(self, tensors: list[Tensor], runs: list[slice], number: int) -> list[Tensor]:
        """``tensors`` as [channels, entries], those of a run copied into one."""
        joined = [[t if t.dim() == 2 else t.flatten(1) for t in tensors[run]] for run in runs]
        sizes = [sum(t.numel() for t in run) if len(run) > 1 else 0 for run in joined]
        if any(sizes):
            pieces = self._memory(tensors[0], sum(sizes), number).split(sizes)
            joined = [
                [torch.cat(run, out=piece.view(-1, run[0].shape[1]))] if len(run) > 1 else run
                for run, piece in zip(joined, pieces, strict=True)
            ]
        return [matrix for (matrix,) in joined]

    def _products(self, matrices: list[Tensor], others: list[Tensor]) -> Iterable[Tensor]:
        if not _on_cpu(matrices):
            return torch._foreach_mul(matrices, others)
        # Fresh memory costs more than what is written to it.
        pairs = zip(matrices, others, strict=True)
        return (torch.mul(a, b, out=self._memory(a, a.numel(), 1).view_as(a)) for a, b in pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes the loss and its gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if type(p).__name__ == "DTensor":
                    raise TypeError(
                        f"{type(self).__name__} takes whole parameters; one of shape {tuple(p.shape)} is spread over "
                        "processes (DTensor), as fully_shard leaves it: train under DistributedDataParallel"
                    )
                if p.grad.is_sparse or p.is_complex():
                    raise TypeError(
                        f"{type(self).__name__} takes dense real gradients; a parameter of shape {tuple(p.shape)} has "
                        f"a {'sparse' if p.grad.is_sparse else 'complex'} one"
                    )
            for alike, matrix in _batches(params):
                grads = [p.grad for p in alike]
                if group["maximize"]:
                    grads = torch._foreach_neg(grads)
                updates, decay = self._updates(alike, grads, group), self._decay(group)
                if matrix:
                    factors, along = self._factors(alike, grads, updates, group, decay)
                    self._project_state(alike, along, group)
                    torch._foreach_mul_(alike, factors)
                elif decay:
                    torch._foreach_mul_(alike, 1 - group["lr"] * decay)
                if isinstance(group["lr"], Tensor):
                    torch._foreach_mul_(updates, group["lr"])
                    torch._foreach_add_(alike, updates)
                else:
                    torch._foreach_add_(alike, updates, alpha=group["lr"])
        return loss

    def _updates(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The *negative* updates, before projection and learning rate, in tensors that may be written."""
        raise NotImplementedError

    def _factors(
        self, weights: list[Tensor], grads: list[Tensor], updates: list[Tensor], group: dict[str, Any], decay: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each output channel of each weight is multiplied by, and what of each is to go from ``updates``.

        Both are [out, 1, ...] for each weight: its projected update is ``update - along * weight``.
        """
        acc = torch.promote_types(weights[0].dtype, torch.float32)
        eps, layout = group["eps"], self._layout(weights, acc)
        layer: Tensor = layout[0]
        by_channel, by_layer = group["delta"] * layout[1]

        runs = _runs(weights)
        w, g, p = (self._joined(tensors, runs, 2 + i) for i, tensors in enumerate((weights, grads, updates)))
        length_w, length_g = (
            torch.cat([torch.linalg.vector_norm(m, dim=1, dtype=acc) for m in matrices]) for matrices in (w, g)
        )
        along_g, along_p = (torch.cat([m.sum(1, dtype=acc) for m in self._products(w, others)]) for others in (g, p))

        def per_layer(numbers: Tensor, reduce: str) -> Tensor:
            return numbers.new_zeros(len(weights)).scatter_reduce(0, layer, numbers, reduce)

        def cosine(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return product.abs() / (a.clamp(min=eps) * b.clamp(min=eps))

        whole_w, whole_g = (per_layer(length.square(), "sum").sqrt() for length in (length_w, length_g))
        channels = per_layer(cosine(along_g, length_w, length_g), "amax") < by_channel
        whole = (cosine(per_layer(along_g, "sum"), whole_w, whole_g) < by_layer) & ~channels

        of_channel = along_p / (length_w + eps).square()
        of_layer = (per_layer(along_p, "sum") / (whole_w + eps).square())[layer]
        projected = torch.where(channels[layer], of_channel, torch.where(whole[layer], of_layer, 0.0))
        spared = (1 - group["wd_ratio"]) * (channels | whole)[layer].to(acc)
        factors = 1 - group["lr"] * (decay * (1 - spared) + projected)

        def per_weight(numbers: Tensor) -> list[Tensor]:
            pieces = numbers.to(weights[0].dtype).split([w.shape[0] for w in weights])
            return [piece.view(-1, *(1,) * (w.dim() - 1)) for piece, w in zip(pieces, weights, strict=True)]

        return per_weight(factors), per_weight(projected)

    def _project_state(self, weights: list[Tensor], along: list[Tensor], group: dict[str, Any]) -> None:
        """Take the same part out of what the next updates are made of, where the method says so."""

    def _layout(self, weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The layer that each channel belongs to, and 1/sqrt(entries) [2, layers] of a channel and of a layer."""
        key = (weights[0].device, dtype, *(w.shape for w in weights))
        if key not in self._layouts:
            counts = [w.shape[0] for w in weights]
            layer = torch.repeat_interleave(torch.arange(len(weights)), torch.tensor(counts))
            entries = torch.tensor([[w.numel() // w.shape[0] for w in weights], [w.numel() for w in weights]])
            self._layouts[key] = (layer.to(key[0]), entries.to(dtype).rsqrt().to(key[0]))
        return self._layouts[key]

    def _decay(self, group: dict[str, Any]) -> float:
        """Weight decay per unit of learning rate."""
        return group["weight_decay"]


def _check(options: dict[str, Any]) -> None:
    shares = {"momentum": options.get("momentum", 0.0)}
    shares |= {f"betas[{i}]": beta for i, beta in enumerate(options.get("betas", ()))}
    for name, value in shares.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value} is not allowed; give a number from 0 to less than 1")
    for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio"):
        if not options[name] >= 0.0:
            raise ValueError(f"{name}={options[name]} is not allowed; give a number of at least 0")


def _on_cpu(tensors: list[Tensor]) -> bool:
    return tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()


def _runs(weights: list[Tensor]) -> list[slice]:
    """Which neighbours to take at once: on a CPU small ones of equal width, where a call costs more than a copy."""

    def kind(index: int) -> tuple[int, int]:
        width = weights[index].numel() // weights[index].shape[0]
        return (width, -1) if weights[index].numel() <= SMALL else (width, index)

    if not _on_cpu(weights):
        return [slice(i, i + 1) for i in range(len(weights))]
    runs = (list(run) for _, run in groupby(range(len(weights)), kind))
    return [slice(run[0], run[-1] + 1) for run in runs]


def _batches(params: list[Tensor]) -> Iterator[tuple[list[Tensor], bool]]:
    """Parameters that one operation takes at once: of one device and dtype, all weights (True) or none.

    On a CPU no more at a time than its caches hold.
    """
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype, p.dim() > 1 and p.numel() > 0), []).append(p)
    for (device, _, matrix), alike in kinds.items():
        if matrix:  # equal widths side by side
            alike.sort(key=lambda p: p.numel() // p.shape[0])
        batch, entries = [], 0
        for p in alike:
            batch.append(p)
            entries += p.numel()
            if entries >= CPU_ENTRIES and device.type == "cpu":
                yield batch, matrix
                batch, entries = [], 0
        if batch:
            yield batch, matrix
