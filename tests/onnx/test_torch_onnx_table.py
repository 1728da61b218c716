"""What torch.onnx makes anew in every export is made once for an operator set."""

from functools import cache

import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from normfuse.onnx import write
from normfuse.onnx.workarounds import torch_onnx_table


def test_the_table_is_made_once_and_keeps_nothing_of_an_export(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(torch_onnx_table, "_made", cache(lambda _, **options: made.append(own(**options)) or made[-1]))
    own = ONNXRegistry.from_torchlib
    program = torch.export.export(nn.RMSNorm(4).eval(), (torch.randn(3, 4),))
    for opset in (20, 20, 23, 23):
        write(program, tmp_path / "m.onnx", opset=opset)
    assert [table.opset_version for table in made] == [20, 23]
    assert not any(entry.is_custom for table in made for entries in table.functions.values() for entry in entries)
    assert own == ONNXRegistry.from_torchlib
    library = torch.library.Library("normfuse_tests", "FRAGMENT")  # another operation may have a translation
    library.define("unknown(Tensor x) -> Tensor")
    write(program, tmp_path / "m.onnx", opset=23)
    assert len(made) == 3
