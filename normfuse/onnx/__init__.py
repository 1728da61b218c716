"""From a model to an ONNX file without its norms, verified in ONNX Runtime.

The spine is :func:`export`; each of its steps can be called alone::

    program = torch.export.export(module, args, dynamic_shapes=…)
    folded, report = normfuse.fold(program)
    normfuse.onnx.write(folded, "model.onnx", opset=20)
    normfuse.onnx.verify(model, "model.onnx")

:func:`fold_file` folds the norms of an ONNX file that comes from elsewhere.
"""

from normfuse.deprecation import deprecated_names
from normfuse.onnx.benchmark import BenchError, bench
from normfuse.onnx.editing import fold_file
from normfuse.onnx.exporter import ExportResult, FoldedModel, export, fold_model
from normfuse.onnx.graph import GraphError, GraphSummary, summarize
from normfuse.onnx.verifier import VerificationError, VerificationReport, verify
from normfuse.onnx.writer import WriteError, write
from normfuse.options import ExportError

__all__ = [
    "BenchError",
    "ExportError",
    "ExportResult",
    "FoldedModel",
    "GraphError",
    "GraphSummary",
    "VerificationError",
    "VerificationReport",
    "WriteError",
    "bench",
    "export",
    "fold_file",
    "fold_model",
    "summarize",
    "verify",
    "write",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "FoldedCheckpoint": "FoldedModel",
        "Proof": "VerificationReport",
        "fold_checkpoint": "fold_model",
    },
)
