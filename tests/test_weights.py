"""Files as training scripts save them, read into a plain module."""

import argparse
import copy
import json
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoints import Canary
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from normfuse.checkpoint import CheckpointError, archive, load, pickled, sharded, weights


class Net(nn.Module):
    """x [batch, 4]; a norm with statistics, a head tied to an embedding, buffers that no file needs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("position_ids", torch.arange(4))

    def forward(self, x):
        return self.head(self.block(self.norm(x)))


@pytest.fixture
def state():
    torch.manual_seed(1)
    return {
        name: torch.rand_like(t) + 0.5 if t.is_floating_point() else t for name, t in Net().state_dict().items()
    } | {
        "head.weight": (table := torch.randn(5, 4)),
        "table.weight": table,
    }


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def changed(state, factor=2):
    return {name: value * factor for name, value in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 4)}}, "param_groups": [{"lr": 0.1}]}

FORMS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": OPTIMIZER, "epoch": 3},
    "timm": lambda s: {"epoch": 1, "arch": "net", "state_dict": s, "optimizer": OPTIMIZER, "metric": 0.5, "version": 2},
    "torchvision": lambda s: {"model": s, "optimizer": OPTIMIZER, "lr_scheduler": {"last_epoch": 3}, "scaler": {}},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}, "loops": {},
                            "pytorch-lightning_version": "2.6", "optimizer_states": [OPTIMIZER]},
    "Lightning with losses": lambda s: {"state_dict": prefixed(s, "net.") | {"criterion.weight": torch.ones(3)}},
    "Lightning, compiled": lambda s: {"state_dict": prefixed(s, "model._orig_mod.")},
    "Lightning, another attribute": lambda s: {"state_dict": prefixed(s, "classifier.")},
    "DataParallel": lambda s: prefixed(s, "module."),
    "DDP of a compiled module": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "compiled parts": lambda s: {n.replace("block.", "block._orig_mod."): v for n, v in s.items()},
    "FSDP": lambda s: {"model": {n.replace("block.", "block._fsdp_wrapped_module."): v for n, v in s.items()}},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **prefixed(s, "module.")},
    "EMA alone": lambda s: {"model_ema": s},
    "BasicSR": lambda s: {"params_ema": s},
    "fairseq": lambda s: {"model": prefixed(s, "encoder."), "extra_state": {"epoch": 1}, "last_optimizer_state": None},
    "mmcv": lambda s: {"meta": {"epoch": 3, "config": "model = dict()"}, "state_dict": s, "optimizer": OPTIMIZER},
    "DeepSpeed": lambda s: {"module": s, "ds_config": {"zero": 0}, "optimizer": None},
    "arrays of NumPy": lambda s: {"model": {n: v.numpy() for n, v in s.items()}, "history": {"loss": np.ones(3)}},
    "nested": lambda s: {"checkpoint": {"network": {"weights": s}}},
    "GAN": lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(3, 3)}},
    "thop": lambda s: s | {"total_ops": torch.zeros(1), "block.0.total_params": torch.zeros(1)},
    "without counters": lambda s: {n: v for n, v in s.items() if n not in ("norm.num_batches_tracked", "position_ids")},
    "with extra state": lambda s: s | {"norm._extra_state": None, "rotary.inv_freq": torch.ones(2)},
    "without the tied head": lambda s: {n: v for n, v in s.items() if n != "head.weight"},
    "with another tied head": lambda s: s | {"decoder.weight": s["table.weight"].clone()},
    "with a causal mask": lambda s: s | {"attn.bias": torch.ones(1, 1, 4, 4).tril(), "a.masked_bias": torch.ones(())},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, state, form):
    torch.save(FORMS[form](state), tmp_path / "c.pt")
    content = archive.read(tmp_path / "c.pt", archive.file_kind(tmp_path / "c.pt"), trust=False)
    module = Net()
    taken, notes = weights.take(content, module, "c.pt")
    missing, unexpected = module.load_state_dict(taken, strict=False)
    assert not unexpected and not weights.missing_from(taken, module), (missing, unexpected)
    for name, value in state.items():
        if name in taken:
            assert torch.equal(module.state_dict()[name], value), name
    assert torch.equal(module.head.weight, state["table.weight"])
    plain = form in ("bare", "thop", "compiled parts") or form.startswith("with")
    assert bool(notes) != plain, notes


def test_the_part_of_a_module_that_everything_is_in(state):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

    taken, _ = weights.take(state, Around(), "c.pt")
    assert taken.keys() == prefixed(state, "net.").keys()


# Two groups of weights


@pytest.mark.parametrize(
    ("content", "default", "other"),
    [
        (lambda s: {"state_dict_ema": changed(s), "state_dict": s}, "state_dict", "state_dict_ema"),
        (lambda s: {"model_ema": changed(s), "model": s}, "model", "model_ema"),
        (lambda s: {"ema": changed(s), "model": s}, "model", "ema"),
        (lambda s: {"teacher": changed(s), "student": s}, "student", "teacher"),
        (lambda s: {"params": s, "params_ema": changed(s)}, "params", "params_ema"),
        (lambda s: {"state_dict": prefixed(changed(s), "ema_model.") | prefixed(s, "model.")}, "model", "ema_model"),
    ],
)
def test_weights_come_before_their_average_unless_it_is_asked_for(state, content, default, other):
    content = content(state)
    taken, notes = weights.take(content, Net(), "c.pt")
    assert torch.equal(taken["table.weight"], state["table.weight"])
    assert any(f"--weights {other}" in note or f".{other} takes" in note for note in notes), notes
    for wanted, factor in ((default, 1), (other, 2)):
        taken, _ = weights.take(content, Net(), "c.pt", wanted)
        assert torch.equal(taken["table.weight"], factor * state["table.weight"])


def test_equally_likely_groups_must_be_chosen(state):
    content = {"first": state, "second": changed(state)}
    with pytest.raises(CheckpointError, match="2 groups of weights that fit Net: 'first', 'second'; choose") as caught:
        weights.take(content, Net(), "c.pt")
    assert caught.value.advice == ("--weights first",)
    taken, _ = weights.take(content, Net(), "c.pt", "second")
    assert torch.equal(taken["table.weight"], 2 * state["table.weight"])
    with pytest.raises(CheckpointError, match="holds no weights 'third'; it has 'first', 'second'"):
        weights.take(content, Net(), "c.pt", "third")


def test_a_small_file_cannot_make_the_search_long(state):
    """A mapping that stands in very many places, one that holds itself, and very many names that end alike."""
    places: dict = state
    for _ in range(3):
        places = dict.fromkeys((f"k{i}" for i in range(200)), places)
    circle = {"state_dict": state}
    circle["again"] = circle
    parts = state | {f"layer{i}.{name}": value for i in range(1000) for name, value in state.items()}
    for content in (places, circle, parts):
        taken, _ = weights.take(content, Net(), "c.pt")
        assert taken["table.weight"] is state["table.weight"]


def test_an_optimizer_that_keeps_names_is_no_group_of_weights(state):
    taken, notes = weights.take({"net": state, "optimizer": {"exp_avg": changed(state)}}, Net(), "c.pt")
    assert torch.equal(taken["table.weight"], state["table.weight"])
    assert not any("also holds" in note for note in notes)


# What does not fit is not taken


def test_what_a_module_needs_or_does_not_know_is_said(state):
    def missing(content):
        return weights.missing_from(weights.take(content, Net(), "c.pt")[0], Net())

    without = {name: value for name, value in state.items() if name != "norm.running_var"}
    assert missing(without) == missing({"model": prefixed(without, "module.")}) == ["norm.running_var"]
    taken, _ = weights.take(state | {"extra.weight": torch.ones(2)}, Net(), "c.pt")
    assert "extra.weight" in taken, "loading will say that it is unknown"
    taken, _ = weights.take({"model": prefixed(state, "module.") | {"module.extra": torch.ones(2)}}, Net(), "c.pt")
    assert "extra" in taken
    assert missing({name: value for name, value in state.items() if "table" not in name and "head" not in name})


def test_tied_tensors_that_differ_are_refused(state):
    with pytest.raises(CheckpointError, match=r"one tensor in Net and two different ones in the file"):
        weights.take(state | {"head.weight": torch.zeros(5, 4)}, Net(), "c.pt")


def test_files_without_tensors():
    with pytest.raises(CheckpointError, match="not a state_dict: it holds epoch, args"):
        weights.take({"epoch": 1, "args": {"lr": 0.1}}, Net(), "c.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state_dict"):
        weights.take([torch.ones(2)], Net(), "c.pt")


# Objects in the file


def test_a_namespace_is_named_and_the_line_that_is_advised_works(tmp_path, state):
    torch.save({"args": argparse.Namespace(lr=0.1), "model": state}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace") as caught:
        archive.read(tmp_path / "c.pt", "torch", trust=False)
    line = pickled.way_out(tmp_path / "c.pt")
    assert line in str(caught.value) and "['model']" in line
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    assert torch.load(tmp_path / "c.weights.pt", weights_only=True).keys() == state.keys()


def test_paths_and_what_numpy_holds_are_data(tmp_path, state):
    record = {
        "model": state,
        "best": np.float64(0.9),
        "epoch": np.int64(3),
        "data": tmp_path,
        "history": np.arange(4.0),
    }
    torch.save(record, tmp_path / "c.pt")
    assert load(tmp_path / "c.pt", model=Net, inputs=INPUTS).notes
    torch.save(record | {"x": np.array([Canary(tmp_path / "canary")], dtype=object)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"holds pickled objects .posix.system."):
        load(tmp_path / "c.pt", model=Net, inputs=INPUTS)
    assert not (tmp_path / "canary").exists()


def test_disassembling_runs_nothing(tmp_path, state):
    torch.save({"state_dict": state, "x": Canary(tmp_path / "canary")}, tmp_path / "c.pt")
    assert "['state_dict']" in pickled.way_out(tmp_path / "c.pt")
    torch.save(Net(), tmp_path / "whole.pt")
    assert pickled.way_out(tmp_path / "whole.pt").count(".state_dict()") == 1
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    assert "weights_only=False)," in pickled.way_out(tmp_path / "broken.pt")
    assert not (tmp_path / "canary").exists()


def test_a_module_among_other_objects():
    net = Net()
    assert weights.module_in(net) is net
    assert weights.module_in({"ema": Net(), "model": net, "epoch": 3}) is net
    assert weights.module_in({"epoch": 3}) is None


# Folders and shards


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, state, kind):
    stem = "model" if kind == "safetensors" else "pytorch_model"
    state = {name: value.clone() for name, value in state.items()}
    names = {name: f"{stem}-{1 + number % 2:05}-of-00002.{kind}" for number, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: state[name] for name in state if names[name] == file}
        save_file(part, tmp_path / file) if kind == "safetensors" else torch.save(part, tmp_path / file)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert sharded.weight_file(tmp_path) == index
    read = sharded.read_index(index, trust=False)
    assert all(torch.equal(read[name], value) for name, value in state.items())
    index.write_text(json.dumps({"weight_map": names | {"extra": next(iter(names.values()))}}))
    with pytest.raises(CheckpointError, match="holds 'extra'; it does not"):
        sharded.read_index(index, trust=False)
    for content, because in (
        ('{"weight_map": {"w": "../other.bin"}}', "only files beside the index are read"),
        ('{"weight_map": ["w"]}', "is not an index of weights"),
        ("{", "is not an index of weights"),
        ('{"weight_map": {"w": "absent.bin"}}', "cannot read"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=because):
            sharded.read_index(index, trust=False)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"in parts; join them: python -m .* dcp_to_torch"):
        sharded.weight_file(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: none of model\.safetensors.*name the file"):
        sharded.weight_file(tmp_path)


def test_the_only_weights_of_a_folder_are_taken_whatever_their_name(tmp_path, state):
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "rng_state.pth", "training_args.bin"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    (tmp_path / "hparams.yaml").write_text("lr: 0.1")
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "epoch=3.ckpt")
    loaded = load(tmp_path, model=Net, inputs=INPUTS)
    assert torch.equal(loaded.program.state_dict["head.weight"], state["head.weight"])
    assert "epoch=3.ckpt" in loaded.notes[0]
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"holds epoch=3\.ckpt, last\.ckpt; name the file"):
        load(tmp_path, model=Net, inputs=INPUTS)


# Through load


INPUTS = ["x:float32[batch,4]"]


def test_loading_takes_what_is_found_and_says_so(tmp_path, state):
    torch.save({"state_dict": state, "state_dict_ema": changed(state), "epoch": 3}, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", model=Net, inputs=INPUTS)
    assert "weights taken from 'state_dict'" in loaded.notes[0] and "--weights state_dict_ema" in loaded.notes[1]
    average = load(tmp_path / "c.pt", model=Net, inputs=INPUTS, weights="state_dict_ema")
    module = Net().eval()
    for checkpoint, tensors in ((loaded, state), (average, changed(state))):
        module.load_state_dict(tensors)
        torch.testing.assert_close(checkpoint.expected_outputs[0], module(checkpoint.example_inputs[0]).detach())


def test_half_weights_with_single_inputs_are_computed_in_single(tmp_path, state):
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save(half, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", model=Net, inputs=INPUTS)
    module = Net().eval()
    module.load_state_dict(half)  # into float32
    assert torch.equal(loaded.expected_outputs[0], module(loaded.example_inputs[0]))


def test_folders_are_loaded(tmp_path, state):
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(tmp_path, model=Net, inputs=INPUTS).program.state_dict["head.weight"], state["head.weight"])


def test_a_trusted_file_may_hold_its_module_among_others(tmp_path):
    torch.save({"model": Net(), "epoch": 3}, tmp_path / "c.pt")
    for model in (None, Net):
        assert load(tmp_path / "c.pt", model=model, inputs=INPUTS, trust=True).outputs == ("output",)
    with pytest.raises(CheckpointError, match="holds pickled objects"):
        load(tmp_path / "c.pt", inputs=INPUTS)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, nn.Module.half, nn.Module.bfloat16])
def test_whole_modules_as_trainings_save_them(tmp_path, wrap):
    saved = Net()
    torch.save({"model": wrap(copy.deepcopy(saved)), "epoch": 3}, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", inputs=INPUTS, trust=True)
    assert loaded.inputs[0].dtype == torch.float32
    expected = saved.eval()(loaded.example_inputs[0])
    torch.testing.assert_close(loaded.expected_outputs[0], expected, rtol=0.1, atol=0.05)  # half the digits


def test_a_wrapped_module_takes_weights(tmp_path, state):
    torch.save(state, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", model=lambda: nn.DataParallel(Net()), inputs=INPUTS)
    assert torch.equal(loaded.program.state_dict["head.weight"], state["head.weight"])
    assert "looked through DataParallel" in loaded.notes


def test_what_does_not_fit_is_refused_by_name(tmp_path, state):
    for change, because in (
        ({"norm.running_var": None}, "1 tensor missing from the file .norm.running_var"),
        ({"extra.weight": torch.ones(2)}, "1 tensor unknown to the module .extra.weight"),
        ({"block.0.weight": torch.ones(3, 4)}, "size mismatch for block.0.weight"),
        ({"norm.weight": torch.ones(4).to_sparse()}, "sparse, quantised or expanded"),
        ({"norm.weight": torch.ones(1).expand(4)}, "sparse, quantised or expanded"),
    ):
        model = {name: value for name, value in (state | change).items() if value is not None}
        torch.save({"model": prefixed(model, "module.")}, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=because):
            load(tmp_path / "c.pt", model=Net, inputs=INPUTS)
