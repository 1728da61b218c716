"""One door for models, whatever they come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from normfuse import checkpoint
from normfuse.checkpoint import CheckpointError, ExportableModel, InputSpec, parse_input
from normfuse.sources import huggingface, libraries


def load(
    path: str | os.PathLike[str],
    *,
    model: str | Callable[..., nn.Module] | nn.Module | None = None,
    model_args: Mapping[str, Any] | None = None,
    inputs: Sequence[str | InputSpec] | None = None,
    weights: str | None = None,
    task: str | None = None,
    with_past: bool = False,
    outputs: Sequence[str] | None = None,
    trust: bool = False,
) -> ExportableModel:
    """Load a model as a traced program, without running code from the file.

    Args:
        path: a checkpoint of :func:`normfuse.save`, a program of ``torch.export.save``, the weights that a training
            script saved (``torch.save``, ``.safetensors``, an index of shards or a folder with one), or a folder that
            transformers wrote (``save_pretrained``; needs ``pip install "normfuse[hf]"``). Weights are found under the
            keys that training scripts use, also with the prefixes of wrappers.
        model: builds the module: ``"package.module:factory"`` (searched in the working directory as well),
            ``"file.py:factory"``, ``"timm:NAME"`` or ``"torchvision:NAME"`` (which need no `inputs`), a callable, or a
            module to load into. None: the program that the file holds.
        model_args: keyword arguments for it; they override those in the file.
        inputs: what the model takes, e.g. ``["tokens:int64[batch,seq]<1000"]`` (see
            :func:`normfuse.checkpoint.parse_input`). None: what the file records, or the model's configuration says.
        weights: which weights to take, where a file holds more than one group that fits (``"state_dict_ema"``). None:
            the trained ones, not their average. ``ExportableModel.notes`` name what was taken.
        task: for a folder of transformers: which head to build (``"feature-extraction"``). None: the saved one.
        with_past: for a folder of transformers with a decoder: keys and values of earlier tokens go in and out.
        outputs: for a folder of transformers: names of what the model returns that go into the file
            (``["last_hidden_state", "pooler_output"]``). None: those that optimum gives.
        trust: also read what can run code: pickled modules, ``.pt2`` archives with pickles in them, the class that a
            file of format 1 names, and the code of a folder. Only for files whose author you trust.

    Returns:
        The program with its inputs and outputs, ready for :func:`normfuse.onnx.export`.

    Raises:
        CheckpointError: in one line, for a file that is missing, damaged, not data, does not fit the module, or holds
            invalid numbers (not finite, a negative variance). Nothing is changed on disk, and nothing is downloaded.

    Example:
        >>> import normfuse
        >>> normfuse.save(nn.Linear(4, 2), "linear.pt", example_inputs=torch.randn(3, 4))
        >>> normfuse.load("linear.pt").outputs
        ('output',)
    """
    path = Path(path)
    if model is None and huggingface.is_directory(path):
        specs = None if inputs is None else [parse_input(i) if isinstance(i, str) else i for i in inputs]
        return huggingface.load(path, task=task, with_past=with_past, inputs=specs, outputs=outputs, trust=trust)
    if task is not None or with_past or outputs is not None:
        raise CheckpointError(
            f"{path} is not a folder of transformers with a config.json: only those have tasks (--task), a past "
            "(--with-past) and outputs to choose from (--output)"
        )
    if isinstance(model, str) and libraries.is_library(model):
        model, own = libraries.build(model, model_args or {})
        inputs, model_args = own if inputs is None else inputs, None
    return checkpoint.load(path, model=model, model_args=model_args, inputs=inputs, weights=weights, trust=trust)
