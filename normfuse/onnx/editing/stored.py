"""What initialisers and Constant operations hold, as dense tensors."""

from __future__ import annotations

import math

import numpy as np
from onnx import GraphProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

# Entries of a sparse tensor for each that is stored, and beyond: a few bytes may stand for any number of zeros.
_ENTRIES_EACH, _ENTRIES_BEYOND = 64, 4096


def held(node: NodeProto) -> TensorProto | None:
    """What a Constant holds, as a tensor; None for texts."""
    attribute = next(iter(node.attribute), None)
    if attribute is None:
        return None
    if attribute.name == "value":
        return attribute.t
    if attribute.name == "sparse_value":
        return _dense(attribute.sparse_tensor)
    if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
        value = helper.get_attribute_value(attribute)
        kind = np.float32 if "float" in attribute.name else np.int64
        return numpy_helper.from_array(np.array(value, kind))
    return None


def make_dense(graph: GraphProto) -> None:
    """Let a graph hold its sparse initialisers as all others."""
    for place in reversed(range(len(graph.sparse_initializer))):
        tensor = _dense(graph.sparse_initializer[place])
        if tensor is not None:
            graph.initializer.append(tensor)
            del graph.sparse_initializer[place]


def _dense(sparse: SparseTensorProto) -> TensorProto | None:
    """The tensor that a sparse one stands for; None where it is too large, lies beside the file, or is damaged."""
    dims, count = tuple(sparse.dims), math.prod(sparse.dims)
    if TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        return None
    if not 0 <= count <= _ENTRIES_EACH * math.prod(sparse.values.dims) + _ENTRIES_BEYOND:
        return None
    try:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        flat = np.zeros(count, values.dtype)
        flat[places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), dims)] = values
        return numpy_helper.from_array(flat.reshape(dims), sparse.values.name)
    except (IndexError, TypeError, ValueError):  # ONNX Runtime says what is wrong with it
        return None
