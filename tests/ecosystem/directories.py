"""Directories of tiny transformers with random weights, as ``save_pretrained`` writes them.

``python -m tests.ecosystem.directories`` exports every one with no option, compares it with transformers, and prints a
table; ``… bert gpt2`` only those.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
_WORDS = {"vocab_size": 99, "max_position_embeddings": 64}
_PICTURE = {"image_size": 16, "patch_size": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT, _VISION = _LAYERS | _WORDS, _LAYERS | _PICTURE
_DECODER = _TEXT | _IDS | {"num_key_value_heads": 2}
_ROTATED = _DECODER | {"head_dim": 8}
_CLIP_TEXT = _LAYERS | {"vocab_size": 99, "max_position_embeddings": 20, "projection_dim": 24, "bos_token_id": 0,
                        "eos_token_id": 98}  # fmt: skip
_CLIP_VISION = _VISION | {"projection_dim": 24}
_SIGLIP_TEXT = _LAYERS | {"vocab_size": 99, "max_position_embeddings": 16}
_WHISPER = _IDS | {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 16, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
_DISENTANGLED = _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
_DISTILLED = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}

# Class of the model, class of the configuration, what differs from its defaults. Decoders are exported with their past.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "BertConfig", _TEXT),
    "BERT, classifier": ("BertForSequenceClassification", "BertConfig", _TEXT | {"num_labels": 3}),
    "BERT, choices": ("BertForMultipleChoice", "BertConfig", _TEXT),
    "BERT, masked words": ("BertForMaskedLM", "BertConfig", _TEXT),
    "RoBERTa": ("RobertaModel", "RobertaConfig", _TEXT | {"max_position_embeddings": 66}),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", _DISTILLED),
    "MPNet": ("MPNetModel", "MPNetConfig", _TEXT | {"max_position_embeddings": 66}),
    "ALBERT": ("AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 16}),
    "DeBERTa": ("DebertaModel", "DebertaConfig", _DISENTANGLED),
    "DeBERTa v2": ("DebertaV2Model", "DebertaV2Config", _DISENTANGLED | {"position_buckets": 8, "share_att_key": True}),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", _TEXT | _IDS | {"local_attention": 8}),
    "ViT": ("ViTModel", "ViTConfig", _VISION),
    "ViT, classifier": ("ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 3}),
    "DeiT": ("DeiTModel", "DeiTConfig", _VISION),
    "DINOv2": ("Dinov2Model", "Dinov2Config", _VISION | {"mlp_ratio": 2}),
    "Swin": ("SwinModel", "SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
                                         "num_heads": [2, 4], "window_size": 4}),
    "BEiT": ("BeitModel", "BeitConfig", _VISION | {"use_relative_position_bias": True}),
    "CLIP": ("CLIPModel", "CLIPConfig", {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION}),
    "CLIP, text": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_TEXT),
    "CLIP, vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _CLIP_VISION),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"text_config": _SIGLIP_TEXT, "vision_config": _VISION}),
    "SigLIP, text": ("SiglipTextModel", "SiglipTextConfig", _SIGLIP_TEXT),
    "SigLIP, vision": ("SiglipVisionModel", "SiglipVisionConfig", _VISION),
    "Whisper, encoder": ("WhisperModel", "WhisperConfig", _WHISPER),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "T5, encoder": ("T5EncoderModel", "T5Config", _T5),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": 0}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                                "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "OPT": ("OPTForCausalLM", "OPTConfig", _TEXT | _IDS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT | _IDS),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": 8}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _ROTATED),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _ROTATED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Phi": ("PhiForCausalLM", "PhiConfig", _DECODER | {"num_key_value_heads": 4}),
}  # fmt: skip
STEPS = 32


def build(name: str) -> Any:
    """The model, no parameter at its initial value."""
    import transformers

    model, config, options = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.get_encoder() if name == "Whisper, encoder" else built


def is_decoder(name: str) -> bool:
    return MODELS[name][0].endswith(("ForCausalLM", "LMHeadModel"))


def inputs_of(session: Any, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Other inputs than those that were exported with, in the sizes that a session asks for."""
    drawn = np.random.default_rng(1)
    feeds = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else rows if "batch" in size else tokens for size in entry.shape]
        if entry.type == "tensor(int64)":
            feeds[entry.name] = drawn.integers(3, 90, shape) if "ids" in entry.name else np.ones(shape, np.int64)
        else:
            feeds[entry.name] = drawn.standard_normal(shape).astype(np.float32)
    if "token_type_ids" in feeds:
        feeds["token_type_ids"] %= 2
    if "attention_mask" in feeds:
        feeds["attention_mask"][-1, -2:] = 0
    return feeds


def difference(model: Any, session: Any, rows: int = 3, tokens: int = 7) -> float:
    """The largest difference of a session's outputs from a model's, relative to the largest value."""
    feeds = inputs_of(session, rows, tokens)
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    errors = [np.abs(got[n] - wanted[n].numpy()).max() / np.abs(wanted[n].numpy()).max() for n in got]
    return float(max(errors))


def greedy(session: Any, prompt: np.ndarray, mask: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """The tokens that a session with a past chooses, one file for the prompt and every step."""
    entries = {entry.name: entry for entry in session.get_inputs()}
    outputs = [output.name for output in session.get_outputs()]
    past = {
        name: np.zeros((len(prompt), entry.shape[1], 0, entry.shape[3]), np.float32)
        for name, entry in entries.items()
        if name.startswith("past_key_values")
    }
    tokens, new = prompt, prompt
    for _ in range(steps):
        feeds = {"input_ids": new, "attention_mask": mask, **past}
        if "position_ids" in entries:
            feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        new = results["logits"][:, -1].argmax(-1)[:, None]
        past = {name.replace("present", "past_key_values"): results[name] for name in outputs if name != "logits"}
        tokens, mask = np.concatenate([tokens, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    return tokens


def agrees(model: Any, session: Any) -> bool:
    """Whether a decoder's session chooses the tokens that transformers chooses, after prompts of two lengths."""
    prompt = np.random.default_rng(1).integers(3, 90, (2, 6))
    mask = np.ones_like(prompt)
    prompt[0, :2] = mask[0, :2] = 0
    model.generation_config.eos_token_id = None  # every step shall be taken
    with torch.no_grad():
        wanted = model.generate(torch.from_numpy(prompt), attention_mask=torch.from_numpy(mask), do_sample=False,
                                max_new_tokens=STEPS, pad_token_id=0)  # fmt: skip
    return bool((greedy(session, prompt, mask) == wanted.numpy()).all())


def main(names: list[str]) -> None:
    import onnxruntime

    import normfuse.onnx
    from tests.zoo.runs import declare_torchvision

    library = declare_torchvision()  # noqa: F841 (to be kept alive)
    print("| directory | inputs | outputs | opset | equals transformers | s |\n|---|---|---|---|---|---:|", flush=True)
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model = build(name)
            model.save_pretrained(Path(folder) / "model")
            start = time.perf_counter()
            loaded = normfuse.load(Path(folder) / "model", with_past=is_decoder(name))
            result = normfuse.onnx.export(loaded, Path(folder) / "model.onnx")
            took = time.perf_counter() - start
            session = onnxruntime.InferenceSession(result.path)
            equal = (
                f"{STEPS} greedy steps: {'equal' if agrees(model, session) else 'DIFFERENT'}"
                if is_decoder(name)
                else f"{difference(model, session):.1e}"
            )
            inputs, outputs = (
                ", ".join(s for s in names if ".1." not in s) for names in (loaded.input_names, loaded.outputs)
            )
            print(f"| {name} | {inputs} | {outputs} | {result.opset} | {equal} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
