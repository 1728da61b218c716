"""Models of transformers whose norms were exchanged, loaded again as what they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import some_of


def from_pretrained(
    model_class: Any, folder: str | os.PathLike[str], change: Callable[[nn.Module], object], **options: Any
) -> Any:
    """Build a model of transformers, change it as before training, and load what ``save_pretrained`` wrote.

    ``model_class.from_pretrained`` alone builds the class as the library has it: its LayerNorms take weight and bias of
    the norms that were in their place, and drop the running statistics with no more than a log line.

    Args:
        model_class: a class of transformers, also an ``AutoModel…``.
        folder: what ``save_pretrained`` wrote.
        change: called with the new model before its weights are loaded; exchanges the same norms in the same way as
            before training, such as ``lambda model: swap_norms(model, to="unified")``.
        options: for ``from_pretrained``, such as ``dtype``.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` leaves it.

    Raises:
        ValueError: names in the folder and names of the changed model differ.

    Example:
        >>> from normfuse.convert import from_pretrained, swap_norms
        >>> def change(model):
        ...     swap_norms(model, to="unified")
        >>> model = from_pretrained(BertModel, "trained", change)  # doctest: +SKIP
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        from transformers import AutoConfig

        model_class = mapping[type(AutoConfig.from_pretrained(folder))]

    def build(self: Any, *arguments: Any, **more: Any) -> None:
        model_class.__init__(self, *arguments, **more)
        change(self)

    changed: Any = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model, found = changed.from_pretrained(folder, output_loading_info=True, **options)
    for what, kind in (("missing_keys", "the folder lacks"), ("unexpected_keys", "the changed model does not have")):
        names = sorted(found[what])
        if names:
            raise ValueError(
                f"{folder} does not fit {model_class.__name__} as it was changed: {kind} {some_of(names)}; "
                "change it as it was changed before it was saved"
            )
    model.__class__ = model_class
    return model
