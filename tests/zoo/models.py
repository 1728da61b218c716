"""What is in the zoo: how to build each model, and what folding is expected to leave of its norms."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

IMAGE, WORDS, LENGTH = 32, 40, 7


@dataclass(frozen=True)
class Expected:
    """What becomes of the norms, as they are and exchanged for static ones; each as (how many, of how many).

    Attributes:
        rms: LayerNorms that become RMSNorms.
        gains: gains of norms with statistics of each input that fold.
        static: BatchNorms that fold without a rest.
        swapped: static norms that fold without a rest when every LayerNorm and RMSNorm is exchanged; None where a
            model has none to exchange.
        why: the reason for what stays, where something does.
    """

    rms: tuple[int, int] = (0, 0)
    gains: tuple[int, int] = (0, 0)
    static: tuple[int, int] = (0, 0)
    swapped: tuple[int, int] | None = None
    why: str = ""

    @classmethod
    def of(cls, counts: str, why: str = "") -> Expected:
        """From text such as "rms 0/1, swapped 5/5"."""
        found = (entry.split(" ") for entry in counts.split(", "))
        return cls(**{name: tuple(map(int, numbers.split("/"))) for name, numbers in found}, why=why)

    def complete(self) -> bool:
        """Whether nothing stays."""
        return all(a == b for a, b in (self.rms, self.gains, self.static, self.swapped or (0, 0)))


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: what its authors call it.
        library: where it comes from.
        build: makes the model.
        inputs: makes its positional inputs for a batch size.
        dynamic: which dimensions vary, per input.
        expected: what folding leaves.
        quick: whether the everyday tests run it.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    dynamic: tuple[Any, ...]
    expected: Expected
    quick: bool = False


class Plain(nn.Module):
    """A model of transformers as a function of tensors: positional inputs by name, one tensor out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.options = model, names, output, options

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return getattr(result, self.output)


class Words(Plain):
    """One input of token numbers."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


class Values(Plain):
    """One input of pixels or features."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values)


class Encoder(Values):
    """The encoder of a model that has two."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, **options: Any) -> None:
        super().__init__(model.get_encoder(), names, output, **options)


class Pairs(Plain):
    """Token numbers for an encoder and a decoder."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return super().forward(input_ids, decoder_input_ids)


def images(size: int = IMAGE) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def features() -> tuple[Tensor, ...]:
    return (torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0)),)


def words(count: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randint(3, WORDS, (2, LENGTH), generator=generator) for _ in range(count))

    return make


BATCH = ({0: Dim("batch")},)
SEQUENCE = ({0: Dim("batch"), 1: Dim("length", min=2, max=16)},)


Options = dict[str, Any]


def timm(name: str, model: str, options: Options, counts: str, size: int = IMAGE, why: str = "", **more: bool) -> Entry:
    """An entry for a model of timm, made small by `options`."""

    def build() -> nn.Module:
        return importlib.import_module("timm").create_model(model, pretrained=False, num_classes=5, **options)

    return Entry(name, "timm", build, images(size), BATCH, Expected.of(counts, why), **more)


def timm_class(name: str, module: str, cls: str, options: Options, counts: str, why: str) -> Entry:
    """An entry for a class of timm whose registered models cannot be made small by options."""

    def build() -> nn.Module:
        found = importlib.import_module(f"timm.models.{module}")
        given = {key: getattr(found, value[1:]) if str(value)[0] == "$" else value for key, value in options.items()}
        return getattr(found, cls)(num_classes=5, **given)

    return Entry(name, "timm", build, images(), BATCH, Expected.of(counts, why))


def transformer(
    name: str,
    cls: str,
    config: str,
    kind: type[Plain],
    output: str,
    options: Options,
    counts: str,
    dynamic: Any = SEQUENCE,
    why: str = "",
    **more: bool,
) -> Entry:
    """An entry for a class of transformers."""
    names = {
        Words: ("input_ids",),
        Values: ("pixel_values",),
        Encoder: ("input_features",),
        Pairs: ("input_ids", "decoder_input_ids"),
    }[kind]

    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        made = getattr(library, config)(**options)
        model = getattr(library, cls)(made)
        known = {"use_cache": False} if hasattr(made, "use_cache") and kind in (Words, Pairs) else {}
        return kind(model, names, output, **known)

    inputs = {Words: words(), Values: images(), Encoder: features, Pairs: words(2)}[kind]
    dynamic = (SEQUENCE[0],) * len(names) if dynamic is SEQUENCE else dynamic
    return Entry(name, "transformers", build, inputs, dynamic, Expected.of(counts, why), **more)


SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DISTIL = {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
LLAMA = {**SMALL, "num_key_value_heads": 1}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}
del WHISPER["max_position_embeddings"]
CLIP = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
VIT = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
POOL = {
    "norm_layers": "$GroupNorm1", "downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "use_mlp_head": False,
}  # fmt: skip
LM, LAST = "logits", "last_hidden_state"
POST_NORM = "post-norm: LayerNorms write the stream that LayerNorms read"

# fmt: off
ZOO: tuple[Entry, ...] = (
    timm("ViT", "vit_tiny_patch16_224", VIT, "rms 5/5, gains 5/5, swapped 5/5", quick=True),
    timm("ViT, norms on queries and keys", "vit_tiny_patch16_224", {**VIT, "qk_norm": True},
        "rms 5/9, gains 5/9, swapped 9/9",
        why="norms on queries and keys: attention takes neither their gain nor their shift"),
    timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", VIT, "rms 5/5, gains 5/5, swapped 5/5"),
    timm("BEiT", "beit_base_patch16_224", VIT, "rms 5/5, gains 5/5, swapped 5/5"),
    timm("EVA-02", "eva02_tiny_patch14_224", VIT, "rms 5/5, gains 5/5, swapped 5/5"),
    timm("CaiT", "cait_xxs24_224", VIT, "rms 9/9, gains 9/9, swapped 9/9"),
    timm("XCiT", "xcit_nano_12_p16_224", VIT, "rms 0/11, gains 7/11, static 3/5, swapped 8/16",
        why="depthwise convolutions with padding take no shift and write the stream that LayerNorms read; class "
        "attention adds the results of norms to themselves"),
    timm("Swin", "swin_tiny_patch4_window7_224", SWIN, "rms 3/7, gains 6/7, swapped 7/7",
        why="the norm behind the patches writes the stream that the first stage's LayerNorms read; the norm at the "
        "merging of patches takes the mean over four of them"),
    timm("Swin V2", "swinv2_tiny_window8_256", SWIN, "rms 3/7, gains 2/7, swapped 7/7",
        why="norms at the end of a branch write the stream, which takes the gain of one of them and, in the last "
        "stage, of none, because a LayerNorm ends it"),
    timm("MaxViT", "maxvit_pico_rw_256", {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 8},
        "rms 0/9, gains 9/9, static 7/7, swapped 16/16", size=64),
    timm_class("MLP-Mixer", "mlp_mixer", "MlpMixer",
        {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}, "rms 0/5, gains 3/5, swapped 3/5",
        why="the layers that mix tokens have no weight for each channel to take a gain or to write a mean of zero"),
    timm_class("PoolFormer", "metaformer", "MetaFormer", {**STAGES, **POOL, "layer_scale_init_values": 1e-5},
        "rms 0/1, gains 5/9, swapped 1/1",
        why="a pooled norm is a branch without weights, on a stream that GroupNorms read; scales of the stream "
        "between two norms stay, the last in front of the last LayerNorm"),
    timm("ConvNeXt", "convnext_atto", STAGES, "rms 0/9, gains 8/9, swapped 9/9",
        why="depthwise convolutions write the LayerNorms' inputs and read the stream; the stem's norm writes one "
        "that a LayerNorm reads"),
    timm("ConvNeXt V2", "convnextv2_atto", STAGES, "rms 0/9, gains 8/9, static 0/4, swapped 9/13",
        why="as ConvNeXt; the four global response norms add what they scale to the result of GELU itself, so that "
        "no weight sees their gain alone"),
    timm("LeViT", "levit_128s",
        {"img_size": 64, "embed_dim": (16, 32), "num_heads": (2, 2), "depth": (1, 1), "key_dim": 8}, "static 19/19",
        size=64),
    timm("EfficientFormer", "efficientformer_l1", {"depths": (1, 1), "embed_dims": (8, 16), "num_vit": 1},
        "rms 3/3, gains 3/3, static 5/5, swapped 8/8", size=56),
    timm("ResNet", "resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}, "static 13/13"),
    transformer("BERT", "BertForSequenceClassification", "BertConfig", Words, LM, SMALL,
        "rms 0/5, gains 1/5, swapped 5/5", why=POST_NORM),
    transformer("RoBERTa", "RobertaModel", "RobertaConfig", Words, LAST, SMALL, "rms 0/5, gains 0/5, swapped 5/5",
        why=f"{POST_NORM}; the last one's result is the output"),
    transformer("DistilBERT", "DistilBertForSequenceClassification", "DistilBertConfig", Words, LM, DISTIL,
        "rms 0/5, gains 1/5, swapped 5/5", why=POST_NORM),
    transformer("ALBERT", "AlbertForSequenceClassification", "AlbertConfig", Words, LM, {**SMALL, "embedding_size": 16},
        "rms 1/5, gains 2/5, swapped 3/3",
        why=f"{POST_NORM}, all but that of the embeddings, which a linear reads; the two norms of the shared layer "
        "count twice as LayerNorms"),
    transformer("DeBERTa", "DebertaForSequenceClassification", "DebertaConfig", Words, LM, DEBERTA,
        "rms 0/5, gains 1/5, swapped 5/5", why=POST_NORM),
    transformer("DeBERTa V2", "DebertaV2ForSequenceClassification", "DebertaV2Config", Words, LM, DEBERTA,
        "rms 0/5, gains 1/5, swapped 5/5", why=POST_NORM),
    transformer("GPT-2", "GPT2LMHeadModel", "GPT2Config", Words, LM, GPT2, "rms 5/5, gains 5/5, swapped 5/5",
        quick=True),
    transformer("OPT", "OPTForCausalLM", "OPTConfig", Words, LM, {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "rms 5/5, gains 5/5, swapped 5/5"),
    transformer("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", Words, LM, SMALL, "rms 5/5, gains 5/5, swapped 5/5"),
    transformer("Llama", "LlamaForCausalLM", "LlamaConfig", Words, LM, LLAMA, "gains 5/5, swapped 5/5", quick=True),
    transformer("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", Words, LM, {**LLAMA, "head_dim": 16},
        "gains 5/9, swapped 9/9", why="gains on queries and keys: rotations and attention take none"),
    transformer("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", Words, LM, {**LLAMA, "head_dim": 16},
        "gains 5/9, swapped 9/9", why="norms at the end of a branch write the stream that RMSNorms read"),
    transformer("T5", "T5ForConditionalGeneration", "T5Config", Pairs, LM, {**T5, "decoder_start_token_id": 0},
        "gains 12/12, swapped 12/12"),
    transformer("BART", "BartForConditionalGeneration", "BartConfig", Pairs, LM, SEQ2SEQ,
        "rms 0/12, gains 2/12, swapped 12/12", why=POST_NORM),
    transformer("Whisper, encoder", "WhisperModel", "WhisperConfig", Encoder, LAST, WHISPER,
        "rms 0/5, gains 4/5, swapped 4/5", dynamic=BATCH,
        why="GELU writes the stream that LayerNorms read; the last one's result is the output"),
    transformer("CLIP, text", "CLIPTextModel", "CLIPTextConfig", Words, LAST, SMALL, "rms 4/5, gains 4/5, swapped 5/5",
        why="the last one's result is the output"),
    transformer("CLIP, images", "CLIPVisionModel", "CLIPVisionConfig", Values, "pooler_output",
        {**CLIP, "image_size": 32, "patch_size": 8}, "rms 0/6, gains 4/6, swapped 6/6", dynamic=BATCH,
        why="the norm in front of the layers writes the stream that LayerNorms read; the last one's result is the "
        "output"),
)
# fmt: on
