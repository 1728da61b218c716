"""Decoders whose keys and values of earlier tokens go in and come out: one graph for the prompt and every step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from normfuse.checkpoint.archive import CheckpointError
from normfuse.checkpoint.inputs import Derived, Dimension
from normfuse.sources.calling import calling
from normfuse.sources.signatures import BATCH, SEQUENCE, Signature

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PAST = "past_sequence_length"
_TOKENS, _LENGTH = 4, 3  # of the example: random ones are up to twice as long, and positions may be few


def with_past(model: PreTrainedModel, signature: Signature) -> tuple[Signature, nn.Module]:
    """The inputs of a decoder with its past, and the decoder that takes them.

    Inputs are those of the decoder, ``past_key_values.N.key`` and ``.value``; outputs are ``logits``,
    ``present.N.key`` and ``.value``. A past of length 0 is a prompt.

    Raises:
        CheckpointError: the model keeps no keys and values by layer.
    """
    name = type(model).__name__
    if not signature.causal:
        raise CheckpointError(f"{name} is not a decoder that predicts tokens, so it takes no past (--with-past)")
    signature = replace(signature, examples={name: x[:, :_TOKENS] for name, x in signature.examples.items()})
    keys = _keys_and_values(model, signature)
    generator = torch.Generator().manual_seed(0)
    past = {
        f"past_key_values_{layer}_{part}": torch.randn(
            (tensor.shape[0], tensor.shape[1], _LENGTH, tensor.shape[3]), generator=generator
        )
        for layer, pair in enumerate(keys)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    longest = signature.dims["input_ids"][1]
    most = longest.maximum if isinstance(longest, Dimension) else None
    length = Dimension(PAST, minimum=0, maximum=None if most is None else most - 1)
    examples, dims = dict(signature.examples), dict(signature.dims)
    if "attention_mask" in examples:
        seen = examples["attention_mask"]
        examples["attention_mask"] = mask = torch.cat([seen.new_ones(seen.shape[0], _LENGTH), seen], 1)
        mask[-1, :2] = 0  # padding in front, as tokenizers of decoders pad
        dims["attention_mask"] = {0: BATCH, 1: Derived(((length, 1), (Dimension(SEQUENCE), 1)))}
    if "position_ids" in examples:
        tokens = examples["position_ids"].shape[1]
        examples["position_ids"] = (examples["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, -tokens:].contiguous()
    names = {f"past_key_values_{layer}_{part}": f"past_key_values.{layer}.{part}" for layer, part in _parts(keys)}
    names |= {f"present_{layer}_{part}": f"present.{layer}.{part}" for layer, part in _parts(keys)}
    whole = replace(
        signature,
        examples=examples | past,
        dims=dims | {name: {0: BATCH, 2: length} for name in past},
        session_names=signature.session_names | names,
        notes=() if most is None else (f"{PAST} + {SEQUENCE} <= {most}: the model has as many positions",),
    )
    return whole, calling(
        model,
        whole.names,
        {"use_cache": True},
        _outputs,
        lambda given: _with_cache(given, len(keys), _cache_argument(model)),
    )


def _cache_argument(model: PreTrainedModel) -> str:
    """What `forward` calls the cache: ``cache``, which was ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _cache_of(outputs: Mapping[str, Any]) -> Any:
    return outputs["cache" if "cache" in outputs else "past_key_values"]


def _parts(keys: list[Any]) -> list[tuple[int, str]]:
    return [(layer, part) for layer in range(len(keys)) for part in ("key", "value")]


def _keys_and_values(model: PreTrainedModel, signature: Signature) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every layer keeps of the example, from a run."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            cache = _cache_of(model(**{n: t.to(device) for n, t in signature.examples.items()}, use_cache=True))
    finally:
        model.train(training)
    layers = getattr(cache, "layers", [])
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not found or any(not isinstance(t, torch.Tensor) or t.dim() != 4 for pair in found for t in pair):
        raise CheckpointError(
            f"{type(model).__name__} keeps a {type(cache).__name__} that is not a list of keys and values: export it "
            "without its past"
        )
    return found


def _with_cache(given: dict[str, torch.Tensor], layers: int, argument: str) -> dict[str, Any]:
    """Arguments of the model's own forward: the past as the cache that it appends to."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """With a length that follows from the tensors, also where there are none: nothing is decided while tracing."""

        def get_seq_length(self) -> int:
            return self.keys.shape[-2]

    # Sliding windows keep whole pasts here: the mask hides what lies outside, and lengths add up.
    cache = DynamicCache()
    cache.layers = [Layer() for _ in range(layers)]
    for number, layer in enumerate(cache.layers):
        layer.keys = given.pop(f"past_key_values_{number}_key")
        layer.values = given.pop(f"past_key_values_{number}_value")
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return {**given, argument: cache}


def _outputs(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found = {"logits": outputs["logits"]}
    for number, layer in enumerate(_cache_of(outputs).layers):
        found |= {f"present_{number}_key": layer.keys, f"present_{number}_value": layer.values}
    return found
