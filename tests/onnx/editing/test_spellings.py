"""Every spelling of an operation that maps can go into, or pass."""

import numpy as np
import pytest
from onnx_files import assert_equal, folded, kinds, read
from onnx_text import GENERATOR, draw, model

TAIL = " a = Mul (l, gain) y = Add (a, shift)"
FLAT = "float[batch, 3] x"
COLUMNS = "float[3, 5] x"
IMAGE = "float[batch, 4, 6, 6] x"
# Inputs, what comes before the map, what is left of it; and the map, where it is not the usual one behind.
BEHIND = {
    "Gemm, alpha": (FLAT, "l = Gemm <alpha: float = 0.5> (x, w, b)", ["Gemm"]),
    "Gemm, alpha and beta": (FLAT, "l = Gemm <alpha: float = 0.5, beta: float = 2.0> (x, w, b)", ["Gemm"]),
    "Gemm, beta without a bias": (FLAT, "l = Gemm <beta: float = 2.0> (x, w)", ["Gemm"]),
    "Gemm, both transposed": ("float[3, batch] x", "l = Gemm <transA: int = 1, transB: int = 1> (x, wt, b)", ["Gemm"]),
    "Gemm, one number for a bias": (FLAT, "l = Gemm <beta: float = 2.0> (x, w, slope)", ["Gemm"]),
    "Gemm, the bias as a row": (FLAT, "l = Gemm (x, w, row)", ["Gemm"]),
    "a sum of three": (
        FLAT, "m = MatMul (x, w) n = MatMul (x, w) l = Sum (m, n, m)", ["MatMul", "Gemm", "Sum"]
    ),
    "a mean of three": (
        FLAT, "m = MatMul (x, w) n = MatMul (x, w) l = Mean (m, n, n)", ["Gemm", "MatMul", "Mean"]
    ),
    "Gemm, the weight on the left": (COLUMNS, "l = Gemm <alpha: float = 0.5> (wt, x)", ["Gemm"]),
    "Gemm, the weight on the left, both transposed": (
        "float[5, 3] x", "l = Gemm <transA: int = 1, transB: int = 1, beta: float = 2.0> (w, x, column)", ["Gemm"]
    ),
    "MatMul, the weight on the left": (COLUMNS, "l = MatMul (wt, x)", ["Gemm"]),
    "FusedMatMul": (
        FLAT, "p = com.microsoft.FusedMatMul <alpha: float = 0.5> (x, w) l = Add (p, b)", ["FusedMatMul", "Add"]
    ),
    "FusedMatMul, transposed": (
        FLAT, "p = com.microsoft.FusedMatMul <transB: int = 1> (x, wt) l = Add (p, b)", ["FusedMatMul", "Add"]
    ),
    "FusedMatMul, the weight on the left": (
        COLUMNS, "l = com.microsoft.FusedMatMul <alpha: float = 0.5, transA: int = 1> (w, x)", ["FusedMatMul", "Add"]
    ),
    "SimplifiedLayerNormalization": (
        "float[5, 4] x", "l = SimplifiedLayerNormalization (x, gain1)", ["SimplifiedLayerNormalization", "Add"]
    ),
    "InstanceNormalization": (
        "float[batch, 4, 5] x", "l = InstanceNormalization (x, gain1, b)", ["InstanceNormalization"]
    ),
    "GroupNormalization": (
        "float[batch, 4, 5] x", "l = GroupNormalization <num_groups: int = 2> (x, gain1, b)", ["GroupNormalization"]
    ),
}  # fmt: skip
# What stands between the map and the convolution in front of it.
BETWEEN = {
    "a slice of two axes": ("s = Slice (c, starts, ends, axes)", ["Slice"]),
    "a slice with steps": ("s = Slice (c, starts, ends, axes, steps)", ["Slice"]),
    "a slice that runs backwards": ("s = Slice (c, ends, starts, axes, back)", ["Slice"]),
    "the largest, and where it is": (
        "s, place = MaxPool <kernel_shape: ints = [2, 2]> (c) where = Identity (place)",
        ["MaxPool", "Identity"],
    ),
    "a split into one": ("s = Split <axis: int = 1, num_outputs: int = 1> (c)", ["Split"]),
    "depth to space, DCR": ("s = DepthToSpace <blocksize: int = 2> (c)", ["DepthToSpace"]),
    "depth to space, CRD": ('s = DepthToSpace <blocksize: int = 2, mode: string = "CRD"> (c)', ["DepthToSpace"]),
    "space to depth": ("s = SpaceToDepth <blocksize: int = 2> (c)", ["SpaceToDepth"]),
    "entries chosen by an index of two axes": ("s = Gather <axis: int = 1> (c, pairs)", ["Gather"]),
    "PRelu, one slope": ("s = PRelu (c, slope)", ["PRelu"]),
    "PRelu, a slope for each channel": ("s = PRelu (c, slopes)", ["PRelu"]),
    "a sum over positions": ("s = ReduceSum (c, places)", ["ReduceSum"]),
    "the smallest": ("s = ReduceMin (c, places)", ["ReduceMin"]),
    "zeros at some positions": ("h = Greater (x, zero) s = Where (h, c, zero)", ["Greater", "Where"]),
    "the larger of it and zero": ("s = Max (zero, c)", ["Max"]),
    "padding from the other side": ('s = Pad <mode: string = "wrap"> (c, around)', ["Pad"]),
    "a larger volume": (
        'u = Unsqueeze (c, last) r = Resize <mode: string = "linear"> (u, , twice) s = Squeeze (r, last)',
        ["Unsqueeze", "Resize", "Squeeze"],
    ),
    "values between positions": (
        "t = Transpose <perm: ints = [0, 2, 3, 1]> (x) p, q = Split <axis: int = 3, num_outputs: int = 2> (t) "
        "s = GridSample (c, p)",
        ["Transpose", "Split", "GridSample"],
    ),
    "the mean of three": ("d = Conv (x, k) s = Mean (c, d, d)", ["Conv", "Mean"]),
    "the larger of two": ("d = Conv (x, k) s = Max (c, d)", ["Conv", "Max"]),
}
CONSTANTS = {
    "w": draw(3, 4), "wt": draw(4, 3), "b": draw(4), "row": draw(1, 4), "column": draw(4, 1), "gain1": draw(4),
    "k": draw(4, 4, 1, 1),
    "starts": np.array([1, 2]), "ends": np.array([9, 5]), "axes": np.array([2, 3]), "steps": np.array([2, 1]),
    "back": np.array([-2, -1]), "pairs": np.array([[0, 2], [3, 1]]),
    "slope": np.full(1, 0.25, np.float32), "slopes": np.abs(draw(4, 1, 1)),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "last": np.array([4]), "twice": np.float32([1, 1, 2, 2, 1]),
    "places": np.array([2, 3]), "zero": np.zeros(1, np.float32), "three": np.full(1, 3.0, np.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_a_map_goes_into_what_is_in_front_of_it(tmp_path, case):
    inputs, body, left = BEHIND[case]
    axes = (4,) if inputs.endswith((FLAT, "3, batch] x", "5, 4] x")) else (4, 1)
    proto = model(inputs, "float y", body + TAIL, 21, **read(body, CONSTANTS), gain=draw(*axes), shift=draw(*axes))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == left
    shape = [2 if size == "batch" else int(size) for size in inputs.partition("[")[2].partition("]")[0].split(", ")]
    assert_equal(tmp_path, {"x": draw(*shape)})


@pytest.mark.parametrize("case", BETWEEN)
def test_a_factor_passes(tmp_path, case):
    """Which goes into the convolution: the Tanh behind it takes none."""
    body, left = BETWEEN[case]
    body = f"c = Conv (x, k) {body} m = Mul (s, three) y = Tanh (m)"
    proto = model(IMAGE, "float y", body, 20, **read(body, CONSTANTS))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["Conv", *left, "Tanh"]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})


IN_FRONT = {
    "a transposed convolution with one tap": (IMAGE, "y = ConvTranspose <group: int = 2> (l, pairwise)"),
    "a transposed convolution whose borders are cut off": (
        IMAGE, "y = ConvTranspose <pads: ints = [2, 2, 2, 2]> (l, taps, gain1)"
    ),
    "a product with the weight on the left": (COLUMNS, "y = Gemm (wide, l, column)"),
}  # fmt: skip
BORDERS = {
    "strides": "strides: ints = [2, 2]",
    "positions added at the end": "strides: ints = [2, 2], output_padding: ints = [1, 1]",
    "borders that are not cut off": "kernel_shape: ints = [3, 3], pads: ints = [2, 1, 2, 1]",
    "the same size": 'kernel_shape: ints = [3, 3], auto_pad: string = "SAME_UPPER"',
}
TAPS = {"pairwise": draw(4, 2, 1, 1), "taps": draw(4, 4, 3, 3), "wide": draw(4, 3), **CONSTANTS}


@pytest.mark.parametrize("case", IN_FRONT)
def test_a_map_in_front_goes_into(tmp_path, case):
    inputs, body = IN_FRONT[case]
    channels = (3, 1) if inputs == COLUMNS else (4, 1, 1)
    constants = read(body, TAPS) | {"gain": draw(*channels), "shift": draw(*channels)}
    _, after = folded(model(inputs, "float y", FRONT + body, 17, **constants), tmp_path)
    assert len(kinds(after)) == 1
    assert_equal(tmp_path, {"x": draw(3, 5) if inputs == COLUMNS else draw(2, 4, 6, 6)})


@pytest.mark.parametrize("case", BORDERS)
def test_a_transposed_convolution_takes_no_shift_where_positions_see_fewer_taps(tmp_path, case):
    taps = "taps" if "kernel" in BORDERS[case] else "pairwise"
    body = f"l = Add (x, shift) y = ConvTranspose <{BORDERS[case]}> (l, {taps})"
    proto = model(IMAGE, "float y", body, 17, **read(body, TAPS), shift=draw(4, 1, 1))
    result, after = folded(proto, tmp_path)
    assert kinds(after) == kinds(proto) and not any("left as it was" in note for note in result.notes)


EXPANDED = {
    "by the shape of another value": "size = Shape (x) e = Expand (gain, size)",
    "repeated as often as a value has entries": (
        "size = Shape (x) b = Slice (size, none, unit) o = Concat <axis: int = 0> (b, units) e = Tile (gain, o)"
    ),
}


@pytest.mark.parametrize("case", EXPANDED)
def test_a_gain_may_be_expanded(tmp_path, case):
    body = f"{EXPANDED[case]} c = Conv (x, k) m = Mul (c, e) l = Add (m, e) y = Relu (l)"
    constants = {"none": np.array([0]), "unit": np.array([1]), "units": np.array([1, 1, 1]), "k": CONSTANTS["k"]}
    _, after = folded(model(IMAGE, "float y", body, 17, gain=draw(1, 4, 1, 1), **read(body, constants)), tmp_path)
    assert kinds(after) == ["Conv", "Relu"]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})


FRONT = "m = Mul (x, gain) l = Add (m, shift) "
FUSED = {
    "an LSTM": ("y = LSTM <hidden_size: int = 2> (l, wl, rl, bl)", ["LSTM"]),
    "an LSTM without biases, of which the last state is read": (
        "z, y = LSTM <hidden_size: int = 2> (l, wl, rl)", ["LSTM"]
    ),
    "a GRU in both directions": (
        'y = GRU <hidden_size: int = 2, direction: string = "bidirectional"> (l, wg, rg, bg)', ["GRU"]
    ),
    "a fused Gemm": (
        'f = Reshape (l, flat) y = com.microsoft.FusedGemm <activation: string = "Relu", alpha: float = 0.5> (f, wf)',
        ["Reshape", "FusedGemm"],
    ),
    "fused attention": ("y = com.microsoft.Attention <num_heads: int = 2> (l, wa, ba)", ["Attention"]),
}  # fmt: skip
LARGE = {
    "wl": draw(1, 8, 4), "rl": draw(1, 8, 2), "bl": draw(1, 16), "wg": draw(2, 6, 4), "rg": draw(2, 6, 2),
    "bg": draw(2, 12), "flat": np.array([-1, 4]), "wf": draw(4, 3), "wa": draw(4, 12), "ba": draw(12),
}  # fmt: skip


@pytest.mark.parametrize("case", FUSED)
def test_a_map_goes_into_the_first_part_of(tmp_path, case):
    body, left = FUSED[case]
    constants = read(body, LARGE) | {"gain": draw(4), "shift": draw(4)}
    _, after = folded(model("float[steps, batch, 4] x", "float y", FRONT + body, 17, **constants), tmp_path)
    assert kinds(after) == left
    assert_equal(tmp_path, {"x": draw(5, 3, 4)})


AVERAGES = {
    "a product": ("p = Softmax (s) a = MatMul (p, v)", 13, True),
    "a fused product": ("p = Softmax (s) a = com.microsoft.FusedMatMul (p, v)", 13, True),
    "a factor": ("p = Softmax (s) a = com.microsoft.FusedMatMul <alpha: float = 0.5> (p, v)", 13, False),
    "a Softmax over two axes": ("p = Softmax (s) a = MatMul (p, v)", 11, False),
    "an older Softmax over the last axis": ("p = Softmax <axis: int = 2> (s) a = MatMul (p, v)", 11, True),
}  # fmt: skip


@pytest.mark.parametrize("case", AVERAGES)
def test_a_shift_passes_averages(tmp_path, case):
    """Which weigh positions with a Softmax over them."""
    attention, opset, passes = AVERAGES[case]
    body = (
        f"t = Transpose <perm: ints = [0, 2, 1]> (x) s = MatMul (x, t) r = Relu (x) v = Add (r, shift) {attention} "
        "m = MatMul (a, w) y = Add (m, b)"
    )
    constants = {"w": draw(4, 6), "b": draw(6), "shift": draw(4)}
    _, after = folded(model("float[batch, seq, 4] x", "float y", body, opset, **constants), tmp_path)
    assert kinds(after).count("Add") == (1 if passes else 2)
    assert_equal(tmp_path, {"x": draw(2, 5, 4)})


QUANTISED = {
    "a product": ("MatMulInteger (q, w, z)", "float[batch, 4] x", (4,)),
    "a product, a scale for each column": ("MatMulInteger (q, w, z)", "float[batch, 4] x", (4,)),
    "a convolution": ("ConvInteger (q, w, z)", IMAGE, (4, 1, 1)),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_the_scale_of_a_dynamically_quantised_weight_takes_a_map(tmp_path, case):
    """The integers stay what they are."""
    product, inputs, channels = QUANTISED[case]
    body = (
        f"q, s, z = DynamicQuantizeLinear (x) i = {product} c = Cast <to: int = 1> (i) f = Mul (s, scale) "
        "p = Mul (c, f) a = Add (b, p) m = Mul (a, gain) y = Add (m, shift)"
    )
    weight = GENERATOR.integers(-99, 99, (4, 4) if len(channels) == 1 else (4, 4, 1, 1)).astype(np.int8)
    constants = {name: draw(*channels) for name in ("b", "gain", "shift")}
    constants["scale"] = np.abs(draw(4)) if "column" in case else np.float32(0.01)
    proto = model(inputs, "float y", body, 17, w=weight, **constants)
    _, after = folded(proto, tmp_path)
    assert kinds(after) == [*kinds(proto)[:-3], "Add"]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6) if inputs == IMAGE else draw(2, 4)})


def test_a_factor_passes_a_gemm_of_two_values(tmp_path):
    """As torch writes `mm`, of a graph's neighbours say."""
    product = "g = Gemm <transA: int = 1, beta: float = 0.0> (graph, m, slope)"
    body = f"m = MatMul (x, w) {product} a = Mul (g, gain) y = Tanh (a)"
    proto = model("float[n, 3] x, float[n, n] graph", "float y", body, 17, w=draw(3, 4), gain=draw(4), slope=draw(1))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["MatMul", "Gemm", "Tanh"]
    assert_equal(tmp_path, {"x": draw(5, 3), "graph": draw(5, 5)})


def test_a_scale_of_integers_that_two_read_takes_none(tmp_path):
    body = (
        "q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z) c = Cast <to: int = 1> (i) "
        "f = Mul (s, scale) p = Mul (c, f) m = Mul (p, gain) y = Add (m, f)"
    )
    constants = {"w": np.ones((4, 4), np.int8), "scale": np.float32(0.01), "gain": draw(4)}
    proto = model("float[batch, 4] x", "float y", body, 17, **constants)
    _, after = folded(proto, tmp_path)
    assert after == proto


def test_a_norm_in_front_of_a_convolution_that_onnx_runtime_fused_with_its_relu(tmp_path):
    body = (
        "n = BatchNormalization (x, gain, shift, mean, variance) "
        'c = com.microsoft.FusedConv <activation: string = "Relu", kernel_shape: ints = [1, 1]> (n, k) y = Tanh (c)'
    )
    constants = {"gain": draw(4), "shift": draw(4), "mean": draw(4), "variance": np.ones(4, np.float32)}
    _, after = folded(model(IMAGE, "float y", body, 17, **constants, k=CONSTANTS["k"]), tmp_path)
    assert kinds(after) == ["FusedConv", "Tanh"]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})


@pytest.mark.parametrize("norm", ["InstanceNormalization", "GroupNormalization <num_groups: int = 2>"])
def test_gains_of_one_and_shifts_of_zero_stay_what_they_are(tmp_path, norm):
    """As torch writes a GroupNorm: its own gain and shift behind the norm of the groups."""
    body = (
        f"c = Conv (x, k) n = BatchNormalization (c, gain, shift, shift, one) g = Reshape (n, groups) "
        f"i = {norm} (g, unit, none) r = Reshape (i, picture) m = Mul (r, column) y = Conv (m, k)"
    )
    constants = {"k": CONSTANTS["k"], "gain": draw(4), "shift": draw(4), "one": np.ones(4, np.float32)}
    constants |= {"groups": np.array([0, 2, -1]), "picture": np.array([0, 4, 6, 6]), "column": draw(4, 1, 1)}
    constants |= {"unit": np.ones(2, np.float32), "none": np.zeros(2, np.float32)}
    _, after = folded(model(IMAGE, "float y", body, 21, **constants), tmp_path)
    assert kinds(after) == ["Conv", "Reshape", norm.partition(" ")[0], "Reshape", "Conv"]
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})


def test_values_that_nothing_reads_may_have_two_dynamic_sizes(tmp_path):
    body = "l = MatMul (x, w) a = Mul (l, gain) y = Tanh (a) idle = Reshape (a, order)"
    constants = {"w": draw(4, 6), "gain": draw(6), "order": np.array([0, -1, 2])}
    _, after = folded(model("float[batch, seq, 4] x", "float y", body, **constants), tmp_path)
    assert kinds(after) == ["MatMul", "Tanh", "Reshape"]
    assert_equal(tmp_path, {"x": draw(2, 3, 4)})


def test_what_reads_a_shape_takes_any_scale(tmp_path):
    """As simplified files have it: products with two axes, between reshapes that a shape decides."""
    body = (
        "p = MatMul (x, w) a = Mul (p, gain) s = Add (a, shift) r = Reshape (s, flat) l = Gemm (r, w2, b) "
        "h = Shape (s) k = Size (s) y = Reshape (l, h) z = Cast <to: int = 1> (k)"
    )
    constants = {"w": draw(4, 4), "gain": draw(4), "shift": draw(4), "w2": draw(4, 4), "b": draw(4)}
    proto = model("float[batch, seq, 4] x", "float y, float z", body, **constants, flat=np.array([-1, 4]))
    _, after = folded(proto, tmp_path)
    assert kinds(after) == ["MatMul", "Reshape", "Gemm", "Shape", "Size", "Reshape", "Cast"]
    assert_equal(tmp_path, {"x": draw(2, 3, 4)})


def test_a_number_without_axes_takes_a_factor(tmp_path):
    body = "e = Exp (x) d = Div (two, e) p = Mul (x, d) n = Mul (p, hundreds) y = MatMul (n, k)"
    constants = {"two": np.float32(2), "hundreds": 100 * draw(3), "k": draw(3, 2)}
    result, after = folded(model("float[batch, 3] x", "float y", body, **constants), tmp_path)
    assert kinds(after) == ["Exp", "Div", "Mul", "MatMul"] and not result.report.remaining
    assert_equal(tmp_path, {"x": draw(3, 3)})


def test_dequantised_constants_stay(tmp_path):
    body = (
        "m = MatMul (x, w) q = QuantizeLinear (m, scale) d = DequantizeLinear (q, scale) "
        "e = DequantizeLinear (b, scale) a = Add (e, d) f = Mul (a, gain) y = MatMul (f, w)"
    )
    constants = {"w": draw(4, 4), "scale": np.float32(0.1), "b": np.ones(4, np.uint8), "gain": draw(4)}
    _, after = folded(model("float[batch, 4] x", "float y", body, 17, **constants), tmp_path)
    assert kinds(after) == ["MatMul", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Add", "MatMul"]


def test_a_norm_that_would_need_a_number_for_each_position_stays(tmp_path):
    """Two norms around a DepthToSpace that makes positions of channels: the inner shift is none of the outer norm."""
    body = (
        "t = Transpose <perm: ints = [0, 2, 3, 1]> (x) m = MatMul (t, w) a = Add (m, b) "
        "u = Transpose <perm: ints = [0, 3, 1, 2]> (a) q = GroupNormalization <num_groups: int = 2> (u, g, s) "
        "n = BatchNormalization (u, g, s, s, v) d = DepthToSpace <blocksize: int = 2> (n) c = Conv (n, k) "
        "o = BatchNormalization (d, g1, g1, g1, v1) y = Clip (o, zero) z = Tanh (c)"
    )
    constants = {"w": draw(4, 4), "b": draw(4), "k": CONSTANTS["k"], "g": draw(4), "s": draw(4), "v": np.ones(4)}
    constants |= {"g1": draw(1), "v1": np.ones(1), "zero": np.zeros(())}
    constants = {name: value.astype(np.float32) for name, value in constants.items()}
    result, _ = folded(model(IMAGE, "float y, float z", body, 21, **constants), tmp_path)
    assert not any("Error" in note for note in result.notes)
    assert_equal(tmp_path, {"x": draw(2, 4, 6, 6)})
