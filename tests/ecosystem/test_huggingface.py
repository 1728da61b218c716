"""Directories of transformers: what they are taken to be, and that their files give what transformers gives."""

import json
import sys

import onnxruntime
import pytest
import torch
from directories import MODELS, agrees, build, difference, is_decoder
from safetensors.torch import load_file
from typer.testing import CliRunner

import normfuse
import normfuse.onnx
from normfuse.checkpoint import CheckpointError
from normfuse.cli import app

transformers = pytest.importorskip(
    "transformers", reason="not installed: pip install --no-deps -r requirements/ecosystem.txt"
)
from normfuse.sources import huggingface, past, signatures  # noqa: E402 (after the library they need)

TEXT = {"input_ids": "bs", "attention_mask": "bs"}
TYPED = TEXT | {"token_type_ids": "bs"}
PICTURE = {"pixel_values": "b"}
CHOICES = dict.fromkeys(TYPED, "bcs")
DECODER = TEXT | {"position_ids": "bs"}
# In the order and under the names that optimum gives them; b, s: batch_size, sequence_length.
SIGNATURES = {
    "BERT": TYPED, "BERT, classifier": TYPED, "BERT, masked words": TYPED, "BERT, choices": CHOICES, "ALBERT": TYPED,
    "RoBERTa": TEXT, "DistilBERT": TEXT, "MPNet": TEXT, "DeBERTa": TEXT, "DeBERTa v2": TEXT, "ModernBERT": TEXT,
    "ViT": PICTURE, "ViT, classifier": PICTURE, "DeiT": PICTURE, "DINOv2": PICTURE, "Swin": PICTURE, "BEiT": PICTURE,
    "CLIP": {"input_ids": "ts", "pixel_values": "i", "attention_mask": "ts"},
    "CLIP, text": {"input_ids": "bs"}, "CLIP, vision": PICTURE,
    "SigLIP": {"input_ids": "ts", "pixel_values": "i"}, "SigLIP, text": {"input_ids": "bs"}, "SigLIP, vision": PICTURE,
    "Whisper, encoder": {"input_features": "b"},
    "Whisper": {"input_features": "b", "decoder_input_ids": "bd"},
    "T5, encoder": TEXT, "T5": {"input_ids": "be", "attention_mask": "be", "decoder_input_ids": "bd"},
    "GPT-2": DECODER, "OPT": DECODER, "GPT-NeoX": DECODER, "Llama": DECODER, "Mistral": DECODER, "Qwen3": DECODER,
    "Gemma 2": TEXT, "Phi": DECODER,
}  # fmt: skip
LETTERS = {"b": "batch_size", "s": "sequence_length", "t": "text_batch_size", "i": "image_batch_size",
           "d": "decoder_sequence_length", "e": "encoder_sequence_length", "c": "num_choices"}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model of the table and returns its directory."""

    def save(name, **options):
        build(name).save_pretrained(tmp_path / "model", **options)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("name", MODELS)
def test_inputs_have_the_names_and_dimensions_that_optimum_gives_them(name):
    model = build(name)
    found = signatures.signature_of(model, {})
    assert {n: [getattr(dim, "name", dim) for dim in dims.values()] for n, dims in found.dims.items()} == {
        n: [LETTERS[letter] for letter in axes] for n, axes in SIGNATURES[name].items()
    }
    with torch.no_grad():
        model(**found.examples)
    if is_decoder(name):
        whole, called = past.with_past(model, found)
        layers = [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
        shown = [whole.session_names.get(n, n) for n in whole.names]
        assert shown == [*SIGNATURES[name], *layers]
        with torch.no_grad():
            outputs = called(**whole.examples)
        assert [whole.session_names.get(n, n) for n in outputs] == [
            "logits", *(n.replace("past_key_values", "present") for n in layers)]  # fmt: skip


@pytest.mark.parametrize("name", ["BERT", "CLIP", "Whisper, encoder"])
def test_files_give_what_transformers_gives(saved, tmp_path, name):
    result = normfuse.onnx.export(normfuse.load(saved(name)), tmp_path / "m.onnx")
    assert difference(build(name), onnxruntime.InferenceSession(result.path)) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "model"]


@pytest.mark.parametrize("name", ["GPT-2", "Mistral"])
def test_one_file_with_a_past_generates_what_transformers_generates(saved, tmp_path, name):
    result = normfuse.onnx.export(normfuse.load(saved(name), with_past=True), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(result.path)
    shapes = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["past_key_values.0.key"][2] == "past_sequence_length"
    assert shapes["attention_mask"][1] == shapes["present.0.key"][2] == "past_sequence_length + sequence_length"
    assert agrees(build(name), session)


def test_the_command_needs_nothing_but_a_name_for_the_file(saved, tmp_path):
    done = CliRunner().invoke(app, ["export", str(saved("RoBERTa")), "--out", str(tmp_path / "m.onnx"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["cases"]


def test_a_model_goes_straight_into_export(tmp_path):
    model = build("DistilBERT").train()
    forward = model.forward
    result = normfuse.onnx.export(model, tmp_path / "m.onnx")
    assert model.training and model.forward == forward and "forward" not in vars(model)
    assert difference(model.eval(), onnxruntime.InferenceSession(result.path)) < 1e-5


def test_outputs_are_those_that_optimum_gives_or_those_that_are_named(saved):
    folder = saved("BERT")
    loaded = normfuse.load(folder)
    assert list(loaded.outputs) == ["last_hidden_state"]
    assert any("left out as optimum does: pooler_output" in note for note in loaded.notes)
    assert list(normfuse.load(folder, outputs=["pooler_output"]).outputs) == ["pooler_output"]
    with pytest.raises(
        CheckpointError, match=r"no output 'pooled'; BertModel returns last_hidden_state, pooler_output"
    ):
        normfuse.load(folder, outputs=["pooled"])


def test_learned_positions_bound_past_and_tokens_together(saved):
    loaded = normfuse.load(saved("GPT-2"), with_past=True)
    bounds = {str(dim) for spec in loaded.inputs for dim in spec.dims}
    assert {"sequence_length<=64", "0<=past_sequence_length<=63"} <= bounds
    assert any("past_sequence_length + sequence_length <= 64" in note for note in loaded.notes)


# Weights


def test_shards_and_pickled_weights(saved, tmp_path):
    whole = huggingface.load_model(saved("BERT")).state_dict()
    build("BERT").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    (tmp_path / "bin").mkdir()
    (tmp_path / "model" / "config.json").rename(tmp_path / "bin" / "config.json")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for kind in ("shards", "bin"):
        read = huggingface.load_model(tmp_path / kind).state_dict()
        assert all(torch.equal(read[name], value) for name, value in whole.items()), kind


def test_weights_that_hold_code_are_not_run(saved, tmp_path):
    from checkpoints import Canary

    folder = saved("BERT")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Canary(tmp_path / "canary")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        normfuse.load(folder)
    assert not (tmp_path / "canary").exists()


# Heads


def test_a_task_chooses_the_head_if_it_was_trained(saved):
    folder = saved("BERT, masked words")
    model = huggingface.load_model(folder, task="feature-extraction")
    assert type(model).__name__ == "BertModel" and model.pooler is None, "there is no trained pooler"
    assert type(huggingface.load_model(folder)).__name__ == "BertForMaskedLM"
    with pytest.raises(CheckpointError, match=r"saved as BertForMaskedLM and lacks .*classifier.*random.*--task"):
        normfuse.load(folder, task="text-classification")
    with pytest.raises(ValueError, match="task 'translation' is not one of audio-classification"):
        normfuse.load(folder, task="translation")
    with pytest.raises(CheckpointError, match=r"not a decoder that predicts tokens.*--with-past"):
        normfuse.load(folder, with_past=True)


def test_tasks_are_classes_of_the_library():
    assert all(hasattr(transformers, name) for name in huggingface.TASKS.values())


# Sizes


def test_inputs_bound_what_the_configuration_leaves_open(saved):
    loaded = normfuse.load(saved("RoBERTa"), inputs=["input_ids:int64[1,n<=32]", "attention_mask:int64[1,n<=32]"])
    assert [str(spec) for spec in loaded.inputs] == ["input_ids:int64[1,n<=32]", "attention_mask:int64[1,n<=32]"]
    with pytest.raises(CheckpointError, match="input 'ids': the model takes input_ids, attention_mask"):
        normfuse.load(saved("RoBERTa"), inputs=["ids:int64[1,n]"])


@pytest.mark.parametrize(
    ("given", "size"),
    [(None, (224, 224)), (32, (32, 32)), ([16, 24], (16, 24)), ({"height": 8, "width": 12}, (8, 12)),
     ({"shortest_edge": 48}, (48, 48))],
)  # fmt: skip
def test_sizes_of_pictures(given, size):
    assert signatures._size(given) == size


def test_the_processor_says_what_the_configuration_does_not(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 48, "width": 64}}))
    found = signatures.signature_of(model, huggingface._processor(tmp_path))
    assert found.examples["pixel_values"].shape == (2, 3, 48, 64)


# Refusals


def changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value}))


def test_code_of_a_directory_runs_only_if_it_is_trusted(saved, tmp_path, monkeypatch):
    folder = saved("BERT")
    changed_config(folder, architectures=["OwnModel"], auto_map={"AutoModel": "modeling_own.OwnModel"})
    (folder / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w').close()\nfrom transformers import BertModel\n"
        "class OwnModel(BertModel): pass\n"
    )
    with pytest.raises(CheckpointError, match=r"Python code that it brings along \(modeling_own\.OwnModel\)") as caught:
        normfuse.load(folder)
    assert caught.value.advice == ("--trust",) and not (tmp_path / "canary").exists()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    assert type(huggingface.load_model(folder, trust=True)).__name__ == "OwnModel"
    assert (tmp_path / "canary").exists()


def test_directories_that_are_refused(saved, tmp_path):
    folder = saved("BERT")
    changed_config(folder, architectures=["FutureModel"])
    with pytest.raises(CheckpointError, match=r"saved as FutureModel, which transformers .* lacks"):
        normfuse.load(folder)
    changed_config(folder, architectures=["BertModel"], hidden_size=48)
    with pytest.raises(CheckpointError, match=r"transformers cannot load it|lacks"):
        normfuse.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        normfuse.load(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*merge_and_unload"):
        normfuse.load(folder)
    with pytest.raises(CheckpointError, match="is not a folder of transformers"):
        normfuse.load(tmp_path, with_past=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000, for which there are too few weights"),
        ({"num_labels": 10**9}, "num_labels=1000000000, for which there are too few weights"),
        ({"num_hidden_layers": 20_000}, "far larger than its weights|too few weights"),
        ({"vocab_size": 10**10}, "far larger than its weights"),
    ],
)
def test_a_configuration_builds_nothing_that_is_far_larger_than_the_weights(saved, change, message):
    folder = saved("BERT")
    changed_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        normfuse.load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_json_that_is_nested_too_deeply_is_refused(saved, file):
    folder = saved("BERT")
    (folder / file).write_text('{"a":' * 50_000)
    with pytest.raises(CheckpointError, match=f"{file} cannot be read"):
        normfuse.load(folder)


def test_mixtures_of_experts_come_out_and_stay_as_they_were():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MODELS["Llama"][2] | sizes)).eval()
    before = model.get_experts_implementation()
    exported = huggingface.exportable(model)
    assert model.get_experts_implementation() == before == {"": "grouped_mm"}
    targets = {str(node.target) for node in exported.program.graph.nodes if node.op == "call_function"}
    assert not any(target.startswith("transformers") for target in targets)


def test_mixtures_of_experts_inside_of_other_modules():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.MixtralConfig(**MODELS["Llama"][2] | sizes, use_cache=False)
            self.encoder, self.head = transformers.MixtralModel(config), torch.nn.Linear(32, 3)

        def forward(self, ids):
            return self.head(self.encoder(ids).last_hidden_state.mean(1))

    model, ids = Classifier().eval(), torch.randint(99, (2, 5))
    with torch.no_grad():
        expected = model(ids)
    exported = normfuse.ExportableModel.from_model(model, (ids,), ({0: "batch"},))
    assert model.encoder.get_experts_implementation() == {"": "grouped_mm"}
    assert "grouped_mm" not in str(exported.program.graph)
    torch.testing.assert_close(exported.run([ids])[0], expected)


def test_weights_that_the_model_does_not_have_are_named(saved):
    folder = saved("BERT")
    changed_config(folder, num_hidden_layers=1)
    (note,) = [note for note in normfuse.load(folder).notes if note.startswith("not used")]
    assert "16 tensor(s)" in note and "encoder.layer.1." in note


def test_what_cannot_be_guessed_is_said():
    model = type("Odd", (transformers.BertModel,), {"main_input_name": "odd"})(
        transformers.BertConfig(**MODELS["BERT"][2])
    )
    with pytest.raises(CheckpointError, match="what Odd takes is not known here: give its inputs, such as --input"):
        huggingface.exportable(model)


def test_inputs_that_cannot_be_guessed_can_be_given(tmp_path):
    sizes = {
        "num_input_channels": 2,
        "context_length": 16,
        "patch_length": 4,
        "patch_stride": 4,
        "prediction_length": 4,
    }
    small = {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 32}
    model = transformers.PatchTSTForPrediction(transformers.PatchTSTConfig(**sizes, **small)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"--input past_values:float32.*takes past_values, past_observed_mask"):
        normfuse.load(tmp_path)
    exported = normfuse.load(tmp_path, inputs=["past_values:float32[batch,16,2]"])
    (x,) = exported.example_inputs
    torch.testing.assert_close(exported.run([x])[0], model(past_values=x).prediction_outputs)


def test_a_missing_library_is_said(saved, monkeypatch):
    folder = saved("BERT")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r'pip install "normfuse\[hf\]"'):
        normfuse.load(folder)
