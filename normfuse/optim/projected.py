"""AdamP and SGDP (Heo et al., 2021, arXiv 2006.08217): momentum without the part that only makes weights longer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .projection import Projected


class AdamP(Projected):
    """AdamP (Heo et al., 2021, arXiv 2006.08217): AdamW with projection; takes the arguments of ``torch.optim.AdamW``.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, a number or a tensor.
        betas: shares of the old value in the running means of gradient and squared gradient.
        eps: added to the root of the squared mean, and to lengths.
        weight_decay: decoupled, as in AdamW.
        delta: threshold of the cosine, times the root of the number of entries.
        wd_ratio: factor on weight decay where an update is projected.
        nesterov: use the next step's running mean of the gradient.
        maximize: maximise the objective instead of minimising it.

    Raises:
        ValueError: an option is out of its range. TypeError (from ``step``): a sparse or complex gradient.

    Example:
        >>> from normfuse.optim import AdamP
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta,
                "wd_ratio": wd_ratio, "nesterov": nesterov, "maximize": maximize,
            },
        )  # fmt: skip

    def _updates(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        steps, means, squares = ([self.state[p][k] for p in params] for k in ("step", "exp_avg", "exp_avg_sq"))
        (beta1, beta2), nesterov = group["betas"], group["nesterov"]
        torch._foreach_add_(steps, 1)
        if torch.compiler.is_compiling():  # one operation after another, for the compiler to bring together
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            # The divisor: (1 - beta1^t) * (sqrt(squares / (1 - beta2^t)) + eps).
            dtype = params[0].dtype
            counts = torch.stack(steps).to(torch.promote_types(dtype, torch.float32))
            bias1, bias2 = 1 - beta1**counts, 1 - beta2**counts
            divisors = torch._foreach_sqrt(squares)
            torch._foreach_mul_(divisors, list((bias1 / bias2.sqrt()).to(dtype).unbind()))
            torch._foreach_add_(divisors, list((group["eps"] * bias1).to(dtype).unbind()))
            updates = torch._foreach_neg(torch._foreach_lerp(means, grads, 1 - beta1) if nesterov else means)
            torch._foreach_div_(updates, divisors)
            return updates
        # PyTorch's fused Adam moves both means and takes its step, here from 0 and of length 1: minus the update. The
        # next step's mean, beta1 * mean + (1 - beta1) * grad, is what it computes with beta1² in place of beta1; the
        # bias is then off by (1 - beta1^2t) / (1 - beta1^t) = 1 + beta1^t.
        updates, share, length, lengths = self._workspace(params, zero=True), beta1, 1.0, None
        if nesterov:
            share, counts = beta1**2, torch.stack(steps)
            if params[0].device.type == "cpu" and bool((counts == counts[0]).all()):
                length = 1 + beta1 ** counts[0].item()
            else:
                lengths = 1 + beta1 ** counts.to(torch.promote_types(params[0].dtype, torch.float32))
        torch._fused_adam_(
            updates, grads, means, squares, [], steps, lr=length, beta1=share, beta2=beta2, weight_decay=0.0,
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        if lengths is not None:
            torch._foreach_mul_(updates, list(lengths.to(params[0].dtype).unbind()))
        if nesterov and beta1 > 0:  # from the next step's mean back to this one's
            torch._foreach_lerp_(means, grads, 1 - 1 / beta1)
        return updates

    def _adopt(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        if "step" in entries:
            step = torch.as_tensor(entries["step"], dtype=torch.float32)
            entries["step"] = step.to(parameter.device)


class SGDP(Projected):
    """SGDP (Heo et al., 2021, arXiv 2006.08217): SGD with projection; weight decay is decoupled, ÷ ``1 - momentum``.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, a number or a tensor.
        momentum: share of the old velocity, less than 1.
        dampening: one minus the share of the gradient in the velocity.
        weight_decay: decoupled; ``lr * weight_decay / (1 - momentum)`` of a weight goes in a step.
        nesterov: use the gradient plus momentum times the velocity.
        eps: added to lengths.
        delta: threshold of the cosine, times the root of the number of entries.
        wd_ratio: factor on weight decay where an update is projected.
        maximize: maximise the objective instead of minimising it.
        project_buffer: without ``nesterov`` the velocity itself is projected, as in the authors' program, where update
            and velocity are the same tensor. False: only the update is, as in their paper's algorithm. With
            ``nesterov`` or without momentum the two are the same.

    Raises:
        ValueError: an option is out of its range. TypeError (from ``step``): a sparse or complex gradient.

    Example:
        >>> from normfuse.optim import SGDP
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = SGDP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        maximize: bool = False,
        project_buffer: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                "nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio, "maximize": maximize,
                "project_buffer": project_buffer,
            },
        )  # fmt: skip

    def _updates(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, grads, alpha=1 - group["dampening"])
        updates = self._workspace(params)
        if not group["nesterov"]:
            torch._foreach_copy_(updates, velocities)
        else:
            torch._foreach_copy_(updates, grads)
            torch._foreach_add_(updates, velocities, alpha=group["momentum"])
        torch._foreach_neg_(updates)
        return updates

    def _adopt(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        velocity = entries.pop("momentum", None)  # the authors' name
        if velocity is not None:
            entries["momentum_buffer"] = velocity
        if entries.get("momentum_buffer", self) is None:  # what torch's SGD keeps without momentum
            del entries["momentum_buffer"]

    def _project_state(self, weights: list[Tensor], along: list[Tensor], group: dict[str, Any]) -> None:
        if group["project_buffer"] and not group["nesterov"] and group["momentum"]:
            # ``along`` is that of the negative updates.
            velocities = [self.state[w]["momentum_buffer"] for w in weights]
            torch._foreach_add_(velocities, torch._foreach_mul(weights, along))

    def _decay(self, group: dict[str, Any]) -> float:
        return group["weight_decay"] / (1 - group["momentum"])
