"""What folding did, decision by decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from normfuse.errors import NormfuseError, joined_names


class FoldError(NormfuseError):
    """The program cannot be folded; the message names the layer and says what to do."""


class OutOfRange(FoldError):
    """A number of a folded weight would leave its dtype."""


@dataclass
class NormRecord:
    """The result of folding for one norm (or one per-channel affine map outside a norm).

    Attributes:
        name: path of the module, e.g. ``blocks.0.norm1``.
        kind: class of the module, or ``affine`` for arithmetic written in a forward.
        status: ``folded`` (nothing of it is left), ``partly folded`` (one Add is left, or one Mul of a
            BatchNormalization) or ``kept``.
        absorbed_by: names of the weights into which it was folded.
        reason: why something stayed, in words; empty if it was folded.
    """

    name: str
    kind: str
    status: str = "folded"
    absorbed_by: list[str] = field(default_factory=list)
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.status}{_into(self.absorbed_by)}{_why(self.reason)}"


@dataclass
class RemovedChannels:
    """Channels that held a constant and left the weights around them (see :func:`remove_dead_channels`).

    Attributes:
        name: path of the norm that made them constant.
        channels: how many went.
        num_features: how many there were.
        weights: names of the weights that became smaller.
        reason: why all of them stayed, if they did.
    """

    name: str
    channels: int
    num_features: int
    weights: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class DynamicNormRecord:
    """The result of folding for a norm that computes its statistics from each input: its core stays.

    Attributes:
        name: path of the module, e.g. ``blocks.0.norm1``.
        kind: class of the module, or the operation's name.
        core: what is left: ``RMSNorm``, ``LayerNorm``, ``GroupNorm``, ``InstanceNorm`` or ``BatchNorm`` (without
            running statistics).
        gain: ``folded`` (into weights), ``kept`` (inside the norm's operation) or ``none`` (there was none).
        shift: ``folded``, ``kept`` or ``none``, likewise.
        measured_by: names of the norms that measure its result again, where it cancels and `core` is ``none``.
        absorbed_by: names of the weights that read its result and were changed.
        reasons: why something stayed: under ``gain``, ``shift``, and ``mean`` for a LayerNorm that is no RMSNorm;
            under ``statistics`` where there is nothing but these; under ``cancel`` if norms were asked to cancel.
            Empty as well if all was to be kept.
    """

    name: str
    kind: str
    core: str
    gain: str
    shift: str
    measured_by: list[str] = field(default_factory=list)
    absorbed_by: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def first_reason(self) -> str:
        """What stayed, and why: one reason is enough, since a gain that stays holds the rest."""
        return next((f"{what}: {why}" for what, why in self.reasons.items()), "")

    def __str__(self) -> str:
        left = f"{self.name} ({self.kind}): {self.core}, gain {self.gain}, shift {self.shift}"
        return f"{left}{_into(self.absorbed_by)}{_why(self.first_reason)}"


@dataclass
class FoldReport:
    """Every decision of one call of :func:`normfuse.fold`.

    Attributes:
        norms: one record per norm, in the order of the program.
        removed: one record per place with constant channels, if asked to remove them.
        dynamic: one record per norm that computes its statistics from each input, in the order of the program.
        centred: names of the weights that subtract their mean, so that LayerNorms could become RMSNorms.
        nodes_before: number of operations in the graph before folding.
        nodes_after: number of operations after folding.
        bytes_before: size of the parameters and constants before folding.
        bytes_after: their size after folding.
        bytes_copied: bytes added because a weight used at several places had to be stored more than once.
        scale_range: smallest and largest absolute scale that went into a weight.
        weight_growth: largest factor by which the biggest entry of any weight grew.
        settled_early: norms whose shift went into biases in front of it instead of travelling on, because norms had
            made it larger than four times the constants it was made of. No operation is added for it.
        cancel_difference: where norms cancel, the largest difference between the outputs of the original program and of
            the folded one on its example inputs, relative to each output's largest entry: what their eps counted for,
            and rounding. None where no norm cancels, or there are no example inputs.
        int8_error: with ``balance``, the predicted error of the int8 products' output ÷ that of the unfolded program.
        verified: the largest difference of the folded program's outputs on the example inputs, ÷ their largest value;
            None if they were not compared: there are no example inputs, norms cancel, or it was not asked for.
    """

    norms: list[NormRecord] = field(default_factory=list)
    removed: list[RemovedChannels] = field(default_factory=list)
    dynamic: list[DynamicNormRecord] = field(default_factory=list)
    centred: list[str] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_copied: int = 0
    scale_range: tuple[float, float] = (1.0, 1.0)
    weight_growth: float = 1.0
    settled_early: list[str] = field(default_factory=list)
    cancel_difference: float | None = None
    int8_error: float | None = None
    verified: float | None = None

    @property
    def remaining(self) -> list[NormRecord]:
        """The records of norms of which something is left in the graph."""
        return [record for record in self.norms if record.status != "folded"]

    def __str__(self) -> str:
        """A line for each norm, and the sums."""
        folded = f"{len(self.norms) - len(self.remaining)} of {len(self.norms)} norms folded; " if self.norms else ""
        sums = f"{folded}program: {self.nodes_before} → {self.nodes_after} operations"
        return "\n".join([*map(str, self.norms), *map(str, self.dynamic), sums])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data.

        Returns:
            A dictionary of everything above.
        """
        return asdict(self)


def _into(weights: Sequence[str]) -> str:
    return f" into {joined_names(weights)}" if weights else ""


def _why(reason: str) -> str:
    return f" ({reason})" if reason else ""
