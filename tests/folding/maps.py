"""Static norms written as arithmetic, and what stands around them in tests of rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfuse.folding import FoldReport

C = 6


class Map(nn.Module):
    """A static norm written as arithmetic, its class named so that the report counts it as one."""

    def __init__(self, channels: int = C, axis: int = -1, *, shift: bool = True, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (channels,) + (1,) * (-axis - 1)
        self.scale = nn.Parameter(torch.rand(shape, generator=generator) + 0.5)
        self.scale.data[0] *= -1
        self.shift = nn.Parameter(torch.rand(shape, generator=generator) if shift else torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class MapNorm(Map):
    """See :class:`Map`."""


class Net(nn.Module):
    """Parts under their names, and what they do with an input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class Sandwich(nn.Module):
    """linear - norm - the operation under test - linear."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(C, C), nn.Linear(C, 4)
        self.norm, self.operation = MapNorm(), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.norm(self.first(x))))


def sequence(batch: int = 3, length: int = 5) -> tuple[Tensor]:
    return (torch.randn(batch, length, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def status(report: FoldReport) -> list[str]:
    return [record.status for record in report.norms]


class BehindAnInput(nn.Module):
    """norm - operation - linear on the model's input: nothing in front of the norm can take anything."""

    def __init__(self, operation: Callable[[Tensor], Tensor], *, shift: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last, self.operation = MapNorm(shift=shift), nn.Linear(C, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.norm(x)))
