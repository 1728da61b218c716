"""What the operations of ONNX mean in PyTorch, for :mod:`normfuse.onnx.importer`.

A function takes the node, then its operands. Sizes and axes (integers of at most one axis that come from ``Shape`` or
are constants) travel as Python integers and lists, so that torch.export keeps dynamic dimensions dynamic; all else
are tensors.
"""

from normfuse.onnx.operations import layout, microsoft, norms, pointwise, weighted, windows
from normfuse.onnx.operations.registry import OPERATIONS, Untranslated

__all__ = ["OPERATIONS", "Untranslated", "layout", "microsoft", "norms", "pointwise", "weighted", "windows"]
