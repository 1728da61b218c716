"""What models of transformers take: names, sizes and examples, from their configurations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from normfuse.checkpoint.archive import CheckpointError, some_of
from normfuse.checkpoint.inputs import Axis, Dimension, InputSpec, first_sizes, make_up, resize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, SEQUENCE = "batch_size", "sequence_length"
_ROWS, _TOKENS, _FRAMES, _CHOICES = 2, 8, 64, 3
# Their tokenizers give no token types, though the configuration may have room for some.
_WITHOUT_TOKEN_TYPES = ("roberta", "camembert", "longformer", "esm", "data2vec-text", "mpnet")
_WITHOUT_MASK = ("siglip", "clip_text_model")  # read up to the last token, or with padding as without
_AFTER_PADDING = ("roberta", "camembert", "longformer", "mpnet", "data2vec-text")  # positions count from that token on
_ROTATED = ("rope_parameters", "rope_theta", "rotary_pct", "rotary_dim", "relative_attention_num_buckets")
# Positions follow from the mask, or do not matter but for their differences; optimum's files take none.
_COUNT_THEMSELVES = ("bloom", "mpt", "gemma", "nemotron", "gpt_oss")
_HEADS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Signature:
    """The inputs of a model.

    Attributes:
        examples: by argument name.
        dims: the dynamic axes of each, by number, with the names that optimum gives them.
        causal: whether it predicts each token from those before it.
        session_names: what inputs and outputs are called in the file, where that is no Python name.
        notes: what else a reader of the result has to know.
    """

    examples: dict[str, torch.Tensor]
    dims: dict[str, dict[int, Axis | str]]
    causal: bool = False
    session_names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.examples)

    def bounded(self, specs: Sequence[InputSpec]) -> Signature:
        """With the sizes and bounds of some inputs; CheckpointError if one is none of them, or does not fit."""
        examples, dims = dict(self.examples), dict(self.dims)
        sizes = first_sizes(specs)
        for spec in specs:
            name = {shown: name for name, shown in self.session_names.items()}.get(spec.name, spec.name)
            if name not in examples:
                raise CheckpointError(f"input {spec.name!r}: the model takes {', '.join(self.names)}")
            if spec.dtype != examples[name].dtype or len(spec.dims) != examples[name].dim():
                raise CheckpointError(
                    f"input {spec}: the model takes {examples[name].dtype} with {examples[name].dim()} axes"
                )
            examples[name] = resize(examples[name], spec.shape(sizes))
            dims[name] = {axis: dim for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)}
        return replace(self, examples=examples, dims=dims)


def signature_of(model: PreTrainedModel, processor: Mapping[str, Any], given: Sequence[InputSpec] = ()) -> Signature:
    """The inputs of a model, in optimum's order.

    Args:
        model: of transformers.
        processor: what files beside it say: ``size``, ``model_input_names``, ``num_mel_bins``.
        given: inputs that somebody described; they are those of a model of a kind that is not known here.

    Raises:
        CheckpointError: what the model takes is not known here.
    """
    try:
        return _known(model, processor)
    except (_Unknown, AttributeError, TypeError):  # of configurations that have other names
        if not given:
            raise _unknown(model) from None
    sizes, generator = first_sizes(given), torch.Generator().manual_seed(0)
    return Signature(
        {spec.name: make_up(spec, sizes, generator) for spec in given},
        {spec.name: {axis: dim for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)} for spec in given},
    )


class _Unknown(Exception):
    """What a model takes does not follow from its configuration."""


def _known(model: PreTrainedModel, processor: Mapping[str, Any]) -> Signature:
    parameters = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[str, torch.Tensor, dict[int, Axis | str]]] = []
    main = model.main_input_name
    both = main == "input_ids" and "pixel_values" in parameters and hasattr(model.config, "vision_config")
    if both and not hasattr(model.config, "projection_dim") and "siglip" not in model.config.model_type:
        raise _Unknown  # a language model that may be shown pictures
    batch = (lambda kind: f"{kind}_{BATCH}") if both else (lambda kind: BATCH)
    if main == "input_ids":
        parts += _text(model, parameters, processor, batch("text"), generator)
    if main == "pixel_values" or both:
        parts.insert(1 if both else 0, _picture(model, processor, batch("image"), generator))
    if main == "input_features":
        parts.append(_features(model, processor, generator))
    if main == "input_values":
        parts.append(_waves(model, processor, generator))
    if not parts:
        raise _Unknown
    if _has_decoder(model, parameters):
        parts.append(_tokens(model, "decoder_input_ids", f"decoder_{SEQUENCE}", generator))
    return Signature(
        {name: example for name, example, _ in parts},
        {name: dims for name, _, dims in parts},
        causal=type(model).__name__.endswith(_HEADS),
    )


def _has_decoder(model: PreTrainedModel, parameters: Mapping[str, Any]) -> bool:
    return "decoder_input_ids" in parameters and bool(model.config.is_encoder_decoder)


def _unknown(model: PreTrainedModel) -> CheckpointError:
    """What to do about a model whose inputs do not follow from its configuration."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    tensors = [p.name for p in parameters if "Tensor" in str(p.annotation)] or [p.name for p in parameters]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    named = needed or [name for name in (model.main_input_name, *tensors) if name in tensors]
    return CheckpointError(
        f"what {type(model).__name__} takes is not known here: give its inputs, such as --input "
        f"{named[0]}:float32[batch,16] (inputs=[…]) with its own dtype and sizes, or export it from Python, "
        "normfuse.onnx.export(model, path, example_inputs={…}, dynamic_shapes={…}); its forward takes "
        f"{some_of(tensors, 6)}"
    )


def _text(
    model: PreTrainedModel,
    parameters: Mapping[str, Any],
    processor: Mapping[str, Any],
    batch: str,
    generator: torch.Generator,
) -> list[tuple[str, torch.Tensor, dict[int, Axis | str]]]:
    config, kind = model.config, model.config.model_type
    sequence = f"encoder_{SEQUENCE}" if _has_decoder(model, parameters) else SEQUENCE
    name, ids, dims = _tokens(model, "input_ids", sequence, generator, batch)
    parts = [(name, ids, dims)]
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] - ids.shape[1] // 4 :] = 0
    causal = type(model).__name__.endswith(_HEADS)
    if "attention_mask" in parameters and not kind.startswith(_WITHOUT_MASK):
        parts.append(("attention_mask", torch.ones_like(ids) if causal else mask, dims))
    listed = processor.get("model_input_names")
    types = getattr(config, "type_vocab_size", 0) or 0
    wanted = "token_type_ids" in listed if listed else types > 0 and not any(o in kind for o in _WITHOUT_TOKEN_TYPES)
    if "token_type_ids" in parameters and wanted and types > 0:
        kinds = torch.arange(ids.shape[1]) * min(types, 2) // ids.shape[1]
        parts.append(("token_type_ids", kinds.expand_as(ids).contiguous(), dims))
    if causal and "position_ids" in parameters and not _counts(config):
        parts.append(("position_ids", torch.arange(ids.shape[1]).expand_as(ids).contiguous(), dims))
    if type(model).__name__.endswith("ForMultipleChoice"):
        chosen = {0: dims[0], 1: "num_choices", 2: dims[1]}
        parts = [(name, x.unsqueeze(1).repeat(1, _CHOICES, 1), chosen) for name, x, _ in parts]
    return parts


def _counts(config: Any) -> bool:
    """Whether a decoder takes no positions."""
    return config.model_type.startswith(_COUNT_THEMSELVES) or bool(getattr(config, "alibi", False))


def _tokens(
    model: PreTrainedModel, name: str, sequence: str, generator: torch.Generator, batch: str = BATCH
) -> tuple[str, torch.Tensor, dict[int, Axis | str]]:
    config = getattr(model.config, "text_config", model.config)
    longest = _longest(config)
    length = min(_TOKENS, longest or _TOKENS)
    ids = torch.randint(config.vocab_size, (_ROWS, length), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and config.vocab_size > 1:  # a padding token would hide its position in some models
        ids[ids == padding] = (padding + 1) % config.vocab_size
    return name, ids, {0: batch, 1: sequence if longest is None else Dimension(sequence, maximum=longest)}


def _longest(config: Any) -> int | None:
    """How many tokens have a learned position; None where positions are computed."""
    if any(getattr(config, name, None) is not None for name in _ROTATED):
        return None
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    longest = next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int) and n > 0), None)
    if longest is not None and any(kind in config.model_type for kind in _AFTER_PADDING):
        longest -= (config.pad_token_id or 0) + 1
    return longest


def _picture(
    model: PreTrainedModel, processor: Mapping[str, Any], batch: str, generator: torch.Generator
) -> tuple[str, torch.Tensor, dict[int, Axis | str]]:
    config = getattr(model.config, "vision_config", model.config)
    height, width = _size(getattr(config, "image_size", None) or processor.get("crop_size") or processor.get("size"))
    shape = (_ROWS, getattr(config, "num_channels", 3), height, width)
    return "pixel_values", torch.randn(shape, generator=generator), {0: batch}


def _size(given: Any) -> tuple[int, int]:
    """Height and width as configurations and processors write them; 224 where they say nothing."""
    if isinstance(given, Mapping):
        edge = given.get("shortest_edge") or 224
        return given.get("height") or edge, given.get("width") or edge
    if isinstance(given, (list, tuple)):
        return given[0], given[-1]
    return (given or 224,) * 2


def _features(
    model: PreTrainedModel, processor: Mapping[str, Any], generator: torch.Generator
) -> tuple[str, torch.Tensor, dict[int, Axis | str]]:
    config = model.config
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):  # Whisper: a fixed window
        shape: tuple[int, ...] = (_ROWS, config.num_mel_bins, 2 * config.max_source_positions)
        return "input_features", torch.randn(shape, generator=generator), {0: BATCH}
    width = getattr(config, "input_feat_per_channel", None) or getattr(config, "feature_projection_input_dim", None)
    width = width or processor.get("num_mel_bins") or processor.get("feature_size")
    if not width:
        raise _Unknown
    return "input_features", torch.randn(_ROWS, _FRAMES, width, generator=generator), {0: BATCH, 1: SEQUENCE}


def _waves(
    model: PreTrainedModel, processor: Mapping[str, Any], generator: torch.Generator
) -> tuple[str, torch.Tensor, dict[int, Axis | str]]:
    config = model.config
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):  # spectrograms of a fixed length
        return (
            "input_values",
            torch.randn(_ROWS, config.max_length, config.num_mel_bins, generator=generator),
            {0: BATCH},
        )
    samples = _FRAMES
    for stride in getattr(config, "conv_stride", ()):
        samples *= stride
    return "input_values", torch.randn(_ROWS, samples, generator=generator), {0: BATCH, 1: SEQUENCE}
