"""From a model to a shaped file: what remains, that it computes the same, and what happens when it does not."""

import functools
import importlib
import json
from collections import Counter

import onnx
import onnx_ir as ir
import pytest
import tiny_models
import torch
from onnx_text import executed
from torch.export import Dim
from typer.testing import CliRunner

from normfuse import save
from normfuse.cli import app
from normfuse.onnx import ExportError, VerificationError, export, summarize
from normfuse.onnx.graph_passes import PASS_NAMES, PASSES, TARGETS, passes_for, run_passes

biases = importlib.import_module("normfuse.onnx.graph_passes.biases")


def encoder(**options):
    torch.manual_seed(0)
    return tiny_models.trained(tiny_models.Encoder(**{"depth": 1, **options}))


def arguments(mask=False):
    batch, seq = Dim("batch"), Dim("seq", max=16)
    tokens, pad_mask = torch.randint(11, (2, 6)), torch.arange(6).expand(2, 6) > 3
    shapes = {"tokens": {0: batch, 1: seq}, "pad_mask": {0: batch, 1: seq}}
    if mask:
        return {"example_inputs": (tokens, pad_mask), "dynamic_shapes": shapes}
    return {"example_inputs": (tokens,), "dynamic_shapes": {"tokens": shapes["tokens"]}}


def operations(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Exports the encoder for a target, once for each."""

    @functools.cache
    def make(target, mask=False):
        folder = tmp_path_factory.mktemp(target)
        return export(encoder(), folder / "m.onnx", target=target, **arguments(mask))

    return make


@pytest.mark.parametrize(("placement", "mask"), [("pre", True), ("post", False), ("peri", True)])
def test_a_block_is_four_products_and_one_attention(tmp_path, placement, mask):
    result = export(encoder(placement=placement), tmp_path / "m.onnx", target="cpu", **arguments(mask))
    found = operations(result.path)
    # Additions left: positions, two residuals, and the biases of three products (into each branch, and the head).
    assert (found["MatMul"], found["Attention"], found["Add"]) == (5, 1, 1 + 2 + 3)
    assert found["Transpose"] == 0
    assert result.passes == {"attention3d": 1, "single_token": 0}
    assert result.graph.norms == result.graph.affines == [] and result.verification.worst("ONNX file") < 1e-4
    assert any(note.startswith("biases travel") for note in result.notes)


@pytest.mark.parametrize("mask", [False, True])
def test_one_thread_gets_products_with_their_biases(shaped, tmp_path, mask):
    result = shaped("cpu-single", mask)
    found = operations(result.path)
    assert (found["Gemm"], found["MatMul"], found["Attention"]) == (3, 2, 1)
    assert found["Add"] == 1 + 2  # positions and residuals
    assert result.passes == {"attention3d": 1, "single_token": 0, "gemm2d": 5}
    assert result.verification.worst("ONNX file") < 1e-4
    _, running = executed(result.path, tmp_path)
    # ONNX Runtime itself makes residuals the operands of products that have no bias.
    assert (running["Gemm"], running["MatMul"], running["Add"]) == (5, 0, 1)


def test_long_sequences_get_attention_in_blocks(shaped):
    result = shaped("cpu-long")
    found = operations(result.path)
    assert (found["MatMul"], found["MultiHeadAttention"], found["Attention"]) == (5, 1, 0) and not result.notes[1:]
    assert result.passes["blockwise_attention"] == 1 and result.verification.worst("ONNX file") < 1e-4
    assert summarize(result.path).opset == 23
    masked = shaped("cpu-long", mask=True)
    assert masked.passes["blockwise_attention"] == 0 and operations(masked.path)["Attention"] == 1


def test_portable_is_the_graph_as_it_was(shaped, tmp_path):
    default, result = export(encoder(), tmp_path / "default.onnx", **arguments()), shaped("portable")
    assert default.path.read_bytes() == result.path.read_bytes()
    assert result.passes == {} and all("empty batch" in note for note in result.notes)


def test_cuda_only_saves_additions(shaped):
    plain, result = operations(shaped("portable").path), operations(shaped("cuda").path)
    assert plain - result == {"Add": 2} and not result - plain


def test_biases_can_stay(tmp_path):
    result = export(encoder(), tmp_path / "m.onnx", target="cuda", disable_passes=["carry_biases"], **arguments())
    assert result.passes == {} and operations(result.path)["Add"] == 1 + 2 + 5


def test_every_other_pass_can_be_left_out(shaped):
    file = shaped("portable").path
    for name, left in {"attention3d": "Transpose", "blockwise_attention": "Attention", "gemm2d": "MatMul"}.items():
        target = next(target for target, names in TARGETS.items() if name in names and "attention3d" in names)
        counts = []
        for names in (passes_for(target), passes_for(target, [name])):
            graph = ir.load(file)
            assert (name in run_passes(graph, names)) == (name in names)
            counts.append(sum(node.op_type == left for node in graph.graph))
        assert counts[0] < counts[1], name


def test_other_operator_sets_keep_what_applies_to_them(tmp_path):
    result = export(encoder(), tmp_path / "m.onnx", target="cpu-single", opset=20, **arguments())
    assert result.passes == {"attention3d": 0, "single_token": 0, "gemm2d": 5}


def test_a_network_without_streams_stays(tmp_path):
    model = tiny_models.trained(tiny_models.ConvNet())
    result = export(model, tmp_path / "m.onnx", target="cpu-single", example_inputs=torch.randn(2, 3, 8, 8))
    assert not any(result.passes.values()) and set(result.passes) == set(passes_for("cpu-single")) - {"carry_biases"}


def failing(model):
    raise IndexError("no such axis")


def test_a_pass_that_fails_costs_the_passes_and_says_why(shaped, tmp_path, monkeypatch):
    monkeypatch.setitem(PASSES, "attention3d", failing)
    result = export(encoder(), tmp_path / "m.onnx", target="cpu", **arguments())
    assert "opset 23, passes for cpu, was given up: a graph pass failed: IndexError: no such axis" in result.notes
    assert result.passes == {}
    assert result.path.read_bytes() == shaped("portable").path.read_bytes()


def test_a_pass_that_changes_results_is_found_out(tmp_path, monkeypatch):
    def wrong(model):
        gelu = next(node for node in model.graph if node.op_type == "Gelu")
        gelu.op_type = "Relu"
        gelu.attributes.clear()
        return 1

    monkeypatch.setitem(PASSES, "attention3d", wrong)
    result = export(encoder(), tmp_path / "m.onnx", target="cpu", **arguments())
    (given_up,) = [note for note in result.notes if "given up" in note]
    assert "differs from the module" in given_up
    assert operations(result.path)["Gelu"] == 1 and "Relu" not in operations(result.path)


def test_a_carried_fold_that_is_worse_is_not_taken(monkeypatch):
    errors = iter([1e-6, 5e-6])
    monkeypatch.setattr(biases, "_error", lambda *_: next(errors))
    monkeypatch.setattr(biases, "fold", lambda *_, **__: ("carried", "report"))
    chosen, why = biases.carry_biases(None, ("plain", "report"), None, copy_shared=True)
    assert chosen[0] == "plain" and "would cost digits (error 5.0e-06" in why


@pytest.mark.parametrize(
    ("plain", "carried", "taken"),
    [(1e-6, 4e-6, True), (1e-8, 9e-7, True), (1e-8, 2e-6, False), (1e-6, float("nan"), False)],
)
def test_how_much_worse_is_still_taken(monkeypatch, plain, carried, taken):
    errors = iter([plain, carried])
    monkeypatch.setattr(biases, "_error", lambda *_: next(errors))
    monkeypatch.setattr(biases, "fold", lambda *_, **__: ("carried", "report"))
    assert (biases.carry_biases(None, ("plain", "report"), None, copy_shared=True)[0][0] == "carried") is taken


def test_biases_that_fail_verification_stay(monkeypatch):
    def refuse(*_):
        raise VerificationError("not finite")

    monkeypatch.setattr(biases, "_error", refuse)
    monkeypatch.setattr(biases, "fold", lambda *_, **__: ("carried", "report"))
    chosen, why = biases.carry_biases(None, ("plain", "report"), None, copy_shared=True)
    assert chosen[0] == "plain" and why == "biases stay in their branches: not finite"


def test_unknown_targets_and_passes_are_refused(tmp_path):
    with pytest.raises(ExportError, match="target 'gpu' is not one of portable, cpu, cpu-single, cpu-long, cuda"):
        export(encoder(), tmp_path / "m.onnx", target="gpu", **arguments())
    with pytest.raises(ExportError, match="no graph pass 'gemm3d' to disable; there are carry_biases, attention3d"):
        export(encoder(), tmp_path / "m.onnx", disable_passes=["gemm3d"], **arguments())
    assert not list(tmp_path.iterdir())


def test_passes_of_targets_exist_and_keep_their_order():
    for target in TARGETS:
        assert [name for name in PASS_NAMES if name in passes_for(target)] == list(passes_for(target))
    assert passes_for("cpu-single", ["attention3d"]) == ("carry_biases", "single_token", "gemm2d")


def test_float16_weights_are_shaped_as_well(tmp_path):
    result = export(encoder(), tmp_path / "m.onnx", target="cpu-single", dtype="float16", **arguments())
    assert result.graph.dtype == "float16" and result.passes == {"attention3d": 1, "single_token": 0, "gemm2d": 5}


def test_the_command_line_says_which_passes_applied(tmp_path):
    save(encoder(), tmp_path / "m.pt", **arguments())
    command = ["export", str(tmp_path / "m.pt"), "--out", str(tmp_path / "m.onnx"), "--target", "cpu-single"]
    done = CliRunner().invoke(app, [*command, "--disable-pass", "attention3d", "--report", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert "graph passes for cpu-single: gemm2d ×5" in done.output and "biases travel" in done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["target"], report["passes"]) == ("cpu-single", {"single_token": 0, "gemm2d": 5})
    refused = CliRunner().invoke(app, [*command, "--disable-pass", "attention"])
    assert refused.exit_code == 1 and "no graph pass 'attention'" in refused.stderr
