"""The monitor: what it records against the formulas, when it warns, what it costs the training; and its picture."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfuse.nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    MaskedBatchNorm,
    ProgressiveNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    monitor,
)
from normfuse.plotting import plot_statistics, read_statistics
from tests.norms import with_statistics

C = 6
NORMS = with_statistics(C, static=True, channel_dim=-1, warmup_iters=2, window_size=2)
del NORMS["MaskedBatchNorm(ghost_size=…)"]  # whose steps are ghost batches
SKIPPING = ("UnifiedNorm", "PowerNorm(group_num=None)")


@pytest.fixture(params=NORMS)
def make(request):
    return NORMS[request.param]


@pytest.fixture(params=SKIPPING)
def make_skipping(request):
    return NORMS[request.param]


def network(make, **options):
    return nn.Sequential(nn.Linear(4, C), make(**options), nn.Linear(C, C), make(**options))


def train(model, steps=7, scale=1.0):
    for _ in range(steps):
        model((scale * torch.randn(9, 4)).requires_grad_()).square().sum().backward()


def test_records_are_the_numbers_of_the_step(make):
    model = network(make)
    watch = monitor(model, every=3)
    expected = []
    for step in range(1, 8):
        x = torch.randn(9, 4)
        norm = model[1]
        if step in (1, 4, 7):
            running = norm.running_var if hasattr(norm, "running_var") else norm.running_phi
            q = (model[0](x).detach() - getattr(norm, "running_mean", 0)).square().mean(0)
            ratio = (q + norm.eps) / (running + norm.eps)
            if hasattr(norm, "running_mean"):
                rms = float("nan")
            else:
                rms = (norm.ema_gz if hasattr(norm, "ema_gz") else norm.buffer_gz.mean(0)).square().mean().sqrt()
            expected.append(
                [step, q.mean(), running.mean(), ratio.log().mean().exp(), ratio.min(), ratio.max(), 0, rms, True]
            )
        model(x).square().sum().backward()
    layers = watch.to_json()["layers"]
    assert list(layers) == ["1", "3"]
    columns = [[float(v) for v in column] for column in zip(*expected, strict=True)]
    for (field, values), column in zip(layers["1"].items(), columns, strict=True):
        values = [float("nan") if value is None else value for value in values]
        assert values == pytest.approx(column, rel=1e-6, nan_ok=True), field
    assert layers["3"]["step"] == [1, 4, 7]


MODULES = {
    "RegularizedBatchNorm": lambda: RegularizedBatchNorm(C),
    "RepBatchNorm": lambda: RepBatchNorm(C),
    "static": lambda: ProgressiveNorm(nn.LayerNorm(C), RepBatchNorm(C), end=5),
    "batch_norm": lambda: BatchChannelNorm(C, 2, estimated=True),
    "norms.1": lambda: DomainSplitNorm(MaskedBatchNorm(C)),
}


@pytest.mark.parametrize("name", MODULES)
def test_norms_inside_of_others_are_watched(name):
    norm = MODULES[name]()
    watch = monitor(norm, every=1)
    x = torch.randn(12, C)
    norm(x)
    seen = x[6:] if name == "norms.1" else x
    series = watch.to_json()["layers"][name]
    assert series["batch"] == pytest.approx([seen.square().mean().item()], rel=1e-5)
    assert series["gradient"] == [None] and series["finite"] == [True]


def test_a_mean_that_moves_away_is_a_drift():
    norm = MaskedBatchNorm(C)
    watch = monitor(norm, every=1, drift=20.0)
    for _ in range(30):
        norm(torch.randn(64, C))
    with pytest.warns(RuntimeWarning, match="MaskedBatchNorm: in step 31 the batch's statistic is"):
        norm(10 + torch.randn(64, C))
        watch.to_json()


def test_watching_changes_no_bit(make):
    plain = network(make)
    watched = copy.deepcopy(plain)
    with monitor(watched, every=1) as watch:
        torch.manual_seed(1)
        train(plain)
        torch.manual_seed(1)
        train(watched)
    assert all(torch.equal(v, watched.state_dict()[name]) for name, v in plain.state_dict().items())
    train(watched, 2)
    assert len(watch.to_json()["layers"]["1"]["step"]) == 7, "recorded after close"


def test_evaluation_and_recomputation_are_not_recorded(make):
    model = network(make)
    watch = monitor(model, every=1)
    checkpoint(model, torch.randn(9, 4).requires_grad_(), use_reentrant=False).sum().backward()
    model.eval()(torch.randn(9, 4))
    assert watch.to_json()["layers"]["1"]["step"] == [1]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("UnifiedNorm", "inductor", marks=pytest.mark.slow),
        *((name, "aot_eager") for name in ("PowerNorm(group_num=None)", "MaskedBatchNorm", "MovingAverageBatchNorm")),
    ],
)
def test_a_compiled_model_is_watched_like_any_other(name, backend):
    torch.compiler.reset()
    eager = network(NORMS[name])
    inside = copy.deepcopy(eager)
    watches = monitor(eager, every=2), monitor(inside, every=2)
    compiled = torch.compile(inside, fullgraph=True, backend=backend)
    for step in range(7):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            for model in (eager, compiled):
                torch.manual_seed(step)
                train(model, 1)
    expected, actual = (watch.to_json()["layers"] for watch in watches)
    assert expected["1"]["step"] == [1, 3, 5, 7]
    for name, series in expected.items():
        for field, values in series.items():
            if field != "gradient" or values[0] is not None:
                assert actual[name][field] == pytest.approx(values, rel=1e-4), (name, field)
    watches[1].close()
    train(compiled, 2)
    assert watches[1].to_json()["layers"]["1"]["step"] == [1, 3, 5, 7], "recorded after close"


def test_a_drift_is_told_once_per_layer(make):
    model = network(make)
    watch = monitor(model, every=1, drift=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 1, scale=0.01)  # running statistics start at 1: the first steps say nothing
        train(model, 20)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, 3, scale=100.0)
        watch.to_json()
    told = [str(w.message) for w in caught]
    assert sum("times the running one (bound: 20)" in t and t.startswith("1: in step 22") for t in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 3, scale=1000.0)


def test_what_is_not_finite_is_told_and_stored(make_skipping, tmp_path):
    model = network(make_skipping, skip_nonfinite=True)
    watch = monitor(model, every=1)
    train(model, 2)
    with pytest.warns(RuntimeWarning, match="1: a statistic of step 3 is not finite"):
        train(model, 2, scale=float("nan"))
    watch.save(tmp_path / "stats.json")
    series = json.loads((tmp_path / "stats.json").read_text())["layers"]["1"]
    assert series["finite"] == [True, True, False, False] and series["batch"][2] is None
    assert series["step"] == [1, 2, 3, 3] and series["skips"] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "every=0 is not allowed"), ({"drift": 1.0}, r"drift=1\.0 is not allowed")],
)
def test_refusals(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor(make(), **arguments)
    with pytest.raises(ValueError, match="class Linear has no norm with running statistics to watch"):
        monitor(nn.Linear(2, 2))


def test_the_picture(tmp_path):
    """Of all norms a row in one picture; drawing is what takes time."""
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    image = pytest.importorskip("matplotlib.image")
    model = nn.ModuleDict({name.partition("(")[0]: make() for name, make in NORMS.items()})
    empty = plot_statistics(monitor(nn.ModuleList(list(model.values())[:1]), every=2).to_json(), tmp_path / "empty.png")
    watch = monitor(model, every=2)
    for norm in model.values():
        for _ in range(7):
            norm(torch.randn(9, C).requires_grad_()).square().sum().backward()
    watch.save(tmp_path / "stats.json")
    drawn = plot_statistics(tmp_path / "stats.json", tmp_path / "stats.png")
    assert drawn == tmp_path / "stats.png"
    before, after = image.imread(empty), image.imread(drawn)
    assert before.shape[1] == after.shape[1] > 500
    coloured = after[..., :3].max(-1) - after[..., :3].min(-1) > 0.3
    for name, row in zip(model, np.array_split(coloured, len(model)), strict=True):
        assert row.sum() > 250, f"no curve of {name} in the picture"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "holds no statistics of norms; write one with"),
        (b'{"format": "normfuse-statistics", "version": 2}', "has version 2; this normfuse reads version 1"),
        (b'{"format": "normfuse-statistics", "version": 1, "layers": {}}', "holds no layers"),
        (b'{"format": "normfuse-statistics", "version": 1, "layers": {"a": {"step": [1]}}}', "layer 'a' is incomplete"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "stats.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_statistics(path)
    assert "\n" not in str(error.value)
