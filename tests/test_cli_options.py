"""Options of the command: what needs no torch, what every command has, what Python's functions have too."""

import inspect
import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from test_cli import ENVIRONMENT, run, save_perceptron

import normfuse
from normfuse import onnx, plotting
from normfuse.cli import options, running
from normfuse.onnx import graph_passes
from normfuse.options import PASS_NAMES

COMMANDS = ("export", "fold", "inspect", "verify", "bench", "plot")
# Of each command its status, what it prints, what is loaded then and what lies in the working directory.
RUN_EACH = """
import contextlib, io, json, os, sys
from normfuse.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "transformers"} & sys.modules.keys()
    print(json.dumps([status, out.getvalue(), err.getvalue(), sorted(heavy), os.listdir()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, its file, and that file's bare weights."""
    folder = tmp_path_factory.mktemp("options")
    torch.manual_seed(0)
    save_perceptron(folder / "m.pt")
    torch.save(tiny_models.Perceptron().state_dict(), folder / "bare.pt")
    done = run("export", folder / "m.pt", "--out", folder / "m.onnx", "--quiet")
    assert done.exit_code == 0 and done.stdout == done.stderr == ""
    return folder


# What needs no torch


QUICK = [
    (["--help"], 0, "Commands"),
    (["-h"], 0, "Commands"),
    (["--version"], 0, normfuse.__version__),
    *(([command, "-h"], 0, "--json") for command in COMMANDS),
    (["export", "m.pt", "--out", "m.onnx", "--target", "gpu"], 1, "target 'gpu' is not one of portable"),
    (["export", "m.pt", "--out", "m.onnx", "--disable-pass", "gemm"], 1, "no graph pass 'gemm'"),
    (["export", "m.pt", "--out", "absent/m.onnx"], 1, "there is no folder absent"),
    (["export", "m.pt", "--out", "m.onnx", "--report", "absent/r.json"], 1, "there is no folder absent"),
    (["export", "m.pt", "--out", "m.onnx", "--opset", "99"], 1, "opset 99 is outside 18 to 23"),
    (["export", "m.pt", "--out", "m.onnx", "--dtype", "int4"], 1, "dtype 'int4' is not one of"),
    (["fold", "m.onnx", "--out", "n.onnx", "--dtype", "int8"], 1, "folded in its own type"),
    (["export", "m.pt", "--out", "m.onnx", "--dtype", "bfloat16"], 1, "ONNX Runtime's CPU has no bfloat16"),
    (["export", "m.pt", "--out", "m.onnx", "--model-arg", "width"], 1, "'width' is not of the form name=value"),
    (["export", "absent.pt", "--out", "m.onnx"], 1, "cannot read absent.pt: No such file"),
    (["fold", "absent.onnx", "--out", "m.onnx"], 1, "cannot read absent.onnx: No such file"),
    (["fold", "m.pt", "--out", "m.onnx", "--max-scale-range", "0.5"], 1, "max_scale_range 0.5 is below 1"),
    (["export", "m.pt", "--out", "m.onnx", "--target", "gpu"], 1, "cuda, auto"),
    (["export", "m.pt", "--out", "m.onnx", "--threads", "2"], 1, "are for timing with target 'auto'"),
    (["export", "m.pt", "--out", "m.onnx", "--calibrate", "a.npz"], 1, "calibrate is for dtype 'int8'"),
    (["inspect", "m.pt", "--target", "gpu"], 1, "target 'gpu'"),
    (["inspect", "m.pt", "--target", "auto"], 1, "only export can choose one"),
    (["verify", "m.pt", "absent.onnx"], 1, "cannot read absent.onnx"),
    (["bench", "m.pt", "m.pt", "m.pt"], 1, "3 files given; one or two can be timed"),
    (["bench", "m.pt", "--size", "seq=many"], 1, "--size seq=many: give a whole number of at least 1"),
    (["bench", "m.pt", "--map", "seq"], 1, "'seq' is not of the form name=value"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What came of each command of QUICK, all in one process."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "m.pt").touch()
    commands = json.dumps([arguments for arguments, _, _ in QUICK])
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, commands], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("row", range(len(QUICK)), ids=lambda row: " ".join(QUICK[row][0]))
def test_help_and_refused_options_load_nothing(ended, row):
    _, status, said = QUICK[row]
    ended_with, out, err, loaded, files = ended[row]
    assert ended_with == status and said in out + err
    assert not loaded, "torch and its like were imported"
    assert status == 0 or err.count("\n") == 1, "a refusal is one line"
    assert files == ["m.pt"]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("export m.pt --target cpu-", ["cpu-single", "cpu-long"]),
        ("export m.pt --dtype ", ["float32", "float16", "int8"]),
        ("export m.pt --opset 2", ["23", "20"]),
        ("inspect m.pt --disable-pass g", ["gemm2d"]),
    ],
)
def test_values_are_completed(tmp_path, typed, completed):
    words = f"normfuse {typed}"
    environment = {
        "_NORMFUSE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from normfuse.cli import main; main()"],
        cwd=tmp_path, env=ENVIRONMENT | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == completed, done


# What every command has


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["export", "m.pt", "--out", "new.onnx"], {"path", "fold", "verification", "graph", "versions"}),
        (["fold", "m.onnx", "--out", "folded.onnx"], {"path", "fold", "verification", "graph", "source"}),
        (["inspect", "m.pt"], {"inputs", "fold", "notes"}),
        (["verify", "m.pt", "m.onnx", "--rounds", "1", "--map", "x=x"], {"worst", "rtol", "cases"}),
        (["bench", "m.onnx", "--rounds", "4"], {"paths", "shapes", "milliseconds"}),
    ],
)
def test_json_is_all_of_standard_output(folder, monkeypatch, arguments, keys):
    monkeypatch.chdir(folder)
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert keys <= json.loads(done.stdout).keys()
    assert "✓" in done.stderr, "progress goes to standard error"
    assert run(*arguments, "--json", "--quiet").stderr == ""


def test_quiet_leaves_asked_for_numbers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert run("verify", "m.pt", "m.onnx", "--quiet").output == ""
    for arguments in (["inspect", "m.pt"], ["bench", "m.onnx", "--rounds", "4"]):
        done = run(*arguments, "-q")
        assert done.exit_code == 0 and "✓" not in done.output and done.stdout


def test_a_report_and_json_say_the_same(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("export", "m.pt", "-o", "again.onnx", "--report", "r.json", "--json")
    assert json.loads(done.stdout) == json.loads((folder / "r.json").read_text())


def test_numbers_that_json_lacks_are_null():
    assert options.finite({"a": [float("inf"), float("nan"), 1.5, "inf"]}) == {"a": [None, None, 1.5, "inf"]}


# What Python's functions have too


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def shown(group):
    """The defaults that typer shows for a group of options."""

    def takes(group):
        pass

    takes.__annotations__ = {"group": group}
    return defaults(running.command(takes))


GROUPS = {
    onnx.export: (options.ModelFolding, options.Tolerance, options.ModelWriting),
    onnx.fold_model: (options.ModelFolding,),
    onnx.fold_file: (options.Folding, options.Inputs, options.Tolerance),
    normfuse.load: (options.Loading,),
}


@pytest.mark.parametrize("function", GROUPS, ids=lambda function: function.__name__)
def test_options_have_the_names_and_defaults_of_arguments(function):
    own = defaults(function)
    for group in GROUPS[function]:
        given = shown(group)
        for name in ("opset",) if group is options.ModelWriting else given:
            assert name in own, f"{function.__name__} lacks {name}"
            assert (given[name] or None) == (own[name] or None), name


def test_commands_have_the_defaults_of_their_functions():
    from normfuse.cli.bench import bench
    from normfuse.cli.models import verify
    from normfuse.cli.plot import plot

    for command, function in ((verify, onnx.verify), (bench, onnx.bench), (plot, plotting.plot_statistics)):
        own = defaults(function)
        for name, default in defaults(command).items():
            assert name not in own or (own[name] or None) == (default or None), name
    assert defaults(onnx.verify)["rtol"] is options.Tolerance().rtol
    assert defaults(onnx.write)["opset"] is defaults(onnx.export)["opset"] is None


def test_every_graph_pass_is_an_option():
    assert ("carry_biases", *graph_passes.PASSES) == PASS_NAMES


# Advice


def test_errors_that_advise_print_the_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run("export", "bare.pt", "--out", "b.onnx", "--target", "cpu")
    wanted = "run: normfuse export bare.pt --out b.onnx --target cpu --model package.module:factory"
    assert done.exit_code == 1 and done.stderr.rstrip().endswith(wanted)
    done = run("inspect", "bare.pt", "--model", "tiny_models:Perceptron")
    assert 'run: normfuse inspect bare.pt --model tiny_models:Perceptron --input "x:float32[batch,4]"' in done.stderr
