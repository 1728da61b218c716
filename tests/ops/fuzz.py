"""Calls every compiled operation with arguments that nobody means, between pages that nobody may touch.

Tensors end, or begin, at a page without access: a byte read or written beyond them ends the process. Run as a program:
``python tests/ops/fuzz.py ROUNDS SEED``; prints how many calls were carried out and how many refused, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from raw_operations import OPERATIONS, Sizes, arguments, call

import normfuse.ops  # noqa: F401  (declares the operations)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 64, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, -1e-5, 0.0, 1e-300, 1e300)
SIZES = (0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 65, 130)
PROT_NONE = 0

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Memory for tensors, between two pages without access; as long as this lives."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def copy(self, tensor: torch.Tensor, at_the_end: bool) -> torch.Tensor:
        """The contiguous tensor in guarded memory."""
        bytes_needed = tensor.numel() * tensor.element_size()
        if bytes_needed == 0:
            return tensor.clone()
        inner = -(-bytes_needed // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        self._maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + mmap.PAGESIZE + inner):
            if libc.mprotect(page, mmap.PAGESIZE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = start + mmap.PAGESIZE + (inner - bytes_needed if at_the_end else 0)
        buffer = (ctypes.c_char * bytes_needed).from_address(first)
        return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def sizes(pick: random.Random) -> Sizes:
    groups = pick.choice((1, 2, 3))
    channels = groups * max(pick.choice(SIZES), 1)
    others = [pick.choice(SIZES) for _ in range(2)]
    return Sizes(others[0], channels, others[1], max(pick.choice(SIZES), 1), pick.choice((1, 2, 4)), groups, 2)


def another_tensor(pick: random.Random, value: torch.Tensor) -> torch.Tensor | None:
    """Something that could stand in the place of ``value``."""
    kind = pick.randrange(9)
    if kind == 0:
        return None
    if kind == 1:
        return value.to(pick.choice(OTHER_DTYPES))
    if kind == 2:
        return torch.zeros([pick.choice(SIZES) for _ in range(pick.randrange(4))], dtype=value.dtype)
    if kind == 3:  # without a stride it may be as large as it likes
        return torch.zeros((), dtype=value.dtype).expand([pick.choice((1, 2**20, 2**31)) for _ in value.shape])
    if kind == 4:
        return torch.zeros([0, *(pick.choice((1, 2**20, 2**40, 2**62)) for _ in value.shape[1:])], dtype=value.dtype)
    if kind == 5:
        freed = value.clone()
        freed.untyped_storage().resize_(pick.choice((0, max(freed.untyped_storage().nbytes() - 1, 0))))
        return freed
    if kind == 6 and value.dim() > 1:
        return value.transpose(0, -1)
    if kind == 7:
        return value.reshape(-1)[:-1]
    return torch.cat([value.reshape(-1), value.reshape(-1)]).view(2, *value.shape)


def changed(pick: random.Random, value: object) -> object:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.int64 and pick.random() < 0.7:
            return torch.full_like(value, pick.choice(INTEGERS))
        if value.is_floating_point() and pick.random() < 0.3:
            return torch.full_like(value, pick.choice(FLOATS))
        return another_tensor(pick, value)
    if isinstance(value, bool):
        return not value
    return pick.choice(INTEGERS) if isinstance(value, int) else pick.choice((*FLOATS, None))


def attempt(pick: random.Random, name: str) -> str:
    """One call: what became of it."""
    given = arguments(name, pick.choice(DTYPES), sizes(pick))
    for argument in pick.sample(list(given), pick.choice((0, 1, 1, 2))):
        try:
            given[argument] = changed(pick, given[argument])
        except RuntimeError:  # torch makes no such tensor
            continue
    guarded, at_the_end = Guarded(), pick.random() < 0.8
    for argument, value in given.items():
        if not isinstance(value, torch.Tensor) or not value.is_contiguous():
            continue
        held = value.untyped_storage().nbytes()
        if held and value.numel() * value.element_size() <= held:
            given[argument] = guarded.copy(value, at_the_end)
    try:
        call(name, given)
    except (RuntimeError, TypeError, MemoryError):
        return "refused"
    return "carried out"


def main(rounds: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "libasan" not in Path("/proc/self/maps").read_text():  # whose shadow takes terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    torch.set_num_threads(1)
    found: dict[str, Counter[str]] = {name: Counter() for name in OPERATIONS}
    for number in range(rounds):
        for name in OPERATIONS:
            pick = random.Random(f"{seed} {number} {name}")
            torch.manual_seed(number)
            print(f"{seed} {number} {name}", file=sys.stderr)  # the last line says which call ended the process
            found[name][attempt(pick, name)] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
