"""Evaluation mode, and modules as they were before it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normfuse.checkpoint.experts import gathering_experts

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, as a program without the fast path of attention computes it; leaves modules as they were."""
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    before = [(part, dict(vars(part)), [dict(vars(part)[kind]) for kind in _REGISTERED]) for part in parts]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)
    try:
        for module in modules:
            _evaluate(module)
            if "_original_forward" in vars(module):  # accelerate's mixed precision is around it
                vars(module)["forward"] = vars(module)["_original_forward"]
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), ExitStack() as stack:
            for module in modules:
                stack.enter_context(gathering_experts(module))
            warnings.simplefilter("ignore")  # of torch.export, about what is decided and noted here
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, attributes, registered in before:  # modes, and what forward assigned: traced tensors among them
            for kind, tensors in zip(_REGISTERED, registered, strict=True):
                _restore(vars(part)[kind], tensors)
            _restore(vars(part), attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # running statistics change without a new version
                    buffer.copy_(value)


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        del now[name]
    now.update((name, value) for name, value in before.items() if now.get(name, now) is not value)


def _evaluate(module: nn.Module) -> None:
    if not any(part.training for part in module.modules()):
        return
    try:
        module.eval()
    except NotImplementedError:  # the module of an exported program: its mode was decided when it was traced
        for part in module.modules():
            part.training = False


def has_own_modes(module: nn.Module) -> bool:
    """Whether a part that is to change its mode does more then than change it, such as merging weights."""
    return any(
        part.training and (type(part).train is not nn.Module.train or type(part).eval is not nn.Module.eval)
        for part in module.modules()
    )
