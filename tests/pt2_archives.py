"""A good PT2 archive, changes to it, and what the reader says."""

import io
import json
from functools import cache

import archives
import pytest
import torch
from archives import MODEL
from torch import nn
from torch.export import Dim

from normfuse.checkpoint import CheckpointError
from normfuse.checkpoint.pt2.reader import Archive, read_program, read_samples


class Everything(nn.Module):
    """One of each: a tied weight, both kinds of buffers, a constant, a region, several results, sizes in arithmetic."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.tied = self.first
        self.register_buffer("table", torch.randn(6), persistent=False)
        self.scale = torch.rand(6)

    def forward(self, x, mask=None):
        y = self.norm(self.tied(x)) * self.scale + self.table
        left, right = y.split(3, -1)
        with torch.no_grad():
            y = torch.cat([left, right], -1).reshape(x.shape[0] * 2, 3).reshape(x.shape[0], -1)
        return {"logits": self.second(y), "half": y.to(torch.float16), "none": None, "n": 3}


def saved(model, args, **options) -> bytes:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model.eval(), args, **options), buffer)
    return buffer.getvalue()


def read(data: bytes):
    return read_program(Archive(io.BytesIO(data), "m.pt2"))


def refusal(data: bytes, samples: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        archive = Archive(io.BytesIO(data), "m.pt2")
        read_samples(archive) if samples else read_program(archive)
    message = str(caught.value)
    assert message.startswith("m.pt2") and message.isprintable() and len(message) <= 400
    return message


def changed(good: bytes, record: str, change) -> bytes:
    """The archive after a function has changed the JSON of a record."""
    contents = archives.unpack(good)
    content = json.loads(contents[record])
    change(content)
    return archives.pack(contents | {record: json.dumps(content).encode()})


def with_node(good: bytes, name: str, **fields) -> bytes:
    def change(model):
        (node,) = (node for node in model["graph_module"]["graph"]["nodes"] if node["name"] == name)
        node.update(fields)

    return changed(good, MODEL, change)


@cache
def good_archive() -> bytes:
    return saved(Everything(), (torch.randn(3, 4), None), dynamic_shapes=({0: Dim("batch", max=64)}, None))
