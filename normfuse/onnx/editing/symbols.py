"""Sizes as numbers and symbols, from what was seen in several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


class Sizes:
    """Sizes seen in several runs as numbers, or as products of symbols and a number.

    What is the same in all runs is a number. The dynamic sizes of the inputs are symbols; a size that is a multiple of
    them in every run is that product, and any other one is a symbol of its own.
    """

    def __init__(self, inputs: Sequence[tuple[int, ...]]) -> None:
        self.env = ShapeEnv()
        self._known: dict[tuple[int, ...], Any] = {}
        self._symbols: list[tuple[int, ...]] = []
        for sizes in inputs:
            if len(set(sizes)) > 1 and sizes not in self._known:
                self._symbol(sizes)

    def size(self, sizes: tuple[int, ...]) -> Any:
        if len(set(sizes)) == 1:
            return sizes[0]
        if sizes not in self._known:
            product = self._product(sizes)
            if product is None:
                self._symbol(sizes)
            else:
                self._known[sizes] = product
        return self._known[sizes]

    def _product(self, sizes: tuple[int, ...]) -> Any:
        for count, first in enumerate(self._symbols):
            for second in (None, *self._symbols[count:]):
                factors = [f * (1 if second is None else second[i]) for i, f in enumerate(first)]
                if all(factors) and len({size / factor for size, factor in zip(sizes, factors, strict=True)}) == 1:
                    if sizes[0] % factors[0]:
                        continue
                    product = self._known[first] if second is None else self._known[first] * self._known[second]
                    return product * (sizes[0] // factors[0])
        return None

    def _symbol(self, sizes: tuple[int, ...]) -> None:
        source = ConstantSource(f"size_{len(self._symbols)}")
        symbol = self.env.create_symbol(max(sizes[0], 2), source, dynamic_dim=DimDynamic.DYNAMIC)
        self._known[sizes] = self.env.create_symintnode(symbol, hint=max(sizes[0], 2), source=source)
        self._symbols.append(sizes)
