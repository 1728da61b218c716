"""ONNX files that come from elsewhere are edited, not rewritten.

:func:`fold_file` reads a graph into a program for :func:`normfuse.fold`, operation by operation and with the way back
(:mod:`.reading`, :mod:`.translating`), and writes what folding decided into a copy of the file (:mod:`.edits`). Inputs
to run it with are made from what the file says of itself (:mod:`.hints`, :mod:`.trial`).
"""

from normfuse.onnx.editing.fold_file import fold_file

__all__ = ["fold_file"]
