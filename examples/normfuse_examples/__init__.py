"""The models of the examples, in a package that checkpoints can name as their factory."""

from .language_model import LanguageModel
from .vision_transformer import VisionTransformer

__all__ = ["LanguageModel", "VisionTransformer"]
