"""timm and transformers are imported as the zoo does it."""

from zoo.conftest import torchvision_imports

__all__ = ["torchvision_imports"]
