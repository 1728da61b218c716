"""The command line: export, inspect, verify, bench, plot."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import normfuse
from normfuse.checkpoint import Checkpoint, CheckpointError, load
from normfuse.checkpoint.archive import one_line
from normfuse.console import Stages, make_console, make_table, print_report, print_result
from normfuse.folding import FoldError
from normfuse.onnx import (
    BenchError,
    ExportError,
    ExportResult,
    GraphError,
    VerificationError,
    WriteError,
    fold_checkpoint,
    fold_file,
    summarize,
)
from normfuse.onnx import (
    bench as run_bench,
)
from normfuse.onnx import (
    export as run_export,
)
from normfuse.onnx import (
    verify as run_verify,
)
from normfuse.onnx.exporter import check_target, in_float32
from normfuse.onnx.shaping import STEPS
from normfuse.onnx.verifier import RTOL
from normfuse.plotting import PlotError, plot_statistics

_KNOWN = (BenchError, CheckpointError, ExportError, FoldError, GraphError, PlotError, VerificationError, WriteError)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train with fast norms, deploy with none: fold Unified, Power and Batch Norm away and export ONNX.",
)

Model = Annotated[
    str | None,
    typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Builds the model; looked for in this folder as well."),
]
ModelArg = Annotated[
    list[str], typer.Option(metavar="NAME=VALUE", help="Argument for the factory (JSON or text); repeatable.")
]
Input = Annotated[
    list[str],
    typer.Option(
        metavar="SPEC",
        help='What the model takes: "tokens:int64[batch,seq<=512]<30000". A word is a dynamic dimension, a number a '
        "fixed one; <=N bounds a dimension; <N behind the bracket bounds integers (default: 0 and 1). "
        "Repeatable.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read pickled modules and .pt2 files, which can run any code when read.")
]
NoCopy = Annotated[
    bool, typer.Option("--no-copy", help="Never store a shared weight twice; its norm stays in the graph then.")
]
RemoveDead = Annotated[
    bool, typer.Option("--remove-dead", help="Take channels whose norm's gain is zero out of the weights around it.")
]
KeepDynamicNorms = Annotated[
    bool,
    typer.Option(
        "--keep-dynamic-norms",
        help="Leave LayerNorm, RMSNorm and GroupNorm as they are: no gain folded, no LayerNorm turned into RMSNorm.",
    ),
]
MaxScaleRange = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="Leave norms that would store one channel at scales more than a factor R apart [2**40 for float32, 2**10 "
        "or less for float16]; try 32 for a file that is to be quantised to int8.",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        help="Shape the graph for ONNX Runtime: cpu; cpu-single, one thread and up to 2000 tokens at a time; cpu-long, "
        "from 4000 tokens at a time; cuda; or portable (leave it)."
    ),
]
NoShape = Annotated[
    list[str], typer.Option(metavar="STEP", help=f"Leave out a shaping step ({', '.join(STEPS)}); repeatable.")
]
Rtol = Annotated[
    float | None,
    typer.Option(min=0, help="Allowed difference ÷ largest output value [1e-4 for float32, 2e-2 for float16]."),
]
Atol = Annotated[float, typer.Option(min=0, help="Allowed difference on top of that.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"normfuse {normfuse.__version__}")
        raise typer.Exit


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="From normfuse.save, or a state_dict (.pt, .safetensors).")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    opset: Annotated[int | None, typer.Option(help="18 to 23 [the newest of 23, 20, 18 that passes].")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or float16 for the weights.")] = "float32",
    rtol: Rtol = None,
    atol: Atol = 0.0,
    report: Annotated[Path | None, typer.Option(help="Also write everything that is known as JSON.")] = None,
    model: Model = None,
    model_arg: ModelArg = [],  # noqa: B006 (typer reads the default, nothing changes it)
    input: Input = [],  # noqa: B006
    trust: Trust = False,
    no_copy: NoCopy = False,
    remove_dead: RemoveDead = False,
    keep_dynamic_norms: KeepDynamicNorms = False,
    max_scale_range: MaxScaleRange = None,
    target: Target = "portable",
    no_shape: NoShape = [],  # noqa: B006
) -> None:
    """Fold the norms away, write ONNX, and verify it in ONNX Runtime before the file appears."""
    console = make_console()
    with _one_line_errors():
        _check_targets(out, report)
        with Stages(console) as stages:
            stages(f"load {checkpoint}")
            loaded = _load(checkpoint, model, model_arg, input, trust)
            result = run_export(
                loaded,
                out,
                opset=opset,
                dtype=dtype,
                rtol=rtol,
                atol=atol,
                copy_shared=not no_copy,
                remove_dead=remove_dead,
                keep_dynamic_norms=keep_dynamic_norms,
                max_scale_range=max_scale_range,
                target=target,
                no_shape=no_shape,
                progress=stages,
            )
        print_result(console, result)
        if report is not None:
            _write_report(report, result, checkpoint=checkpoint)


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(help="An ONNX file from elsewhere, of operator set 13 or newer.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    opset: Annotated[int | None, typer.Option(help="18 to 23 [the newest of 23, 20, 18 that passes].")] = None,
    rtol: Rtol = None,
    atol: Atol = 0.0,
    report: Annotated[Path | None, typer.Option(help="Also write everything that is known as JSON.")] = None,
    input: Input = [],  # noqa: B006
    no_copy: NoCopy = False,
    keep_dynamic_norms: KeepDynamicNorms = False,
    max_scale_range: MaxScaleRange = None,
    target: Target = "portable",
    no_shape: NoShape = [],  # noqa: B006
) -> None:
    """Fold BatchNorms, Mul and Add per channel and LayerNorm gains of an ONNX file, and verify the result."""
    console = make_console()
    with _one_line_errors():
        _check_targets(out, report)
        with Stages(console) as stages:
            result = fold_file(
                source,
                out,
                inputs=input or None,
                opset=opset,
                rtol=rtol,
                atol=atol,
                copy_shared=not no_copy,
                keep_dynamic_norms=keep_dynamic_norms,
                max_scale_range=max_scale_range,
                target=target,
                no_shape=no_shape,
                progress=stages,
            )
        print_result(console, result)
        if report is not None:
            _write_report(report, result, source=source)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="From normfuse.save, or a state_dict (.pt, .safetensors).")],
    model: Model = None,
    model_arg: ModelArg = [],  # noqa: B006
    input: Input = [],  # noqa: B006
    trust: Trust = False,
    no_copy: NoCopy = False,
    keep_dynamic_norms: KeepDynamicNorms = False,
    max_scale_range: MaxScaleRange = None,
) -> None:
    """Print what would be folded into what; writes nothing."""
    console = make_console()
    with _one_line_errors():
        with Stages(console) as stages:
            stages(f"load {checkpoint}")
            loaded = _load(checkpoint, model, model_arg, input, trust)
            loaded, _, report = fold_checkpoint(
                loaded,
                copy_shared=not no_copy,
                keep_dynamic_norms=keep_dynamic_norms,
                max_scale_range=max_scale_range,
                progress=stages,
            )
        console.print(f"inputs: {escape(', '.join(map(str, loaded.inputs)))}", highlight=False)
        print_report(console, report)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint that the file was exported from.")],
    onnx: Annotated[Path, typer.Argument(help="The ONNX file.")],
    rtol: Rtol = None,
    atol: Atol = 0.0,
    rounds: Annotated[int, typer.Option(min=0, help="Random inputs besides the saved example.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    model: Model = None,
    model_arg: ModelArg = [],  # noqa: B006
    input: Input = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Compare an ONNX file with the module it came from, in ONNX Runtime."""
    console = make_console()
    with _one_line_errors():
        graph = summarize(onnx)
        loaded = in_float32(_load(checkpoint, model, model_arg, input, trust))
        allowed = RTOL[graph.dtype] if rtol is None else rtol
        proof = run_verify(loaded, onnx, rtol=allowed, atol=atol, rounds=rounds, seed=seed)
        table = make_table("inputs", "output", "difference", "÷ largest value")
        for case in proof.cases:
            table.add_row(case.inputs, case.output, f"{case.difference:.2e}", f"{case.error:.2e}")
        console.print(table)
        console.print(f"the same within {proof.worst('ONNX file'):.1e} (allowed {allowed:.0e})", highlight=False)


@app.command()
def bench(
    onnx: Annotated[list[Path], typer.Argument(help="One ONNX file, or two to compare.")],
    size: Annotated[
        list[str], typer.Option(metavar="NAME=N", help="A dynamic dimension [batch=1, others 128]; repeatable.")
    ] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=4, help="Timed rounds; each runs every file once.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Of ONNX Runtime.")] = 1,
) -> None:
    """Median latency in ONNX Runtime (CPU), interleaved; the ratio of the second file to the first."""
    console = make_console()
    with _one_line_errors():
        if len(onnx) > 2:
            raise BenchError(f"{len(onnx)} files given; one or two can be timed")
        sizes = {name: _whole(value, f"--size {name}={value}") for name, value in _pairs(size, "--size")}
        timing = run_bench(onnx, sizes=sizes, rounds=rounds, threads=threads)
        table = make_table("file", "median ms", "quartiles")
        for index, path in enumerate(timing.paths):
            low, middle, high = timing.quartiles(index)
            table.add_row(escape(path), f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        console.print(table)
        shapes = ", ".join(f"{name} {shape}" for name, shape in timing.shapes.items())
        console.print(f"{rounds} rounds, {threads} thread(s), inputs {escape(shapes)}", highlight=False)
        if len(onnx) == 2:
            middle, low, high = timing.ratio()
            console.print(
                f"second ÷ first: {middle:.3f} (half of the rounds between {low:.3f} and {high:.3f})", highlight=False
            )


@app.command()
def plot(
    statistics: Annotated[Path, typer.Argument(help="What normfuse.nn.monitor(model) saved during training.")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("statistics.png"),
) -> None:
    """Draw the statistics of norms over a training: batch against running, gradients, skips."""
    with _one_line_errors():
        plot_statistics(statistics, out)
        make_console().print(f"wrote {escape(str(out))}", highlight=False)


def main() -> None:
    """Entry point of the command ``normfuse``."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows a mark instead of ending the run
    # Ending a run must leave no half-written file: as an exception, a termination passes through every clean-
    # up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app(prog_name="normfuse")


def _load(path: Path, model: str | None, model_arg: Sequence[str], input: Sequence[str], trust: bool) -> Checkpoint:
    arguments = {}
    for name, value in _pairs(model_arg, "--model-arg"):
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return load(path, model=model, model_args=arguments or None, inputs=input or None, trust=trust)


def _pairs(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise CheckpointError(f"{option} {text!r} is not of the form name=value")
        pairs.append((name, value))
    return pairs


def _whole(text: str, label: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise BenchError(f"{label}: give a whole number of at least 1")
    return int(text)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr and exit status 1, whatever happens."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("NORMFUSE_TRACEBACK"):
            raise
        message = one_line(error, 1500)
        if not isinstance(error, _KNOWN):
            message = f"unexpected {type(error).__name__}: {message} (NORMFUSE_TRACEBACK=1 shows where)"
        print(f"normfuse: error: {message}", file=sys.stderr)
        raise typer.Exit(1) from error


def _check_targets(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            check_target(file)


def _write_report(path: Path, result: ExportResult, **source: Path) -> None:
    versions = {"normfuse": normfuse.__version__}
    read = {name: str(file) for name, file in source.items()}
    _write_json(path, {**read, "versions": versions, **result.to_dict()})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
