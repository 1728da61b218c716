"""Saving a trained model as data, and reading it as data: never running code that a file holds or names.

A checkpoint is a PT2 archive, what ``torch.export.save`` writes, with one record more: the names of inputs and outputs,
the dimensions, and what the live model gave on its example inputs. docs/checkpoint_format.md describes every part.

A digest of each record finds damage, not malice: whoever can change the file can change the digest too. Malice is met
by reading nothing but data, within bounds, and checking all of it before anything is built.
"""

from normfuse.checkpoint.capture import ExportableModel
from normfuse.checkpoint.errors import CheckpointError
from normfuse.checkpoint.inputs import Derived, Dimension, InputSpec, parse_input
from normfuse.checkpoint.loading import load
from normfuse.checkpoint.programs import from_program
from normfuse.checkpoint.saving import save
from normfuse.deprecation import deprecated_names

__all__ = [
    "CheckpointError",
    "Derived",
    "Dimension",
    "ExportableModel",
    "InputSpec",
    "from_program",
    "load",
    "parse_input",
    "save",
]

__getattr__ = deprecated_names(__name__, {"Checkpoint": "ExportableModel"})
