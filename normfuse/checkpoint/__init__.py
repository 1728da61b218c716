"""Saving a trained model as data, and building it again from data: never from code in the file.

A checkpoint is what ``torch.save`` writes for a dictionary of tensors and strings, so that
``torch.load(path, weights_only=True)`` reads it:

==============  ==================================================================================
``format``      the string ``"normfuse checkpoint"``
``version``     the format's version, an integer (1)
``metadata``    a JSON object: ``factory`` and ``kwargs`` (how to build the module), ``inputs`` (name, dtype,
                dimensions), ``extra_dtypes`` (dtypes of buffers that are not in the state_dict),
                ``written_with``
``state_dict``  the module's tensors by name
``examples``    the example inputs by name
``sha256``      a digest over all of the above: names, dtypes, shapes, bytes and the metadata
==============  ==================================================================================

The digest finds damage, not malice: whoever can change the file can change the digest too. Malice is met by
never running anything the file holds.
"""

from normfuse.checkpoint.archive import CheckpointError
from normfuse.checkpoint.capture import Checkpoint
from normfuse.checkpoint.inputs import Derived, Dimension, InputSpec, parse_input
from normfuse.checkpoint.loading import load
from normfuse.checkpoint.saving import save

__all__ = ["Checkpoint", "CheckpointError", "Derived", "Dimension", "InputSpec", "load", "parse_input", "save"]
