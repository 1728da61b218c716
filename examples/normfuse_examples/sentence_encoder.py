"""A BERT that turns sentences into vectors, with the norms of one's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfuse.convert import swap_norms


def import_transformers() -> Any:
    """The ``transformers`` package, also beside a torchvision that was built for another torch.

    It imports torchvision where there is one, and the wheels of that are for CUDA: schemas of the two operations that
    it misses under a CPU torch are enough for the import.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_transformers.library = library  # definitions live as long as their library
    import transformers

    return transformers


class SentenceEncoder(nn.Module):
    """The mean of a BERT's last states over the tokens of a sentence.

    Args:
        config: what ``transformers.BertConfig`` takes.
        norm: None for BERT's own LayerNorm, or "rep_batch", "unified", "power" for static norms in the layers and none
            behind the embeddings, whose tables then hold the result.

    Shape:
        input_ids, attention_mask: int64, [batch, tokens]; the mask is not 0 where there is a token.
        Output: [batch, hidden_size], not normalised: compare by cosine.
    """

    def __init__(self, config: dict[str, Any], norm: str | None = None) -> None:
        super().__init__()
        transformers = import_transformers()
        # The weights come from a checkpoint; no time is spent on drawing others.
        self.bert = transformers.BertModel(
            transformers.BertConfig(**config, attn_implementation="sdpa"), add_pooling_layer=False
        )
        if norm is not None:
            self.bert.embeddings.LayerNorm = nn.Identity()
            swap_norms(self, to=norm, **({"group_num": None} if norm == "power" else {}))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        valid = (attention_mask != 0).to(states.dtype)[..., None]
        return (states * valid).sum(1) / valid.sum(1).clamp(min=1)
