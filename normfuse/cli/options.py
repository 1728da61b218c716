"""Every option of every command, once.

A group is a frozen dataclass. Its fields have the names and defaults of the Python functions that take them; what is
typed differs where a flag reads better (``--input`` may be given several times and fills ``inputs``).
"""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normfuse.errors import NormfuseError
from normfuse.files import OutputError, check_target, same_file
from normfuse.options import (
    DTYPES,
    MODEL_DTYPES,
    MODEL_TARGETS,
    OPSETS,
    PASS_NAMES,
    TASKS,
    check_dtype,
    check_opset,
    check_scale_range,
    check_target_name,
    check_task,
    passes_for,
)

if TYPE_CHECKING:
    from rich.console import Console

    from normfuse.checkpoint import ExportableModel, InputSpec


class UsageError(NormfuseError):
    """An option cannot be read; the message is one line."""


def _among(values: Iterable[object]) -> Callable[[str], list[str]]:
    """Completion of an option by those of the values that begin like what is typed."""
    return lambda incomplete: [str(value) for value in values if str(value).startswith(incomplete)]


OtherNames = Annotated[
    list[str],
    typer.Option("--map", metavar="FIRST=SECOND", help="An input with another name in the second file; repeatable."),
]


@dataclass(frozen=True)
class Inputs:
    """What inputs look like, where the file says too little."""

    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="SPEC",
            help='Name, type and sizes of an input: "tokens:int64[batch,seq<=512]<30000". A word is a dynamic '
            "dimension, a number a fixed one; <=N is a largest size; <N after the bracket bounds integers (default: 0 "
            "and 1). Repeatable.",
        ),
    ] = field(default_factory=list)

    def check(self) -> None:
        """Read by :meth:`specs`, which needs torch's names of dtypes."""

    def specs(self) -> list[InputSpec] | None:
        """The inputs as they were given; None if none was."""
        from normfuse.checkpoint import parse_input

        return [parse_input(text) for text in self.inputs] or None


@dataclass(frozen=True)
class Loading(Inputs):
    """What a file leaves out; arguments of :func:`normfuse.load`."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Class or function that builds the model; the current folder is searched too, and FILE.py stands for "
            "a module. timm:NAME and torchvision:NAME need no --input.",
        ),
    ] = None
    model_args: Annotated[
        list[str],
        typer.Option("--model-arg", metavar="NAME=VALUE", help="Argument for --model (JSON or text); repeatable."),
    ] = field(default_factory=list)
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Entry of the weights, if the file holds several [the trained ones, not their average].",
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="For a folder of transformers: head to build (feature-extraction, text-generation, …) "
            "[the saved one].",
            autocompletion=_among(TASKS),
        ),
    ] = None
    with_past: Annotated[
        bool,
        typer.Option(
            "--with-past",
            help="For a decoder in a folder of transformers: take and return keys and values of earlier tokens, so "
            "that one file serves the prompt and every step.",
        ),
    ] = False
    outputs: Annotated[
        list[str],
        typer.Option(
            "--output",
            metavar="NAME",
            help="For a folder of transformers: an output of the model to export [those of optimum]; repeatable.",
        ),
    ] = field(default_factory=list)
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Allow pickled modules, classes that files name, and Python code in folders. All of these can run any "
            "code: use it only for files whose author you trust.",
        ),
    ] = False

    def check(self) -> None:
        check_task(self.task)
        pairs(self.model_args, "--model-arg")

    def files(self) -> list[Path]:
        """Where the module of --model may lie in this folder: it is read."""
        place = "" if self.model is None else self.model.rpartition(":")[0]
        if place.endswith(".py"):
            return [Path(place)]
        name = place.replace(".", "/")
        return [Path(f"{name}.py"), Path(name) / "__init__.py"] if name else []

    def load(self, path: Path) -> ExportableModel:
        """The checkpoint; what the options say is read before the file is."""
        from normfuse.sources import load

        # What is asked for is local in any case; this keeps transformers and timm from looking for more.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        specs = self.specs()
        arguments = {name: _json_or_text(value) for name, value in pairs(self.model_args, "--model-arg")}
        return load(
            path,
            model=self.model,
            model_args=arguments or None,
            inputs=specs,
            weights=self.weights,
            task=self.task,
            with_past=self.with_past,
            outputs=self.outputs or None,
            trust=self.trust,
        )


@dataclass(frozen=True)
class Folding:
    """What changes folding; arguments of :func:`normfuse.onnx.export`, ``fold_file`` and ``fold_model``."""

    dtype: Annotated[str, typer.Option(help="float32, or float16 (weights).", autocompletion=_among(DTYPES))] = (
        "float32"
    )
    copy_shared: Annotated[
        bool,
        typer.Option(
            "--copy-shared/--no-copy-shared",
            " /--no-copy",
            help="Store a shared weight twice if its uses need different values; without it, the norms around it stay.",
        ),
    ] = True
    keep_dynamic_norms: Annotated[
        bool,
        typer.Option(
            "--keep-dynamic-norms",
            help="Leave LayerNorm, RMSNorm and GroupNorm as they are: no gain folded, no LayerNorm turned into "
            "RMSNorm.",
        ),
    ] = False
    max_scale_range: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Keep norms whose folding would store one channel at scales more than a factor R apart [2**40 for "
            "float32, 2**10 or less for float16].",
        ),
    ] = None
    target: Annotated[
        str,
        typer.Option(
            help="Graph passes for ONNX Runtime: cpu; cpu-single (one thread, up to 2000 tokens at a time); cpu-long "
            "(from 4000 tokens at a time); cuda; portable (none). export only: auto (the fastest on this machine).",
            autocompletion=_among(MODEL_TARGETS),
        ),
    ] = "portable"
    disable_passes: Annotated[
        list[str],
        typer.Option(
            "--disable-pass",
            metavar="NAME",
            help=f"Leave out a graph pass ({', '.join(PASS_NAMES)}); repeatable.",
            autocompletion=_among(PASS_NAMES),
        ),
    ] = field(default_factory=list)

    def check(self) -> None:
        check_dtype(self.dtype)
        check_scale_range(self.max_scale_range)
        passes_for(self.target, self.disable_passes)


@dataclass(frozen=True)
class ModelFolding(Folding):
    """What changes folding of a model, as opposed to an ONNX file."""

    dtype: Annotated[
        str,
        typer.Option(
            help="float32; float16 (weights); int8 (products, with scales chosen for them).",
            autocompletion=_among(MODEL_DTYPES),
        ),
    ] = "float32"
    remove_dead: Annotated[
        bool,
        typer.Option("--remove-dead", help="Remove channels with a zero gain in a norm from the weights around it."),
    ] = False
    cancel_norms: Annotated[
        bool,
        typer.Option(
            "--cancel-norms",
            help="Remove norms whose division later norms undo, for example in front of normalised queries, keys and "
            "values. Only the effect of eps changes; the report says by how much.",
        ),
    ] = False

    def check(self) -> None:
        check_dtype(self.dtype, MODEL_DTYPES)
        check_scale_range(self.max_scale_range)
        check_target_name(self.target, MODEL_TARGETS)
        passes_for("portable", self.disable_passes)


@dataclass(frozen=True)
class Choosing:
    """What integers, and the target auto, are chosen by."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="For int8: typical inputs, one array for each input's name. They choose the scales and fixed step "
            "sizes of activations [scales by the example inputs, step sizes measured in every run].",
        ),
    ] = None
    sizes: Annotated[
        list[str],
        typer.Option("--size", metavar="NAME=N", help="For --target auto: size of a dynamic dimension; repeatable."),
    ] = field(default_factory=list)
    threads: Annotated[int, typer.Option(min=1, help="For --target auto: number of threads.")] = 1

    def check(self) -> None:
        sizes_of(self.sizes)

    def options(self) -> dict[str, Any]:
        """Arguments of :func:`normfuse.onnx.export`."""
        return {"calibrate": self.calibrate, "sizes": sizes_of(self.sizes), "threads": self.threads}


@dataclass(frozen=True)
class FileFolding(Folding):
    """What changes folding of an ONNX file; arguments of :func:`normfuse.onnx.fold_file`."""

    fold_defaults: Annotated[
        bool | None,
        typer.Option(
            "--fold-defaults/--keep-defaults",
            help="Treat initialisers that are also inputs, which callers may set, as constants [yes if every weight is "
            "listed as an input].",
        ),
    ] = None


@dataclass(frozen=True)
class Tolerance:
    """What differences a comparison allows."""

    rtol: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Allowed difference ÷ largest output value [1e-4 for float32, 2e-2 for float16]; int8: norm of the "
            "difference ÷ norm of the output [0.2].",
        ),
    ] = None
    atol: Annotated[float, typer.Option(min=0, help="Allowed absolute difference on top of that.")] = 0.0

    def check(self) -> None:
        """Typer has checked the bounds."""


@dataclass(frozen=True)
class Writing:
    """Where the result goes."""

    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")]
    report: Annotated[Path | None, typer.Option(help="Also write a full report as JSON.")] = None

    def check(self) -> None:
        self.check_targets()

    def check_targets(self, *reads: Path) -> None:
        """OutputError for files that cannot be written, or that are read."""
        for path in (self.out, self.report):
            if path is not None:
                check_target(path, reads=reads)
        if self.report is not None and same_file(self.out, self.report):
            raise OutputError(f"--report and --out are both {self.out}: give the report a name of its own")


@dataclass(frozen=True)
class ModelWriting(Writing):
    """Where the result goes, and in which version of ONNX's operators."""

    opset: Annotated[
        int | None,
        typer.Option(
            help="Operator set, 18 to 23 [the newest of 23, 20, 18 that passes verification].",
            autocompletion=_among(OPSETS),
        ),
    ] = None

    def check(self) -> None:
        check_opset(self.opset)
        super().check()


@dataclass(frozen=True)
class Printing:
    """What is printed, and where."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and requested numbers.")] = False
    json: Annotated[
        bool, typer.Option("--json", help="The result as JSON on standard output; progress goes to standard error.")
    ] = False

    def check(self) -> None:
        """Both together are JSON without progress."""

    def stages(self) -> Any:
        """Progress: called with each stage's name, in a ``with`` block."""
        from normfuse.console import Stages, make_console

        return nullcontext(lambda stage: None) if self.quiet else Stages(make_console(stderr=self.json))

    def result(self, data: dict[str, Any], show: Callable[[Console], None], *, asked_for: bool = False) -> None:
        """Prints the result: as data, or by ``show``, which ``--quiet`` leaves out unless it was asked for."""
        from normfuse.console import make_console

        if self.json:
            typer.echo(json_module.dumps(finite(data), indent=2, allow_nan=False))
        elif asked_for or not self.quiet:
            show(make_console())


def pairs(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    """``name=value`` options taken apart; UsageError for others."""
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {text!r} is not of the form name=value")
        found.append((name, value))
    return found


def sizes_of(texts: Sequence[str]) -> dict[str, int]:
    """``name=N`` options of dimensions; UsageError for others."""
    found = {}
    for name, value in pairs(texts, "--size"):
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--size {name}={value}: give a whole number of at least 1")
        found[name] = int(value)
    return found


def finite(data: Any) -> Any:
    """The data with None for numbers that JSON has no form for."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not -float("inf") < data < float("inf") else data


def _json_or_text(value: str) -> Any:
    try:
        return json_module.loads(value)
    except ValueError:
        return value
