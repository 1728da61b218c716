import errno
import json
import os
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import tiny_models
import torch
from checkpoints import Canary
from onnx import numpy_helper
from torch.export import Dim
from typer.testing import CliRunner

from normfuse import cli, console, plotting
from normfuse.checkpoint import save
from normfuse.folding import FoldReport, NormRecord

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}


def normfuse(*arguments, cwd, timeout=120, **environment):
    """The command in a process of its own, with the tests' models importable."""
    return subprocess.run(
        [sys.executable, "-m", "normfuse", *map(str, arguments)],
        cwd=cwd,
        env={k: v for k, v in ENVIRONMENT.items() if k != "COLUMNS"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run(*arguments, cwd=".", **environment):
    """The command in this process, which starts faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=environment)


def refused(done) -> str:
    """The one line on stderr of a command that failed as it should, in either process."""
    assert (done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code) == 1, done
    assert done.stderr.startswith("normfuse: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def save_perceptron(path, **changes):
    model = tiny_models.trained(tiny_models.Perceptron())
    for name, value in changes.items():
        model.state_dict()[name].view(-1)[0] = value
    save(model, path, example_inputs=torch.ones(2, 4), dynamic_shapes={"x": {0: "batch"}})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    model = tiny_models.trained(tiny_models.Encoder(placement="post"))
    shapes = {"tokens": {0: Dim("batch"), 1: Dim("seq", max=16)}}
    save(model, folder / "model.pt", example_inputs=torch.randint(11, (1, 6)), dynamic_shapes=shapes)
    done = normfuse("export", "model.pt", "--out", "model.onnx", "--report", "report.json", cwd=folder)
    return folder, done


# What works


def test_export_prints_its_stages_and_a_table_and_writes_both_files(encoder):
    folder, done = encoder
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for text in ("load model.pt", "fold the norms", "verify in ONNX Runtime", "blocks.0.norms.0",
                 "UnifiedNorm", "3 of 3 norms folded", "0 norm nodes, 0 per-channel Mul/Add", "opset 2"):  # fmt: skip
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert sorted(os.listdir(folder)) == ["model.onnx", "model.pt", "report.json"]
    report = json.loads((folder / "report.json").read_text())
    assert [norm["status"] for norm in report["fold"]["norms"]] == ["folded"] * 3
    assert report["graph"]["norms"] == [] and report["verification"]["cases"]
    inputs = onnx.load(folder / "model.onnx").graph.input
    assert [d.dim_param for d in inputs[0].type.tensor_type.shape.dim] == ["batch", "seq"]


def test_export_takes_dead_channels_out_if_asked(tmp_path):
    save_perceptron(tmp_path / "model.pt", **{"norm.weight": 0.0})
    done = run("export", "model.pt", "--out", "model.onnx", "--remove-dead", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "norm: 1 of 4 channels taken out of inner.weight, head.weight" in done.stdout
    sizes = [numpy_helper.to_array(i).size for i in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert max(sizes) == 12  # 4 x 3 and 3 x 3 are left of 4 x 4 and 4 x 3


def test_export_drops_norms_that_cancel_if_asked_and_prints_what_eps_changes(tmp_path):
    save(tiny_models.Normalised(), tmp_path / "model.pt", example_inputs=torch.ones(2, 4))
    done = run("export", "model.pt", "--out", "model.onnx", "--cancel-norms", "--report", "report.json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "1 none, 1 RMSNorm" in done.stdout and "norms cancelled: on the example inputs" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())["fold"]
    assert report["dynamic"][0]["measured_by"] == ["3"] and report["cancel_difference"] < 1e-3


def test_a_bound_on_scales_leaves_norms_in_inspect_and_export(encoder, tmp_path):
    folder, _ = encoder
    for command, out in (("inspect", []), ("export", ["--out", tmp_path / "m.onnx"])):
        done = run(command, folder / "model.pt", *out, "--max-scale-range", "1.5")
        assert done.exit_code == 0, done.stderr
        assert "would span more than a factor of 1.5" in " ".join(done.stdout.split())
        assert "3 of 3 norms folded" not in done.stdout


def test_verify_repeats_the_proof_and_fails_on_another_file(encoder, tmp_path):
    folder, _ = encoder
    done = run("verify", "model.pt", "model.onnx", "--rounds", 3, cwd=folder)
    assert done.exit_code == 0 and "the same within" in done.stdout
    assert done.stdout.count("random inputs") == 3
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    assert "differs from the module" in refused(run("verify", "model.pt", tmp_path / "other.onnx", cwd=folder))


def test_inspect_writes_nothing_and_fits_a_narrow_terminal(encoder, tmp_path):
    folder, _ = encoder
    done = run("inspect", folder / "model.pt", cwd=tmp_path, COLUMNS="40")
    assert done.exit_code == 0 and done.stderr == ""
    assert "3 of 3 norms folded" in done.stdout and "tokens:int64[batch,seq<=16]" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 40
    assert os.listdir(tmp_path) == []


def test_bench_prints_medians_and_their_ratio(encoder):
    folder, _ = encoder
    done = run("bench", "model.onnx", "model.onnx", "--size", "seq=9", "--rounds", 5, cwd=folder)
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    assert "second ÷ first" in done.stdout and "tokens [1, 9]" in done.stdout


def test_bare_weights_with_a_model_from_the_working_directory(tmp_path):
    (tmp_path / "my_net.py").write_text(
        "from tiny_models import Perceptron\ndef make(width, label): return Perceptron(width)\n"
    )
    torch.save(tiny_models.trained(tiny_models.Perceptron(6)).state_dict(), tmp_path / "m.pt")
    options = ["--model", "my_net:make", "--model-arg", "width=6", "--model-arg", "label=text"]
    done = run(
        "export", "m.pt", "--out", "m.onnx", *options, "--input", "x:float32[batch,6]", "--opset", 20, cwd=tmp_path
    )
    assert done.exit_code == 0, done.stderr
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20


def test_version_and_help_and_usage(tmp_path):
    done = normfuse("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("normfuse ")
    commands = run("--help").stdout
    assert all(command in commands for command in ("export", "inspect", "verify", "bench"))
    done = run("export")
    assert done.exit_code == 2 and "Missing argument" in done.stderr


# Refusals: one line, exit status 1, nothing written, nothing run


def garbage(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b", os.urandom(3000))


def truncated(path):
    save_perceptron(path)
    path.write_bytes(path.read_bytes()[:-700])


def flipped(path):
    save_perceptron(path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        record = next(entry for entry in file.infolist() if "weight_1" in entry.filename)
    data[record.header_offset + 30 + len(record.filename) + 64] ^= 4
    path.write_bytes(data)


REFUSALS = {
    "garbage": (garbage, "holds nothing that torch.save wrote"),
    "truncated": (truncated, "damaged"),
    "flipped bit": (flipped, "damaged"),
    "absent": (lambda path: None, "cannot read"),
    "pickle": (
        lambda path: torch.save({"weight": torch.ones(2), "x": Canary(path.parent / "canary")}, path),
        "can run code",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_checkpoints_that_are_refused(tmp_path, case):
    make, because = REFUSALS[case]
    make(tmp_path / "m.pt")
    before = os.listdir(tmp_path)
    done = run("export", "m.pt", "--out", "m.onnx", "--report", "r.json", cwd=tmp_path)
    assert because in refused(done)
    assert os.listdir(tmp_path) == before


def test_options_and_targets_that_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_perceptron(tmp_path / "m.pt")
    (tmp_path / "folder").mkdir()
    for options, because in (
        (["--out", "absent/m.onnx"], "no folder absent"),
        (["--out", "folder"], "it is a folder"),
        (["--out", "m.onnx", "--report", "absent/r.json"], "no folder absent"),
        (["--out", "m.onnx", "--opset", "99"], "opset 99 is outside"),
        (["--out", "m.onnx", "--model-arg", "width"], "name=value"),
        (["--out", "m.onnx", "--max-scale-range", "0.5"], "max_scale_range 0.5 is below 1"),
    ):
        assert because in refused(run("export", "m.pt", *options))
        assert sorted(os.listdir(tmp_path)) == ["folder", "m.pt"]


def test_a_difference_beyond_the_tolerance_leaves_no_file(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    done = run("export", "m.pt", "--out", "m.onnx", "--rtol", "0", cwd=tmp_path)
    assert "allowed are 0" in refused(done)
    assert os.listdir(tmp_path) == ["m.pt"]


def ended_at(line, number, *arguments, cwd, path=()):
    """The exit status and the error output of a command that gets a signal when it has printed a line."""
    command = [sys.executable, "-m", "normfuse", *map(str, arguments)]
    env = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([*map(str, path), ENVIRONMENT["PYTHONPATH"]])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=env, **pipes) as running:
        while line not in running.stdout.readline():
            assert running.poll() is None, running.stderr.read()
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    return running.returncode, said


@pytest.mark.slow
def test_an_export_that_is_ended_leaves_no_file(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    arguments = ["export", "m.pt", "--out", "m.onnx", "--report", "r.json"]
    # The folder for the files is there, and seconds of work lie ahead.
    done = ended_at("load m.pt", signal.SIGTERM, *arguments, cwd=tmp_path)
    assert done == (143, "normfuse: terminated\n")
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "normfuse: interrupted\n"), (signal.SIGTERM, 143, "normfuse: terminated\n")],
)
def test_a_signal_while_libraries_are_imported_is_one_line(tmp_path, number, status, said):
    """They may catch whatever an import raises; this one stands for them."""
    (tmp_path / "typer.py").write_text(
        "import time\ntry:\n    print('importing', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    assert ended_at("importing", number, "--help", cwd=tmp_path, path=[tmp_path]) == (status, said)


def test_a_report_that_cannot_be_written_costs_the_file_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_perceptron(tmp_path / "m.pt")
    write_text = Path.write_text

    def full(path, *arguments, **options):
        if path.name == "r.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    done = run("export", "m.pt", "--out", "m.onnx", "--report", "r.json")
    assert "cannot write r.json: no space left on device" in refused(done).lower()
    assert os.listdir(tmp_path) == ["m.pt"]


def test_what_is_read_is_not_written_and_a_report_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_perceptron(tmp_path / "m.pt")
    os.link(tmp_path / "m.pt", tmp_path / "hard.onnx")
    (tmp_path / "link.onnx").symlink_to("m.pt")
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / "net.py").write_text("")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    export, fold = ["export", "m.pt", "--out"], ["fold", "m.pt", "--out"]
    for arguments, because in (
        ([*export, "m.pt"], "cannot write m.pt: this command reads it too"),
        ([*export, "./hard.onnx"], "cannot write hard.onnx: this command reads it too"),
        ([*export, "link.onnx"], "cannot write link.onnx: this command reads it too"),
        ([*export, "m.onnx", "--report", "link.onnx"], "cannot write link.onnx: this command reads it too"),
        ([*export, "same", "--report", "./same"], "--report and --out are both same"),
        ([*export, "net.py", "--model", "net:make"], "cannot write net.py: this command reads it too"),
        ([*export, "pipe"], "cannot write pipe: it is a pipe"),
        ([*export, "/dev/full"], "cannot write /dev/full: it is a device"),
        ([*export, "m.onnx", "--report", "/dev/stdout"], "cannot write /dev/stdout: it is "),
        ([*export, "n" * 300], "file name too long"),
        ([*fold, "m.pt"], "cannot write m.pt: this command reads it too"),
        (["plot", "stats.json", "--out", "stats.json"], "stats.json"),
    ):
        assert because in refused(run(*arguments)), arguments
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    save_perceptron(tmp_path / "m.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        done = run("export", "m.pt", "--out", "m.onnx", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write m.onnx: file too large" in refused(done)
    assert os.listdir(tmp_path) == ["m.pt"]


# Printing


def test_a_long_report_shows_what_stayed_and_shortens_the_rest(capsys):
    norms = [NormRecord(f"blocks.{i}.norm", "UnifiedNorm", absorbed_by=["a.weight", "a.bias"]) for i in range(100)]
    norms[70] = NormRecord("blocks.70.norm", "UnifiedNorm", "kept", [], "[its scale] is zero")
    console.print_report(console.Console(width=100), FoldReport(norms))
    printed = capsys.readouterr().out
    assert "blocks.70.norm" in printed and "[its scale] is zero" in printed and "a.{weight,bias}" in printed
    assert "and 76 more" in printed and "99 of 100 norms folded" in printed


def test_shifts_that_are_settled_early_are_named(capsys):
    console.print_report(console.Console(width=200), FoldReport(settled_early=["blocks.[0].norm", "blocks.1.norm"]))
    printed = capsys.readouterr().out
    assert "shifts settled in the biases in front of blocks.[0].norm, blocks.1.norm" in printed


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12.3 KB"), (3_000_000, "3.0 MB"), (4.2e9, "4.20 GB")]
)
def test_sizes(count, text):
    assert console.readable_size(count) == text


def test_an_unexpected_error_is_one_line_too(monkeypatch):
    def out_of_memory(*_):
        raise MemoryError("two\nlines")

    monkeypatch.setattr(plotting, "plot_statistics", out_of_memory)
    done = run("plot", "stats.json")
    assert done.exit_code == 1
    assert done.stderr == "normfuse: error: unexpected MemoryError: two lines (NORMFUSE_TRACEBACK=1 shows where)\n"
