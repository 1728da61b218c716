"""One transfer rule per kind of operation.

The order of the imports is the order in which rules are tried: ``mul`` by a constant is an affine map before it is a
gate, ``matmul`` by a weight a projection before it is a mixture.
"""

from . import affine, carry, parts, averages, order, powers, dynamic, weights, products  # noqa: F401, I001
from . import combine, writes, attention, recurrent  # noqa: F401
from .base import Match, Opaque, Use, match

__all__ = ["Match", "Opaque", "Use", "match"]
