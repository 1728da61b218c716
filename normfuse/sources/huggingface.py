"""A directory of Hugging Face transformers, or a model of that library, as an exportable model."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normfuse.checkpoint import kinds
from normfuse.checkpoint.archive import CheckpointError, one_line, some_of
from normfuse.checkpoint.bounded import no_more_than
from normfuse.checkpoint.capture import ExportableModel
from normfuse.checkpoint.inputs import InputSpec
from normfuse.options import TASKS, WITH_PAST, check_task
from normfuse.sources import past as past_module
from normfuse.sources.calling import calling
from normfuse.sources.signatures import Signature, signature_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
# Numbers of a configuration that say how many parts are built, and bytes of a file that name one tensor, at least.
_BUILT = re.compile(r"(label|layer|block|depth)s?$")
_BYTES_IN_HEADER, _BYTES_IN_ARCHIVE = 40, 128
_LEFT_OUT = ("pooler_output", "extract_features")  # which optimum leaves out of models without a head
_WITH_POOLED = ("clip", "siglip")  # where the pooled output is the embedding


def is_directory(path: Path) -> bool:
    """Whether a path is a folder that transformers wrote a model or an adapter to."""
    return path.is_dir() and ((path / CONFIG).is_file() or (path / "adapter_config.json").is_file())


def is_model(module: Any) -> bool:
    """Whether a module is one of transformers' models; the library is not imported to find out."""
    return any(
        c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel" for c in type(module).mro()
    )


def load(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    with_past: bool = False,
    inputs: Sequence[InputSpec] | None = None,
    outputs: Sequence[str] | None = None,
    trust: bool = False,
) -> ExportableModel:
    """A directory as an exportable model: the class that it names, its inputs, and names as optimum gives them.

    Args:
        path: with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.
        task: which head to build, see :data:`TASKS`. None: the class that was saved.
        with_past: for decoders: keys and values of earlier tokens go in and out, so that one graph serves the prompt
            and every step after it.
        inputs: sizes and bounds to use instead of the configuration's, for those of its inputs that are named.
        outputs: names of what is to go out of what the model returns. None: those that optimum gives.
        trust: import the Python files that the directory brings along (``auto_map``).

    Raises:
        CheckpointError: in one line. Nothing is fetched, and no code of the directory runs unless it is trusted.
    """
    path = Path(path)
    check_task(task)
    if task is not None and task.endswith(WITH_PAST):
        task, with_past = task.removesuffix(WITH_PAST), True
    model, unused = _load_model(path, task, trust)
    traced = exportable(
        model,
        with_past=with_past,
        inputs=inputs or (),
        outputs=outputs,
        source=str(path),
        processor=_processor(path),
    )
    if not unused:
        return traced
    note = f"not used: {len(unused)} tensor(s) of {path} that {type(model).__name__} does not have ({some_of(unused)})"
    return replace(traced, notes=(*traced.notes, note))


def exportable(
    model: PreTrainedModel,
    *,
    with_past: bool = False,
    inputs: Sequence[InputSpec] = (),
    outputs: Sequence[str] | None = None,
    source: str | None = None,
    processor: Mapping[str, Any] | None = None,
) -> ExportableModel:
    """A model of transformers as an exportable model, with inputs made up from its configuration. It is not changed.

    Args:
        model: in any mode, on any device.
        with_past: see :func:`load`.
        inputs: see :func:`load`.
        outputs: see :func:`load`.
        source: for messages. None: the model's class.
        processor: what its processor's files say of images and tokens, where the configuration says nothing.

    Raises:
        CheckpointError: its inputs are not known, or it cannot be traced.
    """
    signature = signature_of(model, processor or {}, inputs)
    chosen = _Outputs(model, outputs)
    with _quiet():
        if with_past:
            if outputs is not None:
                raise CheckpointError("outputs cannot be chosen with a past: logits and the new keys and values go out")
            signature, called = past_module.with_past(model, signature)
        else:
            takes = inspect.signature(type(model).forward).parameters
            called = calling(model, signature.names, {"use_cache": False} if "use_cache" in takes else {}, chosen)
        signature = signature.bounded(inputs)
        traced = ExportableModel.from_model(called, dict(signature.examples), dict(signature.dims))
    notes = (*traced.notes, *signature.notes, *chosen.notes())
    return replace(_renamed(traced, signature, source or type(model).__name__), notes=notes)


class _Outputs:
    """Chooses among the tensors that a model returns: not the outputs of its parts, nor caches.

    Args:
        model: gives them.
        wanted: the names to choose; None for those that optimum gives.
    """

    def __init__(self, model: PreTrainedModel, wanted: Sequence[str] | None) -> None:
        self._model, self._wanted = type(model).__name__, wanted
        self._usual = () if model.config.model_type.startswith(_WITH_POOLED) else _LEFT_OUT
        pictures = model.main_input_name == "pixel_values"  # whose decoder belongs to the head
        self._inner = ("last_hidden_state", *(["encoder_last_hidden_state"] if pictures else []))
        self._taken: list[str] = []
        self._left: list[str] = []

    def __call__(self, outputs: Any) -> dict[str, torch.Tensor]:
        tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        if self._wanted is None:
            left = (*self._usual, *self._inner) if "logits" in tensors else self._usual
            # Where a model gives nothing else, that is what it is for.
            wanted = [name for name in tensors if name not in left] or list(tensors)
        else:
            wanted = list(self._wanted)
            unknown = [name for name in wanted if name not in tensors]
            if unknown or not wanted:
                given = f"there is no output {unknown[0]!r}" if unknown else "no output is wanted"
                raise CheckpointError(f"{given}; {self._model} returns {', '.join(tensors)}")
        self._taken = [name for name in tensors if name in wanted]
        self._left = [name for name in tensors if name not in wanted] if self._wanted is None else []
        return {name: tensors[name] for name in self._taken}

    def notes(self) -> list[str]:
        """What was left out though nobody asked for that."""
        if not self._left:
            return []
        both = " ".join(f"--output {name}" for name in (*self._taken, *self._left))
        return [f"left out as optimum does: {', '.join(self._left)} ({both}, outputs=[…], takes all)"]


def _renamed(traced: ExportableModel, signature: Signature, source: str) -> ExportableModel:
    """With the names that sessions ask for, which are no Python names (``past_key_values.0.key``)."""
    inputs = tuple(replace(s, name=signature.session_names.get(s.name, s.name)) for s in traced.inputs)
    outputs = tuple(signature.session_names.get(name, name) for name in traced.outputs)
    return replace(traced, inputs=inputs, outputs=outputs, source=source)


def load_model(path: Path, task: str | None = None, trust: bool = False) -> PreTrainedModel:
    """The model of a directory, in float32, complete; CheckpointError as in :func:`load`."""
    return _load_model(path, task, trust)[0]


def _load_model(path: Path, task: str | None, trust: bool) -> tuple[PreTrainedModel, list[str]]:
    """The model, and names of tensors that the directory holds and the model does not."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter, not a model: merge it first, "
            f"AutoPeftModel.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained('merged')"
        )
    config = _json(path / CONFIG)
    transformers = _transformers(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust, "output_loading_info": True}
    cls = _class(transformers, config, path, task, trust)
    with _quiet(), _no_larger_than_its_weights(path, config):
        try:
            model, info = cls.from_pretrained(path, dtype=torch.float32, **options)
            missing = _missing(model, info)
            if missing and all(".pooler." in f".{name}" for name in missing):
                # The head that the directory was saved with has no pooler: the encoder is complete without.
                model, info = cls.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False, **options)
                missing = _missing(model, info)
        except CheckpointError:
            raise
        except Exception as error:  # configurations and weights are free to be wrong in any way
            raise CheckpointError(
                f"{path}: transformers cannot load it ({type(error).__name__}: {one_line(error, 240)})"
            ) from error
    if missing:
        saved = some_of(config.get("architectures") or ["another class"])
        raise CheckpointError(
            f"{path} was saved as {saved} and lacks {len(missing)} tensor(s) of {type(model).__name__} "
            f"({some_of(missing)}), which would be random: choose the head that was trained (--task)"
        )
    unused = info["unexpected_keys"] if isinstance(info, Mapping) else info.unexpected_keys
    return model, sorted(unused)


@contextmanager
def _no_larger_than_its_weights(path: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile, a model that is far larger than the weights of its directory is given up.

    Raises:
        CheckpointError: what is built is far larger, or a number of layers or labels says that it would be.
    """
    files = [file for ending in ("*.safetensors", "*.bin") for file in path.glob(ending) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    for name, value in _numbers(config) if files else ():
        if value > size and _BUILT.search(name):
            raise CheckpointError(f"{path / CONFIG} has {name}={value}, for which there are too few weights beside it")
    message = f"with what {path / CONFIG} says, the model is far larger than its weights"
    with no_more_than(size, sum(map(_most_tensors, files)), message):
        yield


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of a configuration by its name, those of its parts too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value


def _most_tensors(file: Path) -> int:
    """How many tensors a file can hold at most, by the bytes that each needs to be named."""
    if file.suffix != ".safetensors":
        return file.stat().st_size // _BYTES_IN_ARCHIVE
    with kinds.opened(file) as stream:
        return int.from_bytes(stream.read(8), "little") // _BYTES_IN_HEADER


def _class(transformers: Any, config: Mapping[str, Any], path: Path, task: str | None, trust: bool) -> Any:
    """The class to load with: the one of the task, the saved one, or the automatic one for code of the directory."""
    named = [str(name) for name in config.get("architectures") or []]
    own = [name for name in named if _find(transformers, name, config) is not None]
    if config.get("auto_map") and not own and not trust:
        code = some_of(sorted({str(value) for value in config["auto_map"].values()}), 2)
        raise CheckpointError(
            f"{path} needs Python code that it brings along ({code}), which was not run; give --trust (trust=True) if "
            "you know who made it",
            advice=["--trust"],
        )
    if task is not None:
        return _attribute(transformers, TASKS[task])
    if own:
        return _find(transformers, own[0], config)
    if named and not config.get("auto_map"):
        raise CheckpointError(f"{path} was saved as {named[0]}, which transformers {transformers.__version__} lacks")
    wanted = [key for key in config.get("auto_map") or {} if key.startswith("AutoModel")]
    return getattr(transformers, wanted[-1] if wanted else "AutoModel")


def _find(transformers: Any, name: str, config: Mapping[str, Any]) -> Any:
    """A class of the library, also one that only its model's own module names (``WhisperEncoder``)."""
    found = _attribute(transformers, name)
    if found is None and name.isidentifier():
        kind = str(config.get("model_type", "")).replace("-", "_")
        module = getattr(getattr(transformers.models, kind, None), f"modeling_{kind}", None)
        found = getattr(module, name, None)
    return found if isinstance(found, type) and is_model_class(found) else None


def _attribute(transformers: Any, name: str) -> Any:
    """A class of the library by name, None if there is none.

    A torchvision that was built for another torch keeps every model from being imported, also those that need none of
    it: they are imported without it then, which is how an environment without torchvision imports them.
    """
    try:
        return getattr(transformers, name, None)
    except Exception as error:  # importing a model imports what is installed beside it, which may fail in any way
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if "torchvision" not in str(causes[-1]) or sys.modules.get("torchvision", error) is None:
            why = f"{type(causes[-1]).__name__}: {one_line(causes[-1], 160)}"
            raise CheckpointError(f"transformers cannot import {name} ({why})") from error
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's way to say that a module is not there
    for function in vars(transformers.utils.import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    return _attribute(transformers, name)


def is_model_class(cls: type) -> bool:
    """Whether a class is a model of transformers."""
    return issubclass(cls, nn.Module) and hasattr(cls, "from_pretrained")


def _missing(model: PreTrainedModel, info: Any) -> list[str]:
    """Tensors that were made up. Buffers that the model computes itself are none."""
    missing = info["missing_keys"] if isinstance(info, Mapping) else info.missing_keys
    mismatched = info["mismatched_keys"] if isinstance(info, Mapping) else info.mismatched_keys
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = [*missing, *(entry if isinstance(entry, str) else entry[0] for entry in mismatched)]
    return sorted(name for name in names if name in parameters)


def _processor(path: Path) -> dict[str, Any]:
    """What the files of tokenizers and image processors say; a later file adds to an earlier one."""
    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            found |= _json(path / name)
    for part in ("image_processor", "feature_extractor"):
        found |= found.get(part) or {}
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error, 120)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _transformers(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a directory of transformers, which is not installed ({one_line(error, 80)}): pip install "
            '"normfuse[hf]"'
        ) from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps remarks and progress bars of transformers off the terminal."""
    from transformers.utils import logging as own

    verbosity, disabled = own.get_verbosity(), logging.root.manager.disable
    bars = own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        own.set_verbosity(verbosity)
        if bars:
            own.enable_progress_bar()
