"""timm and transformers import torchvision, whose wheels are for CUDA: schemas of its operations are enough."""

import pytest

from .runs import declare_torchvision


@pytest.fixture(autouse=True, scope="session")
def torchvision_imports():
    library = declare_torchvision()
    yield
    del library
