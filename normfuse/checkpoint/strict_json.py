"""JSON of unknown origin."""

from __future__ import annotations

import json
import math
from typing import Any

from normfuse.checkpoint.errors import CheckpointError
from normfuse.errors import one_line

_INT64 = 1 << 63


def parse_json(data: bytes, what: str) -> Any:
    """A JSON text in UTF-8: no key twice, no NaN, integers of 64 bits, finite numbers. CheckpointError otherwise."""
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON of the allowed form ({one_line(error, 120)})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > 20 or not -_INT64 <= int(text) < _INT64:
        raise ValueError("an integer has more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
