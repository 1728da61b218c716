"""Arguments that a file records, for a factory that the user names: they may not reach beyond the file's own size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

# What a model may have beside what is in its file: parameters that it replaces while it is built, masks that are not
# saved, modules without a state.
_MORE_NUMBERS, _OTHER_NUMBERS = 4, 2**22
_MORE_PARTS, _OTHER_PARTS = 50, 1000
_WORD = re.compile(r"[\w.+-]{0,100}")


def check_texts(kwargs: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """CheckpointError for a recorded text that can name a file or an address, unless the user gives that argument.

    A factory may load what such a text names, and run it.
    """
    for name, value in kwargs.items():
        for text in () if name in given else _texts(value):
            if not _WORD.fullmatch(text) or text.startswith(".") or os.path.lexists(text):
                raise CheckpointError(
                    f"{source} records {name}={one_line(repr(text), 60)}, which can name a file or an address: give "
                    f"it yourself, --model-arg {name}=value (model_args=…), or --trust (trust=True) if you know who "
                    "made the file",
                    advice=["--trust"],
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.items() for text in _texts(part))
    elif isinstance(value, (list, tuple)):
        yield from (text for part in value for text in _texts(part))


@contextmanager
def no_larger_than(state: Mapping[str, Tensor], source: str) -> Iterator[None]:
    """Meanwhile, building a model that is far larger than the weights of a file is given up with a CheckpointError."""
    held = sum(tensor.numel() for tensor in state.values())
    with no_more_than(
        held, len(state), f"with the arguments that {source} records, the model is far larger than the file"
    ):
        yield


@contextmanager
def no_more_than(held: int, tensors: int, message: str) -> Iterator[None]:
    """Meanwhile, building a model that is far larger than so many numbers and tensors is given up with this message.

    Raises:
        CheckpointError: as soon as it is far larger.
    """
    most_numbers = _MORE_NUMBERS * held + _OTHER_NUMBERS
    most_parts = _MORE_PARTS * tensors + _OTHER_PARTS
    numbers = parts = 0

    def count(module: nn.Module, name: str, part: Tensor | nn.Module | None) -> None:
        nonlocal numbers, parts
        parts += 1
        numbers += part.numel() if isinstance(part, Tensor) else 0
        if numbers > most_numbers or parts > most_parts:
            raise CheckpointError(message)

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def on_meta(factory: Any, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """The model without memory for its numbers, or None if its constructor needs them."""
    try:
        with torch.device("meta"):
            module = factory(**kwargs)
    except CheckpointError:
        raise
    except (Exception, SystemExit):  # it is built again with numbers, which says what is wrong if that is wrong too
        return None
    return module if isinstance(module, nn.Module) else None
