"""Weights in front of static norms that make up for what the norms no longer do, in closed form from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ProgressiveNorm
from ..nn._affine_fit import set_affine
from ..nn._running_norm import check_count
from ..nn.calibration import keep_modes, run_batch
from .fitting import static_alone
from .progressive import Conversion


class _Reached(Exception):
    """The norm of interest has its input: the rest of the forward is not needed."""


def reconstruct(
    conversion: Conversion,
    teacher: nn.Module,
    loader: Iterable[Any],
    writer: Callable[[str], str],
    *,
    max_batches: int | None = None,
    ridge: float = 0.01,
    rounds: int = 2,
    device: torch.device | str | None = None,
) -> dict[str, tuple[float, float]]:
    """Fit the linear layer in front of each static norm so that the norm's output comes close to the original's.

    For post-norm networks, ``norm(skip + linear(h))``. A static norm cannot follow the scale of each token, but the
    layer in front of it knows much about that scale: its weight, and the norm's affine map a, b, are chosen in turns to
    minimise ``‖a ⊙ (skip + linear(h)) + b − teacher‖²`` over valid positions, by least squares with a penalty on the
    change of the weight. Norm after norm in the order of the model, each with the inputs that the layers changed before
    it leave, so that errors do not add up. Nothing is trained; it is a start from which little training remains.

    Afterwards the weights fit the static norms and no longer the original ones, so let λ fall early
    (:class:`Schedule`).

    Args:
        conversion: of the model to change, calibrated or not.
        teacher: the original, a ``copy.deepcopy`` made before :func:`progressive`.
        loader: batches, as for :meth:`Conversion.calibrate`. The rows (valid positions) should be many times the inputs
            of the largest layer. The teacher's values are kept: rows × channels × norms numbers.
        writer: from the name of a norm to that of the ``nn.Linear`` whose output is a summand of the norm's input, such
            as ``lambda name: name.replace("LayerNorm", "dense")`` for BERT.
        max_batches: stop after that many; None: all.
        ridge: penalty on the change of the weight, relative to the mean variance of the layer's inputs; above 0.
        rounds: of fitting the layer and the affine map in turns.
        device: where to move batches; None: leave them.

    Returns:
        For each norm its mean squared error over the variance of the teacher's values, with the affine map fitted alone
        and with the layer fitted as well.

    Raises:
        ValueError: no data, a norm that does not run exactly once, a norm with ``group_num``, a layer that is not
            linear or no summand of the norm's input. Layers fitted until then stay changed.

    Example:
        >>> import copy
        >>> from normfuse.convert import progressive, reconstruct
        >>> from normfuse.nn import NormedBranch
        >>> model = NormedBranch(nn.Linear(8, 8), nn.LayerNorm(8), placement="post")
        >>> teacher, conversion = copy.deepcopy(model), progressive(model)
        >>> errors = reconstruct(conversion, teacher, [torch.randn(64, 8)], lambda norm: "function")
        >>> list(errors), errors["norm"][1] <= errors["norm"][0]
        (['norm'], True)
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} is not allowed; give a positive number such as 0.01")
    check_count("rounds", rounds, 1)
    model, target = conversion.model, None if device is None else torch.device(device)
    batches = list(loader if max_batches is None else islice(loader, max_batches))
    if not batches:
        raise ValueError("loader gave no batch to reconstruct with; give at least one")
    layers = {
        name: _layer(model, name, norm.static.num_features, writer(name)) for name, norm in conversion.norms.items()
    }
    for name, norm in conversion.norms.items():
        if getattr(norm.static, "group_num", None):
            raise ValueError(f"{name} scales each position by its group; reconstruct needs group_num=None")
    errors = {}
    with keep_modes(model):
        model.eval()
        expected = _teacher_values(conversion, teacher, batches, target)
        with torch.no_grad(), static_alone(conversion.norms):
            for name, values in expected.items():
                errors[name] = _fit(conversion, name, layers[name], values, batches, target, ridge, rounds)
    return errors


def _layer(model: nn.Module, norm: str, channels: int, name: str) -> nn.Linear:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        found = "does not exist" if layer is None else f"is a {type(layer).__name__}"
        raise ValueError(f"writer gives {name!r} for {norm}, which {found}; give the name of an nn.Linear")
    if layer.out_features != channels:
        raise ValueError(f"writer gives {name!r} for {norm}, with {layer.out_features} outputs for {channels} channels")
    return layer


@torch.no_grad()
def _teacher_values(
    conversion: Conversion, teacher: nn.Module, batches: list[Any], device: torch.device | None
) -> dict[str, list[Tensor]]:
    """The teacher's outputs at each norm, one tensor per batch."""
    values: dict[str, list[Tensor]] = {}
    hooks = []
    for name in conversion.norms:

        def keep(module: nn.Module, arguments: Any, output: Tensor, name: str = name) -> None:
            values.setdefault(name, []).append(output)

        hooks.append(teacher.get_submodule(name).register_forward_hook(keep))
    try:
        with keep_modes(teacher):
            teacher.eval()
            for batch in batches:
                run_batch(teacher, batch, device)
    finally:
        for hook in hooks:
            hook.remove()
    for name in conversion.norms:
        runs = len(values.get(name, ()))
        if runs != len(batches):
            raise ValueError(
                f"{name} of the teacher ran {runs} times in {len(batches)} batches; it must run once in each"
            )
    return {name: values[name] for name in conversion.norms}


class _Pair:
    """A norm and the layer that writes into it: what they take in a forward, valid rows only."""

    def __init__(self, norm: ProgressiveNorm, layer: nn.Linear) -> None:
        self.norm = norm
        self.layer = layer

    def run(self, model: nn.Module, batch: Any, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer's input, the norm's input, and which positions are valid."""
        found: dict[str, Tensor] = {}

        def reach(norm: ProgressiveNorm, arguments: tuple[Any, ...]) -> None:
            found["x"] = arguments[0]
            raise _Reached

        hooks = [
            self.layer.register_forward_pre_hook(lambda layer, arguments: found.update(h=arguments[0])),
            self.norm.register_forward_pre_hook(reach),
        ]
        try:
            run_batch(model, batch, device)
        except _Reached:
            pad_mask = self.norm.mask_for(found["x"])
            return found["h"], found["x"], None if pad_mask is None else torch.logical_not(pad_mask)
        finally:
            for hook in hooks:
                hook.remove()
        raise ValueError("a norm did not run")


def _rows(values: Tensor, valid: Tensor | None) -> Tensor:
    return values[valid] if valid is not None else values.reshape(-1, values.shape[-1])


def _fit(
    conversion: Conversion, name: str, layer: nn.Linear, values: list[Tensor], batches: list[Any],
    device: torch.device | None, ridge: float, rounds: int,
) -> tuple[float, float]:  # fmt: skip
    pair = _Pair(conversion.norms[name], layer)
    moments = _Moments(layer)
    for batch, teacher in zip(batches, values, strict=True):
        h, x, valid = pair.run(conversion.model, batch, device)
        moments.add(_rows(h, valid), _rows(x, valid), _rows(teacher, valid))
    static = pair.norm.static
    before = set_affine(static, *moments.of_the_norm(None)).item()
    change = moments.solve(ridge, rounds)
    first, x, _ = pair.run(conversion.model, batches[0], device)
    layer.weight += change.T
    predicted = x + first @ change.to(first.dtype)
    _, got, _ = pair.run(conversion.model, batches[0], device)
    if not torch.allclose(got, predicted, rtol=0, atol=1e-2 * predicted.abs().max().item()):
        layer.weight -= change.T
        raise ValueError(f"the output of the layer before {name} is not added to the norm's input; name another")
    return before, set_affine(static, *moments.of_the_norm(change)).item()


class _Moments:
    """Means and covariances, in float64, of a layer's input h, its norm's input x and the wanted output v."""

    def __init__(self, layer: nn.Linear) -> None:
        inputs, channels = layer.in_features, layer.out_features
        self.sizes = [inputs, channels, channels]
        self.sums = torch.zeros(inputs + 2 * channels, dtype=torch.float64, device=layer.weight.device)
        self.gram = self.sums.new_zeros(inputs, inputs)
        self.cross = self.sums.new_zeros(inputs, 2 * channels)
        self.squares = self.sums.new_zeros(3, channels)
        self.count = 0

    def add(self, h: Tensor, x: Tensor, v: Tensor) -> None:
        """Rows of one batch, [R, inputs] and twice [R, channels]."""
        self.sums += torch.cat([t.double().sum(0) for t in (h, x, v)])
        self.gram += (h.T @ h).double()
        self.cross += (h.T @ torch.cat([x, v], 1)).double()
        x, v = x.double(), v.double()
        self.squares += torch.stack([(x * x).sum(0), (x * v).sum(0), (v * v).sum(0)])
        self.count += len(h)

    def _centred(self) -> tuple[Tensor, ...]:
        mean_h, mean_x, mean_v = (self.sums / self.count).split(self.sizes)
        gram = self.gram / self.count - torch.outer(mean_h, mean_h)
        to_x, to_v = (self.cross / self.count - torch.outer(mean_h, torch.cat([mean_x, mean_v]))).chunk(2, 1)
        moments = self.squares / self.count - torch.stack([mean_x**2, mean_x * mean_v, mean_v**2])
        return mean_h, mean_x, mean_v, gram, to_x, to_v, *moments

    def of_the_norm(self, change: Tensor | None) -> tuple[Tensor, ...]:
        """What :func:`set_affine` takes when ``change`` [inputs, channels] has been added to the transposed weight."""
        mean_h, mean_x, mean_v, gram, to_x, to_v, var, covariance, target_var = self._centred()
        if change is not None:
            mean_x = mean_x + mean_h @ change
            var = var + (change * (2 * to_x + gram @ change)).sum(0)
            covariance = covariance + (change * to_v).sum(0)
        return mean_x, var.clamp(min=0), mean_v, target_var.clamp(min=0), covariance

    def solve(self, ridge: float, rounds: int) -> Tensor:
        """The change of the transposed weight, [inputs, channels]."""
        _, _, _, gram, to_x, to_v, *_ = self._centred()
        penalty = ridge * gram.diagonal().mean()
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        change = torch.zeros_like(to_x)
        for _ in range(rounds):
            _, var, _, _, covariance = self.of_the_norm(change)
            slope = covariance / var
            # A channel that is constant at the teacher is the shift's affair.
            usable = slope.abs() > 1e-3 * slope.abs().median()
            rest = to_v / torch.where(usable, slope, 1.0) - to_x - gram @ change
            change = change + torch.cholesky_solve(torch.where(usable, rest, 0.0), factor)
        return change
