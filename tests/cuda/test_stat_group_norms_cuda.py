"""BatchNorm and its kin on a GPU: against the CPU in every layout, bit for bit from run to run, in CUDA graphs.

Everything here needs a GPU and a build with CUDA kernels, and is skipped without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from norms import makers
from test_cuda import TOLERANCE, assert_near, needs_gpu
from torch import Tensor, nn

from normfuse.nn import AdaptiveInstanceNorm, MaskedBatchNorm, RegionNorm

pytestmark = needs_gpu

NORMS: dict[str, Callable[[int], nn.Module]] = {
    **makers(static=True, channel_dim=1, window_size=3, warmup_iters=2),
    "ghosts, mean of all steps": partial(MaskedBatchNorm, channel_dim=1, ghost_size=2, momentum=None),
    "regions": RegionNorm,
    "pooled regions": lambda c: RegionNorm(c, pool="batch"),
    "style": lambda c: AdaptiveInstanceNorm(),
}
# Planes of a warp, of a block, odd ones, pieces of one; channels last; rows.
SHAPES = [(4, 7, 5, 5), (8, 64, 16, 16), (3, 33, 40, 40), (2, 3, 300, 300), (64, 192, 1, 1), (2000, 40, 1, 1)]


def step(norm: nn.Module, x: Tensor, dy: Tensor, mask: Tensor) -> list[Tensor]:
    """Forward and backward; result, gradients, statistics."""
    norm.zero_grad()
    x = x.detach().requires_grad_()
    if isinstance(norm, AdaptiveInstanceNorm):
        y = norm(x, dy, 0.5)
    elif isinstance(norm, RegionNorm):
        y = norm(x, mask[:, None])
    else:
        y = norm(x, mask)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *(b.clone() for b in norm.buffers())]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = torch.randn(2, *shape).to(dtype)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return x, dy, torch.rand(shape[0], *shape[2:]) < 0.3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gpu_equals_cpu(name: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    if name == "style" and shape[2] == 1:
        pytest.skip("one number has no deviation")
    on_cpu = NORMS[name](shape[1])
    on_cpu = on_cpu.double() if dtype == torch.float64 else on_cpu
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for _ in range(2):
        given = numbers(shape, dtype, channels_last)
        expected = step(on_cpu, *given)
        assert_near(step(on_gpu, *(t.cuda() for t in given)), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", NORMS)
def test_same_bits_from_run_to_run(name: str) -> None:
    given = [t.cuda() for t in numbers((32, 96, 28, 28), torch.float32, False)]
    fresh = NORMS[name](96).cuda()
    first = step(copy.deepcopy(fresh), *given)
    for _ in range(5):
        again = step(copy.deepcopy(fresh), *given)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", [name for name in NORMS if name != "style"])
def test_a_captured_step_equals_an_eager_one(name: str) -> None:
    norm = NORMS[name](24).cuda()
    static = [t.cuda() for t in numbers((8, 24, 14, 14), torch.float32, False)]
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step(norm, *static)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph, eager = torch.cuda.CUDAGraph(), copy.deepcopy(norm)
    with torch.cuda.graph(graph):
        captured = step(norm, *static)
    for _ in range(3):
        for to, source in zip(static, numbers((8, 24, 14, 14), torch.float32, False), strict=True):
            to.copy_(source)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(eager, *static), strict=True))
