"""Mixtures of experts of transformers, wherever in a model they are, as ONNX can compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_GROUPED, _GATHERED = "grouped_mm", "batched_mm"


@contextmanager
def gathering_experts(module: nn.Module) -> Iterator[None]:
    """Meanwhile, experts gather the weights of each token: ONNX has no products in groups of tokens."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "get_experts_implementation") and hasattr(part, "set_experts_implementation"):
                stack.enter_context(_gathered(part))
        yield


@contextmanager
def _gathered(model: Any) -> Iterator[None]:
    before = model.get_experts_implementation()
    if _GROUPED not in before.values():
        yield
        return
    model.set_experts_implementation(_GATHERED)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
