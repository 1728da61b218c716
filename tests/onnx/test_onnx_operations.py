"""Every operation that the importer translates means in PyTorch what it means in ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_text import draw, model, run

from normfuse.onnx.importer import module_of
from normfuse.onnx.operations import OPERATIONS

ONE = np.ones(4, np.float32)
BODIES = {
    **{kind: f"y = {kind} (x)" for kind in
       "Abs Erf Exp Neg Relu Sigmoid Tanh HardSwish Softplus Identity Gelu LeakyRelu Reciprocal Softmax".split()},
    "Sqrt": "a = Abs (x) y = Sqrt (a)",
    "Log": "a = Abs (x) b = Add (a, a) y = Log (b)",
    "Pow": "two = Constant <value_float: float = 2.0> () y = Pow (x, two)",
    "Clip": "low = Constant <value_float: float = -0.5> () y = Clip (x, low)",
    "Gelu tanh": 'y = Gelu <approximate: string = "tanh"> (x)',
    "LeakyRelu slope": "y = LeakyRelu <alpha: float = 0.3> (x)",
    "Softmax axis": "y = Softmax <axis: int = 1> (x)",
    **{kind: f"y = {kind} (x, w)" for kind in ("Add", "Sub", "Mul", "Div")},
    "Where Less": "c = Less (x, w) y = Where (c, x, w)",
    "Greater And Not": "a = Greater (x, w) n = Not (a) b = And (a, n) y = Where (b, x, w)",
    "Equal Or": "a = Greater (x, w) e = Equal (a, a) o = Or (a, e) y = Where (o, x, w)",
    "MatMul": "y = MatMul (x, m)",
    "Gemm": "r = Reshape (x, rows) y = Gemm (r, m, w)",
    "Gemm transposed": "r = Reshape (x, rows) "
                       "y = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (r, m, w)",
    "Gemm transposed left": "r = Reshape (x, rows) t = Transpose (r) y = Gemm <transA: int = 1> (t, m)",
    "LayerNormalization": "y = LayerNormalization <epsilon: float = 0.01> (x, w, w)",
    "ReduceMean": "y = ReduceMean (x, axis)",
    "ReduceSum": "y = ReduceSum <keepdims: int = 0> (x, axis)",
    "ReduceMax": "y = ReduceMax (x)",
    "Transpose": "y = Transpose <perm: ints = [2, 0, 1]> (x)",
    "Flatten": "y = Flatten (x)",
    "Flatten 0": "y = Flatten <axis: int = 0> (x)",
    "Squeeze Unsqueeze": "u = Unsqueeze (x, axis) v = Neg (u) y = Squeeze (v, axis)",
    "Concat": "y = Concat <axis: int = 1> (x, x)",
    "Split": "a, b = Split <axis: int = 2, num_outputs: int = 2> (x) y = Mul (a, b)",
    "Split lengths": "a, b = Split <axis: int = 2> (x, lengths) y = Concat <axis: int = 2> (b, a)",
    "Slice": "y = Slice (x, axis, two, axis)",
    "Gather one": "i = Constant <value_int: int = 1> () y = Gather <axis: int = 1> (x, i)",
    "Gather some": "y = Gather <axis: int = 1> (x, some)",
    "Expand": "r = Unsqueeze (x, axis) y = Expand (r, wide)",
    "Expand a number": "n = Constant <value_float: float = 1.5> () e = Expand (n, wide3) y = Mul (e, x)",
    "Expand sizes": "e = Expand (wide3, axis) y = Expand (x, e)",
    "Expand integers": "e = Expand (three, two) c = CastLike (e, w) l = ReduceMax (c) y = Mul (x, l)",
    "Reshape zero": "y = Reshape (x, zeros)",
    "sizes at run time": "s = Shape (x) b = Slice (s, zero, two) l = Slice (s, two, three) d = Div (l, two) "
                         "p = Mul (b, b) q = Div (p, b) t = Concat <axis: int = 0> (q, d, two) y = Reshape (x, t)",
    "a size alone": "s = Shape <start: int = 0, end: int = 1> (x) z = Squeeze (s) u = Unsqueeze (z, zero) "
                    "r = Constant <value_ints: ints = [-1]> () t = Concat <axis: int = 0> (u, r) y = Reshape (x, t)",
    "shapes as older exporters expand": "n = ConstantOfShape <value: tensor = int64[1] {1}> (three) "
                         "m1 = Mul (n, minus) e = Equal (wide3, m1) t = Where (e, n, wide3) y = Expand (x, t)",
    "IsNaN": "n = IsNaN (x) y = Where (n, w, x)",
    "GreaterOrEqual LessOrEqual": "g = GreaterOrEqual (x, w) l = LessOrEqual (x, w) b = And (g, l) y = Where (b, w, x)",
    "Max": "y = Max (x, w, w)",
    "Min": "y = Min (x, w)",
    "HardSigmoid": "y = HardSigmoid (x)",
    "HardSigmoid of MobileNet": "y = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (x)",
    "Range": "a = Constant <value_int: int = 1> () b = Constant <value_int: int = 9> () "
             "c = Constant <value_int: int = 2> () r = Range (a, b, c) f = Cast <to: int = 1> (r) y = Mul (x, f)",
    "CastLike": "i = Cast <to: int = 7> (x) y = CastLike (i, w)",
    "CastLike of numbers": "a = Constant <value_float: float = 1.0> () s = Shape <start: int = 2> (x) z = Squeeze (s) "
                           "b = CastLike (a, z) r = Range (b, z, b) c = CastLike (r, x) "
                           "p = Concat <axis: int = 0> (c, q) y = Mul (x, p)",
    "GatherElements": "y = GatherElements <axis: int = 1> (x, elements)",
    "GatherND": "y = GatherND (x, some)",
    "sizes as data": "s = Shape (x) l = Max (s, two) c = Cast <to: int = 1> (l) q = Sqrt (c) r = ReduceSum (q) "
                     "n = Shape (s) m = Cast <to: int = 1> (n) p = Mul (r, m) y = Mul (x, p)",
    "Cast": "c = Cast <to: int = 11> (x) y = Cast <to: int = 1> (c)",
    "Dropout": "y = Dropout (x)",
    **{kind: f"y = {kind} (x)" for kind in
       "Sin Cos Floor Ceil Round Sign Softsign Mish Elu Selu LogSoftmax ReduceProd".split()},
    "Elu slope": "y = Elu <alpha: float = 0.5> (x)",
    "PRelu": "y = PRelu (x, w)",
    "Sum": "y = Sum (x, w, x)",
    "Mean": "y = Mean (x, w)",
    "Mod": "y = Mod <fmod: int = 1> (x, w)",
    "Mod of sizes": "s = Shape (x) m = Mod (s, two) c = Cast <to: int = 1> (m) r = ReduceSum (c) y = Mul (x, r)",
    "Xor": "a = Greater (x, w) b = Less (x, x) o = Xor (a, b) y = Where (o, x, w)",
    **{kind: f"y = {kind} (x, axis)" for kind in
       "ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split()},
    "ReduceMean of nothing": "y = ReduceMean <noop_with_empty_axes: int = 1> (x)",
    "ArgMax": "a = ArgMax (x) f = Cast <to: int = 1> (a) y = Mul (x, f)",
    "ArgMin": "a = ArgMin <axis: int = 2, keepdims: int = 0> (x) y = Cast <to: int = 1> (a)",
    "ReduceProd axes": "y = ReduceProd <keepdims: int = 0> (x, both)",
    "ReduceProd of sizes": "s = Shape (x) p = ReduceProd (s) y = Reshape (x, p)",
    "Size": "s = Size (x) u = Unsqueeze (s, zero) y = Reshape (x, u)",
    "Tile": "y = Tile (x, wide3)",
    "Tile of sizes": "t = Tile (two, axis) c = Concat <axis: int = 0> (t, minus) y = Reshape (x, c)",
    "Trilu": "y = Trilu (x)",
    "Trilu lower": "k = Constant <value_int: int = 1> () y = Trilu <upper: int = 0> (x, k)",
    "CumSum": "a = Constant <value_int: int = 1> () y = CumSum (x, a)",
    "Einsum": 'y = Einsum <equation: string = "bsc,cd->bsd"> (x, m)',
    "Slice backwards": "y = Slice (x, minus, lowest, axis, minus)",
    "Slice backwards by two": "y = Slice (x, three, zero, two, back2)",
    "Slice backwards of sizes": "s = Shape (x) r = Slice (s, minus, lowest, zero, minus) y = Reshape (x, r)",
    "GatherND batch": "y = GatherND <batch_dims: int = 1> (x, some)",
    "GatherND batches": "y = GatherND <batch_dims: int = 2> (x, each)",
    "RMSNormalization": "y = RMSNormalization <epsilon: float = 0.01> (x, w)",
    "SimplifiedLayerNormalization": "y = SimplifiedLayerNormalization <epsilon: float = 0.01> (x, w)",
    "InstanceNormalization": "t = Transpose <perm: ints = [0, 2, 1]> (x) y = InstanceNormalization (t, w, w)",
    "GroupNormalization": "t = Transpose <perm: ints = [0, 2, 1]> (x) "
                          "y = GroupNormalization <num_groups: int = 2> (t, pair, pair)",
    "com.microsoft.Gelu": "y = com.microsoft.Gelu (x)",
    "com.microsoft.BiasGelu": "y = com.microsoft.BiasGelu (x, w)",
    "com.microsoft.FastGelu": "y = com.microsoft.FastGelu (x, w)",
    "com.microsoft.QuickGelu": "y = com.microsoft.QuickGelu <alpha: float = 1.5> (x)",
    "com.microsoft.FusedMatMul": "y = com.microsoft.FusedMatMul <transA: int = 1, alpha: float = 0.5> (x, x)",
    "com.microsoft.FusedGemm": 'r = Reshape (x, rows) '
        'y = com.microsoft.FusedGemm <activation: string = "LeakyRelu", activation_alpha: float = 0.2> (r, m, w)',
    "com.microsoft.SkipLayerNormalization": "y = com.microsoft.SkipLayerNormalization (x, x, w, q4, w)",
    "com.microsoft.SkipLayerNormalization sum":
        "n, a, b, s = com.microsoft.SkipLayerNormalization (x, x, w) y = Sub (n, s)",
    "com.microsoft.SkipLayerNormalization small":
        "t = Constant <value_float: float = 0.001> () s = Mul (x, t) "
        "y = com.microsoft.SkipLayerNormalization (s, s, w)",
    "com.microsoft.SkipSimplifiedLayerNormalization":
        "n, a, b, s = com.microsoft.SkipSimplifiedLayerNormalization (x, x, w, q4) y = Sub (n, s)",
    "com.microsoft.EmbedLayerNormalization":
        "t = Constant <value: tensor = int32[2, 3] {0, 1, 2, 3, 2, 1}> () "
        "e, i = com.microsoft.EmbedLayerNormalization <epsilon: float = 0.01> (t, t, m, m, m, w, q4) y = Mul (x, e)",
    "com.microsoft.MultiHeadAttention":
        "y = com.microsoft.MultiHeadAttention <num_heads: int = 2> (x, x, x, bias3, kept)",
    "com.microsoft.MultiHeadAttention causal":
        "y = com.microsoft.MultiHeadAttention <num_heads: int = 2, unidirectional: int = 1, scale: float = 0.3> "
        "(x, x, x)",
    "com.microsoft.MultiHeadAttention bias":
        "y = com.microsoft.MultiHeadAttention <num_heads: int = 2> (x, x, x, , kept, added)",
    "com.microsoft.Attention": "y = com.microsoft.Attention <num_heads: int = 2> (x, packed, bias3, kept)",
    "com.microsoft.Attention causal":
        "y = com.microsoft.Attention <num_heads: int = 2, unidirectional: int = 1> (x, packed, bias3)",
    "Attention 3-D": "y = Attention <q_num_heads: int = 2, kv_num_heads: int = 2> (x, x, x)",
    "Attention masked":
        "y = Attention <q_num_heads: int = 2, kv_num_heads: int = 2, scale: float = 0.3> (x, x, x, added)",
    "RotaryEmbedding": "y = RotaryEmbedding <num_heads: int = 1> (x, turns, turns2, some3)",
    "RotaryEmbedding interleaved": "u = Unsqueeze (x, axis) y = RotaryEmbedding <interleaved: int = 1> "
                                   "(u, turns23, turns23)",
    "RotaryEmbedding partial": "u = Unsqueeze (x, axis) "
                               "y = RotaryEmbedding <rotary_embedding_dim: int = 2> (u, half23, half23)",
    "Attention grouped": "k, v = Split <axis: int = 2> (x, halves) "
                         "y = Attention <q_num_heads: int = 2, kv_num_heads: int = 1> (x, k, v)",
}  # fmt: skip
CONSTANTS = {
    "w": draw(4), "m": draw(4, 4), "rows": [-1, 4], "axis": [1], "lengths": [1, 3], "two": [2], "three": [3],
    "zero": [0], "q": draw(1), "elements": [[[1, 0, 2, 2]]] * 2, "some": [[1, 0], [1, 2]],
    "wide": [2, 5, 3, 4], "zeros": [0, -1], "minus": [-1], "wide3": [2, 3, 4],
    "lowest": [-(2**63)], "back2": [-2], "both": [0, -1], "halves": [2, 2],
    "each": [[[0], [3], [2]], [[1], [1], [0]]], "q4": draw(4), "pair": draw(2),
    "bias3": draw(12), "packed": draw(4, 12), "added": draw(1, 2, 3, 3),
    "kept": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    "turns": draw(5, 2), "turns2": draw(5, 2), "some3": [[0, 1, 2], [4, 0, 3]], "turns23": draw(2, 3, 2),
    "half23": draw(2, 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_operations_mean_the_same(case):
    body = BODIES[case]
    used = {
        name: value for name, value in CONSTANTS.items() if f" {name}" in body.replace("(", "( ").replace("=", "= ")
    }
    used = {name: value for name, value in used.items() if f"{name} =" not in body}
    new = ("RMSNormalization", "RotaryEmbedding", "= Attention")
    opset = 23 if any(kind in body for kind in new) else 20
    proto = model("float[2, 3, 4] x", "float y", body, opset, **used)
    x = draw(2, 3, 4)
    (wanted,) = run(proto, {"x": x})
    got = module_of(ir.from_proto(proto))(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-5


@pytest.mark.parametrize("opset", [18, 19, 21, 22, 23])
def test_operator_sets_differ_in_nothing_that_is_read(opset):
    """What opsets have in common means the same in each: models of all of them are one to the importer."""
    body = (
        "n = LayerNormalization (x, w, w) t = Transpose <perm: ints = [0, 2, 1]> (n) "
        "g = GroupNormalization <num_groups: int = 2> (t, h, h) p = AveragePool <kernel_shape: ints = [2]> (g) "
        "c = Cast <to: int = 11> (p) d = Cast <to: int = 1> (c) r = ReduceMean (d, axis) y = Softmax (r)"
    )
    proto = model("float[2, 3, 4] x", "float y", body, opset, w=ONE, h=draw(2 if opset < 21 else 4), axis=[1])
    x = draw(2, 3, 4)
    got = module_of(ir.from_proto(proto))(torch.from_numpy(x)).numpy()
    assert np.abs(got - run(proto, {"x": x})[0]).max() <= 1e-5


PLACES = "coordinate_transformation_mode: string"
K3, ONE_SIDE, ROUND = "kernel_shape: ints = [3, 3]", "pads: ints = [0, 1, 1, 0]", "pads: ints = [1, 1, 1, 1]"
UP = "strides: ints = [2, 2], ceil_mode: int = 1"
IMAGES = {
    "Conv": "y = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (x, k, b)",
    "Conv grouped": "y = Conv <group: int = 2, dilations: ints = [2, 2]> (x, g)",
    "MaxPool": "y = MaxPool <kernel_shape: ints = [3, 3], strides: ints = [2, 2], pads: ints = [1, 1, 1, 1]> (x)",
    "AveragePool": "y = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (x)",
    "AveragePool padded": "y = AveragePool <kernel_shape: ints = [3, 3], pads: ints = [1, 1, 1, 1]> (x)",
    "GlobalAveragePool": "y = GlobalAveragePool (x)",
    "GlobalMaxPool": "y = GlobalMaxPool (x)",
    "Conv asymmetric": "y = Conv <pads: ints = [0, 1, 2, 0]> (x, k, b)",
    "Conv same": 'y = Conv <auto_pad: string = "SAME_UPPER", strides: ints = [2, 3]> (x, k)',
    "Conv same lower": 'y = Conv <auto_pad: string = "SAME_LOWER", strides: ints = [2, 1]> (x, k, b)',
    "Conv valid": 'y = Conv <auto_pad: string = "VALID"> (x, k)',
    "ConvTranspose": "y = ConvTranspose <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2], "
                     "output_padding: ints = [1, 0], group: int = 2> (x, g, pair)",
    "MaxPool asymmetric": f"y = MaxPool <{K3}, {ONE_SIDE}> (x)",
    "MaxPool same": 'y = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [3, 1], '
                    'auto_pad: string = "SAME_UPPER"> (x)',
    "AveragePool asymmetric": f"y = AveragePool <{K3}, {ONE_SIDE}> (x)",
    "AveragePool asymmetric, counted": f"y = AveragePool <{K3}, {ONE_SIDE}, count_include_pad: int = 1> (x)",
    "AveragePool up": f"y = AveragePool <{K3}, {UP}> (x)",
    "AveragePool up, padded": f"y = AveragePool <{K3}, {UP}, {ROUND}> (x)",
    "AveragePool up, counted": f"y = AveragePool <{K3}, {UP}, {ROUND}, count_include_pad: int = 1> (x)",
    "Pad": "y = Pad (x, sides, seven)",
    "Pad axes": 'y = Pad <mode: string = "reflect"> (x, ends, , last)',
    "Pad edge": 'y = Pad <mode: string = "edge"> (x, sides)',
    "Pad nothing": "n = Constant <value_ints: ints = [0, 0, 0, 0, 0, 0, 0, 0]> () y = Pad (x, n)",
    "DepthToSpace": "y = DepthToSpace <blocksize: int = 2> (x)",
    "DepthToSpace CRD": 'y = DepthToSpace <blocksize: int = 2, mode: string = "CRD"> (x)',
    "SpaceToDepth": "y = SpaceToDepth <blocksize: int = 2> (x)",
    "Resize": "y = Resize (x, , twice)",
    "Resize to": 'y = Resize <mode: string = "linear"> (x, , , target)',
    "Resize corners": f'y = Resize <mode: string = "linear", {PLACES} = "align_corners"> (x, , twice)',
    "Resize cubic": f'y = Resize <mode: string = "cubic", {PLACES} = "pytorch_half_pixel"> (x, , twice)',
    "Resize asymmetric": f'y = Resize <{PLACES} = "asymmetric", nearest_mode: string = "floor"> (x, , , target)',
    "com.microsoft.FusedConv": 'y = com.microsoft.FusedConv <activation: string = "Relu"> (x, k, b, inner)',
    "com.microsoft.FusedConv clip": 'y = com.microsoft.FusedConv <activation: string = "Clip", '
                                    "activation_params: floats = [0.0, 6.0]> (x, k, b)",
    "BatchNormalization": "y = BatchNormalization <epsilon: float = 0.1> (x, b, b, b, v)",
}  # fmt: skip
KERNELS = {
    "sides": [0, 0, 1, 0, 0, 0, 2, 1], "ends": [2, 1, 0, 3], "last": [2, 3], "seven": np.float32(7), "pair": draw(4),
    "twice": np.array([1, 1, 2, 2], np.float32), "target": [2, 4, 5, 11], "inner": draw(2, 4, 6, 6),
    "k": draw(4, 4, 3, 3), "g": draw(4, 2, 3, 3), "b": draw(4), "v": ONE * 2,
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_operations_on_images_mean_the_same(case):
    used = {name: array for name, array in KERNELS.items() if f" {name}" in IMAGES[case]}
    proto = model("float[2, 4, 8, 8] x", "float y", IMAGES[case], **used)
    x = draw(2, 4, 8, 8)
    (wanted,) = run(proto, {"x": x})
    got = module_of(ir.from_proto(proto))(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-5


def test_attention_means_the_same():
    proto = model(
        "float[1, 2, 5, 4] q", "float[1, 2, 5, 4] y", "y = Attention <is_causal: int = 1> (q, q, q)", opset=23
    )
    q = draw(1, 2, 5, 4)
    got = module_of(ir.from_proto(proto))(torch.from_numpy(q)).numpy()
    assert np.abs(got - run(proto, {"q": q})[0]).max() <= 1e-5


def test_every_operation_is_tested():
    tested = " ".join([*BODIES.values(), *IMAGES.values(), "Attention"])
    assert [kind for kind in OPERATIONS if not kind.startswith("normfuse.") and f"{kind} " not in f"{tested} "] == []
