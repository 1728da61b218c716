"""Writing a checkpoint: data only, whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from normfuse.checkpoint import program_file
from normfuse.checkpoint.capture import ExportableModel
from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.pt2.reader import Archive
from normfuse.errors import one_line
from normfuse.files import Output
from normfuse.folding.regions import open_regions


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    factory: None = None,
    kwargs: None = None,
) -> None:
    """Save a model as data: its program, traced in evaluation mode, and the outputs of the live model on the examples.

    The file (docs/checkpoint_format.md) is a PT2 archive: other tools open it with ``torch.export.load``. Neither the
    model's class nor its arguments are needed to load it, so classes of the running script, ``nn.Sequential``, hooked,
    parametrised and wrapped modules are saved as they are.

    Args:
        model: the trained module, on any device, in any mode; it is left as it is. Wrappers of training (torch.compile,
            DistributedDataParallel) are taken off.
        path: the file to write. It appears under this name only when it is complete.
        example_inputs: what ``model.forward`` takes, see :meth:`ExportableModel.from_model`. They are stored, and
            exporting verifies on them.
        dynamic_shapes: which dimensions may vary, as torch.export takes them: by input name or in order, an
            ``{axis: dim}`` per input, where a plain name serves as well as ``torch.export.Dim``. None: all fixed.
        factory: an argument of earlier versions; an error if it is given.
        kwargs: an argument of earlier versions; an error if it is given.

    Raises:
        CheckpointError: the model fails on the examples, cannot be traced, holds invalid numbers (not finite, a
            negative variance) or objects that are not data, or the file cannot be written. No file is left then.

    Example:
        >>> import normfuse
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> normfuse.save(model, "model.pt", example_inputs=torch.randn(3, 4), dynamic_shapes=({0: "batch"},))
    """
    for name, value in (("factory", factory), ("kwargs", kwargs)):
        if value is not None:
            raise CheckpointError(
                f"save takes no {name}= any more: the file holds the model's program, which needs neither its class "
                "nor its arguments; leave it out"
            )
    with Output(path, error=CheckpointError) as output:  # before the work: it says what cannot be written
        traced = ExportableModel.from_model(model, example_inputs, dynamic_shapes)
        checkpoint = replace(traced, program=open_regions(traced.program))  # casts are data, autocast is not
        try:
            with output.staged.open("xb") as file:
                program_file.write(checkpoint, file)
            with output.staged.open("rb") as file:
                program_file.read(Archive(file, str(path)))  # a file that cannot be read again must not be kept
        except CheckpointError:
            raise
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise CheckpointError(
                f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}"
            ) from error
        output.publish()
