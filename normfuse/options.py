"""The options of export, their values, and the checks that need nothing loaded.

The functions of :mod:`normfuse.onnx` and the command share them. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from normfuse.errors import NormfuseError

OPSETS = (23, 20, 18)  # newest first: torch translates to each of them
DTYPES = ("float32", "float16")
INT8_FILE = "int8 file"  # in reports of verification: compared by size, not by largest values
MODEL_DTYPES = (*DTYPES, "int8")  # of files that are made from a model

MOST_THREADS = 1024  # to time with; beyond any machine, and before ONNX Runtime takes minutes to start them

# What a target gets. portable is the graph as torch writes it. Gemm saves an addition, but ONNX Runtime spreads its
# bias over the output on one thread, so only sessions of one thread and few tokens gain. Attention in blocks gains with
# many, and makes the only files with an operation that is not standard. On CUDA, ONNX Runtime fuses MatMul, Add and
# Gelu by itself, so there only the additions of travelling biases are saved: a conclusion, not a measurement.
TARGETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "cpu": ("carry_biases", "attention3d", "single_token"),
    "cpu-single": ("carry_biases", "attention3d", "single_token", "gemm2d"),
    "cpu-long": ("carry_biases", "attention3d", "blockwise_attention", "single_token"),
    "cuda": ("carry_biases",),
}
AUTO = "auto"  # for models only: the fastest of these on this machine
MODEL_TARGETS = (*TARGETS, AUTO)
# In the order in which they are applied.
PASS_NAMES = ("carry_biases", "attention3d", "blockwise_attention", "single_token", "gemm2d")

# The names that optimum and the hub use, and which of transformers' automatic classes builds the head.
TASKS = {
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "depth-estimation": "AutoModelForDepthEstimation",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "image-segmentation": "AutoModelForImageSegmentation",
    "masked-im": "AutoModelForMaskedImageModeling",
    "multiple-choice": "AutoModelForMultipleChoice",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "sentence-similarity": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
}
WITH_PAST = "-with-past"  # behind a task: keys and values go in and out


class ExportError(NormfuseError):
    """The model cannot be exported; the message is one line. No file was written."""


def passes_for(target: str, skip: Collection[str] = ()) -> tuple[str, ...]:
    """The graph passes of a target without those to skip, in their order.

    Raises:
        ExportError: there is no such target, or no pass of a name to skip.
    """
    check_target_name(target)
    for name in skip:
        if name not in PASS_NAMES:
            raise ExportError(f"there is no graph pass {name!r} to disable; there are {', '.join(PASS_NAMES)}")
    return tuple(name for name in TARGETS[target] if name not in skip)


def check_target_name(target: str, allowed: Collection[str] = tuple(TARGETS)) -> None:
    """ExportError for a target that there is not."""
    if target not in allowed:
        why = "; only export can choose one (auto)" if target == AUTO else ""
        raise ExportError(f"target {target!r} is not one of {', '.join(allowed)}{why}")


def check_for_auto(target: str, sizes: object, threads: int) -> None:
    """ExportError for sizes or threads to time with where nothing is timed."""
    if target != AUTO and (sizes or threads != 1):
        raise ExportError(
            f"sizes and threads (--size, --threads) are for timing with target 'auto', not {target!r}; leave them out"
        )
    check_timing(sizes, threads)


def check_timing(sizes: object, threads: object) -> None:
    """ExportError for sizes and threads that nothing can be timed with."""
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise ExportError(f"threads is {threads!r}; give a whole number from 1 to {MOST_THREADS}")
    if sizes is not None and not isinstance(sizes, Mapping):
        raise ExportError(f"sizes is a {type(sizes).__name__}; give a mapping from names of dimensions to sizes")
    for name, size in (sizes or {}).items():
        if type(size) is not int or size < 1:
            raise ExportError(f"size {name!r} is {size!r}; give a whole number of at least 1")


def check_for_int8(dtype: str, calibrate: object) -> None:
    """ExportError for calibration inputs where no scale is chosen by them."""
    if calibrate is not None and dtype != "int8":
        raise ExportError(f"calibrate is for dtype 'int8', not {dtype!r}; leave it out")


def check_opset(opset: int | None) -> None:
    """ExportError for an operator set that torch does not translate to; None stands for a choice."""
    if opset is not None and not min(OPSETS) <= opset <= max(OPSETS):
        raise ExportError(
            f"opset {opset} is outside {min(OPSETS)} to {max(OPSETS)}, the range that torch.onnx can write"
        )


def check_dtype(dtype: str, allowed: tuple[str, ...] = DTYPES) -> None:
    """ExportError for a type of weights that files cannot have."""
    if dtype not in allowed:
        why = ""
        if dtype == "bfloat16":
            why = ": ONNX Runtime's CPU has no bfloat16 products to verify the file with"
        if dtype in MODEL_DTYPES:
            why = ": an ONNX file is folded in its own type; quantise the result, or export the model it came from"
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(allowed)}{why}")


def check_task(task: str | None) -> None:
    """ExportError for a task that no head is known for; None stands for the head that was saved."""
    if task is not None and task.removesuffix(WITH_PAST) not in TASKS:
        raise ExportError(f"task {task!r} is not one of {', '.join(TASKS)}")


def check_scale_range(bound: float | None) -> None:
    """ExportError for a bound on the range of scales that no channel could keep."""
    if bound is not None and not bound >= 1:
        raise ExportError(f"max_scale_range {bound:g} is below 1, the ratio of a scale to itself")
