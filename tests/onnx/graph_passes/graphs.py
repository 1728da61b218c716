"""Small ONNX graphs as text, and their results in ONNX Runtime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime


def model(inputs: str, outputs: str, body: str, opset: int = 23, **weights) -> ir.Model:
    """A model with inferred shapes. Arrays become initializers of their names."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> graph ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def operations(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def unchanged(model: ir.Model, apply) -> bool:
    """Whether a pass says that it did nothing, and did nothing."""
    before = ir.to_proto(model).SerializeToString()
    return apply(model) == 0 and ir.to_proto(model).SerializeToString() == before


def same(model: ir.Model, apply, **inputs) -> bool:
    """Whether a pass keeps the results, up to a few roundings of float32."""
    before = run(model, **inputs)
    apply(model)
    after = run(model, **inputs)
    return all(
        a.shape == b.shape and np.abs(a - b).max() <= 1e-6 * max(1.0, np.abs(a).max())
        for a, b in zip(before, after, strict=True)
    )
