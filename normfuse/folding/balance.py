"""The scales that suit integers: of each class of scales one factor is free, and here data chooses it.

Dynamic quantisation gives a product ``y = W x`` one step for all of ``x`` and one for each row of ``W``. With channels
stored at scales s it computes ``(W diag(s)) (x / s)``: a larger s makes a channel's activations small beside the
others' and its column of weights large. Rounding adds to output o, beside what it is in exact arithmetic, noise of
variance

    step(x/s)² / 12 · Σ_c (W_oc s_c)²   +   step(W_o s)² / 12 · Σ_c E[(x_c / s_c)²]

Folding ties scales of one channel along a stream, so that all readers of the stream share s but for the ratios of the
norms between them: what SmoothQuant (arXiv 2211.10438) and cross-layer equalisation (arXiv 1906.04721) choose layer by
layer is chosen here for all readers at once. How much the noise of a value matters is measured: the squared derivative
of the program's output by it, in random directions. The sum over all products is the predicted squared error of the
output, a function of the logarithms of the free factors, which Adam minimises.

Norms whose ratios no choice of factors makes up for stay, those that cost most first, until the predicted error is well
below that for the program as it was, or no further one lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from normfuse.errors import one_line

from .gauge import Gauge
from .nodes import module_of
from .program import Program
from .report import FoldError

aten = torch.ops.aten
BALANCES = ("int8", "int8-per-tensor")
PROBES = 8  # random directions of the output
# The predicted error ÷ that of the unfolded program at which no more norms stay: measured errors were up to 1.35 times
# the predicted ones, because noise is neither small nor independent.
ENOUGH = 0.78
LOWER = 0.97  # what one more norm that stays must bring the predicted error down to
STEPS = 150  # of the optimiser
SHARPNESS = (8.0, 64.0)  # of the soft maximum, at first and in the end
WIDEST = 40.0  # of a factor's logarithm to base two, on either side
_WEIGHT_ON_THE_RIGHT = {aten.matmul.default, aten.mm.default, aten.addmm.default}


@dataclass
class Seen:
    """What was seen of a product on the example inputs, in float64; channels are the last axis of its input.

    Attributes:
        low, high, mean, square: smallest, largest and mean value and mean square of each input channel.
        importance: for each output channel the sum over positions of the squared derivative of the program's output.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    square: Tensor
    importance: Tensor


class _Watching(Interpreter):
    """Runs a program and keeps, of some products, the input and a zero that is added to the output for its gradient."""

    def __init__(self, program: Program, products: Sequence[Node]) -> None:
        super().__init__(program.runnable())
        self.names = {node.name for node in products}
        self.inputs: dict[str, Tensor] = {}
        self.zeros: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.name in self.names:
            self.inputs[node.name] = self.env[_input_of(node)].detach()
            self.zeros[node.name] = torch.zeros_like(result, requires_grad=True)
            result = result + self.zeros[node.name]
        return result


def _input_of(node: Node) -> Node:
    return node.args[1] if node.target is aten.addmm.default else node.args[0]


def _weight_of(node: Node) -> Node:
    return node.args[2] if node.target is aten.addmm.default else node.args[1]


def products(program: Program) -> list[Node]:
    """The products of floats with a constant matrix, which is what is quantised."""
    found = []
    for node in program.graph.nodes:
        if node.target is aten.linear.default or node.target in _WEIGHT_ON_THE_RIGHT:
            x, weight = _input_of(node), _weight_of(node)
            like = weight.meta["val"]
            floats = like.is_floating_point() and like.dim() == 2
            if floats and program.is_constant(weight) and not program.is_constant(x):
                found.append(node)
    return found


def observe(program: Program, runs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[Node, Seen]:
    """Run a program on example inputs, given as arguments and keyword arguments, and look at its products.

    Raises:
        FoldError: the program has no product with a constant weight, no derivative, or values that are not finite.
    """
    found = products(program)
    if not found:
        raise FoldError(
            "int8 needs products with constant weights (Linear; convolutions stay in float), and the program has none: "
            "leave balance out, or export in float32 or float16"
        )
    looks = [_observe_run(program, found, args, kwargs) for args, kwargs in runs]
    for node in found:
        if not all(look[node.name].square.isfinite().all() for look in looks if node.name in look):
            raise FoldError(
                f"the typical inputs give values that are not finite in front of {module_of(node)[0] or node.name!r}; "
                "give others to choose scales by"
            )
    return {
        node: _mean([look[node.name] for look in looks if node.name in look]) for node in found if node.name in looks[0]
    }


def _mean(seen: list[Seen]) -> Seen:
    """Of several runs, each of which has steps of its own; importances add up."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in seen]).mean(0)

    importance = torch.stack([one.importance for one in seen]).sum(0)
    return Seen(mean("low"), mean("high"), mean("mean"), mean("square"), importance)


def _observe_run(program: Program, found: list[Node], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Seen]:
    own = {**program.constants, **program.state_dict}
    given = iter(pytree.tree_leaves((args, kwargs)))
    operands = [own[s.target] if s.target in own else next(given) for s in program.signature.input_specs]
    operands = pytree.tree_map_only(Tensor, Tensor.detach, operands)
    watching = _Watching(program, found)
    try:
        with torch.enable_grad():
            outputs = pytree.tree_leaves(watching.run(*operands, enable_io_processing=False))
    except Exception as error:  # whatever an operation raises for values that it does not take
        why = str(error).partition("While executing")[0]  # what follows are lines of the model
        raise FoldError(f"the program fails on the typical inputs: {one_line(why)}") from error
    outputs = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point() and o.requires_grad]
    zeros = list(watching.zeros.values())
    squares = [torch.zeros(z.shape[-1], dtype=torch.float64) for z in zeros]
    generator = torch.Generator().manual_seed(0)
    for probe in range(PROBES if outputs else 0):
        signs = [torch.randint(2, o.shape, generator=generator).to(o) * 2 - 1 for o in outputs]
        try:
            gradients = torch.autograd.grad(outputs, zeros, signs, retain_graph=probe + 1 < PROBES, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            raise FoldError(f"int8 needs the derivative of the program, which has none: {one_line(error)}") from error
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:  # not finite where a square root is zero, say: nothing is known of it then
                gradient = gradient.double().nan_to_num(0.0, 0.0, 0.0)
                square += gradient.square().reshape(-1, len(square)).sum(0) / PROBES
    seen = {}
    for (name, x), importance in zip(watching.inputs.items(), squares, strict=True):
        x = x.double().reshape(-1, x.shape[-1])
        seen[name] = Seen(x.amin(0), x.amax(0), x.mean(0), x.square().mean(0), importance)
    return seen


class _Term:
    """The noise of one product, in the original's units, as a function of the scales of its channels."""

    def __init__(self, weight: Tensor, about: Seen, shift: Tensor) -> None:
        self.size = weight.abs().float()  # [outputs, inputs]; enough digits for a step
        self.importance = about.importance
        self.sensitivity = about.importance @ weight.square()
        self.low, self.high = about.low - shift, about.high - shift
        self.square = about.square - 2 * shift * about.mean + shift**2

    def __call__(self, scale: Tensor, out_scale: Tensor | None, sharpness: float) -> Tensor:
        span = _largest((self.high / scale).clamp(min=0), sharpness) + _largest(
            (-self.low / scale).clamp(min=0), sharpness
        )
        of_activations = (span / 255) ** 2 / 12 * (self.sensitivity @ scale.square())
        rows = (self.size * scale.float()).amax(1).double()
        importance = self.importance
        if out_scale is not None:  # one step for the whole weight, which is stored ÷ the scales of its outputs
            rows = _largest(rows / out_scale, sharpness)
            importance = (importance * out_scale.square()).sum()
        of_weights = (importance * (rows / 127).square()).sum() / 12 * (self.square / scale.square()).sum()
        return of_activations + of_weights


class Prediction:
    """The predicted squared error of the output as a function of the free factors.

    Args:
        gauge: scales and shifts are settled. None: the program as it is, every scale one and every shift zero.
        program, seen: see :func:`observe`.
        per_tensor: whether a weight has one step for all of its rows.
    """

    def __init__(self, gauge: Gauge | None, program: Program, seen: dict[Node, Seen], per_tensor: bool) -> None:
        self.per_tensor = per_tensor
        self.terms: list[_Term] = []
        numbers: list[np.ndarray] = []
        for node, about in seen.items():
            weight = program.constant(_weight_of(node))
            weight = weight if node.target is aten.linear.default else weight.T
            x, shift = _input_of(node), np.zeros(1)
            for value, channels in ((x, weight.shape[1]), (node, weight.shape[0])):
                index = gauge.scale(value) if gauge is not None else np.zeros(1, np.int64)
                numbers.append(_along_last(index, channels))
            if gauge is not None:
                shift = _along_last(gauge.incoming(node, x), weight.shape[1])
            self.terms.append(_Term(weight, about, torch.from_numpy(np.array(shift))))
        flat = np.concatenate(numbers)
        scales = np.abs(gauge.scales[flat]) if gauge is not None else np.ones(len(flat))
        self.starts = torch.from_numpy(np.where(scales > 0, scales, 1.0))
        self.roots, places = np.unique(gauge.scales.roots(flat) if gauge is not None else flat, return_inverse=True)
        self.places = torch.from_numpy(places)
        adjustable = gauge.scales.adjustable(self.roots) if gauge is not None else np.zeros(1, bool)
        self.free = torch.from_numpy(adjustable)
        self.sizes = [len(part) for part in numbers]

    def scales(self, logarithms: Tensor) -> Tensor:
        """The scales of inputs and outputs of all products, one after another."""
        return self.starts * logarithms[self.places].exp()

    def near(self, scales: Tensor) -> Tensor:
        """The logarithms that come closest to scales of another prediction for the same products."""
        wanted = (scales / self.starts).log()
        total = torch.zeros(len(self.roots), dtype=torch.float64).index_add_(0, self.places, wanted)
        mean = total / torch.bincount(self.places, minlength=len(self.roots))
        return torch.where(self.free, mean, 0.0)

    def __call__(self, logarithms: Tensor, sharpness: float = math.inf) -> Tensor:
        """The error for factors ``exp(logarithms)`` of the classes ``roots``."""
        parts = iter(self.scales(logarithms).split(self.sizes))
        total = torch.zeros((), dtype=torch.float64)
        for term in self.terms:
            scale, out_scale = next(parts), next(parts)
            total = total + term(scale, out_scale if self.per_tensor else None, sharpness)
        return total

    def minimise(self, begin: Tensor | None = None, steps: int | None = None) -> tuple[Tensor, float]:
        """The best logarithms that were found and the error with them."""
        logarithms = torch.zeros(len(self.roots), dtype=torch.float64) if begin is None else begin.clone()
        best, lowest = logarithms.clone(), float(self(logarithms))
        if not self.free.any():
            return best, lowest
        logarithms.requires_grad_(True)
        steps = STEPS if steps is None else steps
        optimizer = torch.optim.Adam([logarithms], betas=(0.9, 0.95))
        limit = WIDEST * math.log(2)
        for step in range(steps):
            progress = step / max(1, steps - 1)
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - progress) + 0.005
            with torch.enable_grad():
                loss = self(logarithms, SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** progress).log()
            optimizer.zero_grad()
            loss.backward()
            logarithms.grad.masked_fill_(~self.free, 0.0)
            optimizer.step()
            with torch.no_grad():
                logarithms.clamp_(-limit, limit)
                if step % 10 == 9 or step == steps - 1:
                    error = float(self(logarithms))
                    if error < lowest:
                        best, lowest = logarithms.detach().clone(), error
        return best, lowest


def _largest(values: Tensor, sharpness: float) -> Tensor:
    """The largest of values that are not negative; with a finite sharpness from above, and smooth."""
    largest = values.amax()
    if sharpness == math.inf:
        return largest
    fixed = largest.detach().clamp(min=1e-300)
    return fixed * (values / fixed).pow(sharpness).sum().clamp(min=1e-300).pow(1 / sharpness)


def _along_last(array: np.ndarray, channels: int) -> np.ndarray:
    """An array that varies along its last axis only, as a vector."""
    first = array.reshape(-1, array.shape[-1])[0]
    return np.broadcast_to(first, (channels,))


def choose(
    settle: Callable[[frozenset[Node]], Gauge], program: Program, seen: dict[Node, Seen], per_tensor: bool
) -> tuple[Gauge, float]:
    """Choose the norms that stay and the free factors.

    Args:
        settle: gives the gauge in which the given maps stay.
        program: see :class:`Prediction`.
        seen: see :class:`Prediction`.
        per_tensor: see :class:`Prediction`.

    Returns:
        The gauge, and the predicted error of the output ÷ that of the program as it was.
    """
    nothing = torch.zeros(1, dtype=torch.float64)
    unfolded = float(Prediction(None, program, seen, per_tensor)(nothing))
    gauge = settle(frozenset())
    prediction = Prediction(gauge, program, seen, per_tensor)
    logarithms, error = prediction.minimise()
    kept: frozenset[Node] = frozenset()
    while error > ENOUGH**2 * unfolded:
        left = [n for n in gauge.matches.demands if n not in gauge.solution.kept and _stretches(n, gauge)]
        if not left:
            break
        scales, tried = prediction.scales(logarithms), {}
        for node in left:
            candidate = Prediction(settle(kept | {node}), program, seen, per_tensor)
            tried[node] = candidate.minimise(candidate.near(scales), STEPS // 5)[1]
        node = min(left, key=tried.__getitem__)
        if tried[node] > LOWER**2 * error:
            break
        kept |= {node}
        gauge = settle(kept)
        prediction = Prediction(gauge, program, seen, per_tensor)
        logarithms, error = prediction.minimise(prediction.near(scales))
    free = prediction.free.numpy()
    gauge.scales.multiply(prediction.roots[free], logarithms.exp().numpy()[free])
    return gauge, math.sqrt(error / unfolded) if unfolded > 0 else 1.0


def _stretches(node: Node, gauge: Gauge) -> bool:
    """Whether an affine map multiplies channels by different numbers."""
    a = gauge.matches.affine[node].a
    return bool(a.size > 1 and (a != a.flat[0]).any())
