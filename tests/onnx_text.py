"""ONNX models from text, and what ONNX Runtime makes of them."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime

GENERATOR = np.random.default_rng(0)


def draw(*shape):
    return GENERATOR.standard_normal(shape).astype(np.float32)


def model(inputs, outputs, body, opset=20, **weights):
    """A model of the standard operations, and of ONNX Runtime's if the body says ``com.microsoft.Gelu``."""
    domains = f'"" : {opset}' + (', "com.microsoft" : 1' if "com.microsoft" in body else "")
    text = f"<ir_version: 10, opset_import: [{domains}]> graph ({inputs}) => ({outputs}) {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    if "[" not in outputs:  # of any shape
        proto.graph.output[0].type.tensor_type.ClearField("shape")
    else:
        onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = proto if isinstance(proto, str) else proto.SerializeToString()
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, feeds)


def executed(path, folder):
    """A session, and the operations that ONNX Runtime executes after its own optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)
