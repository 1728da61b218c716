"""LayerNorm, RMSNorm and CRMSNorm on a GPU: against the CPU, over streams, in CUDA graphs, bit for bit, and large.

Everything here needs a GPU and a build with CUDA kernels, and is skipped without them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_cuda import TOLERANCE, assert_near, needs_gpu
from torch import Tensor, nn

from normfuse.nn import CRMSNorm, LayerNorm, RMSNorm

pytestmark = needs_gpu

NORMS = {"layer": LayerNorm, "rms": RMSNorm, "crms": CRMSNorm}
# A warp a row, a block of 4 and of 16 warps, rows too wide to keep; aligned or not; few and many rows.
SHAPES = [
    (1, 8),
    (7, 5),
    (64, 33),
    (1000, 192),
    (4096, 768),
    (513, 1023),
    (300, 2056),
    (300, 4096),
    (5, 8200),
    (5, 8197),
]


def step(norm: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Forward and backward; results and gradients."""
    norm.zero_grad()
    inputs = [tensor.detach().requires_grad_() for tensor in (x, residual) if tensor is not None]
    results = norm(*inputs)
    results = (results,) if residual is None else results
    torch.autograd.backward(results, [dy] * len(results))
    return [*(t.detach() for t in results), *(t.grad for t in inputs), *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gpu_equals_cpu(name: str, shape: tuple[int, int], dtype: torch.dtype, with_residual: bool) -> None:
    on_cpu = NORMS[name](shape[1], eps=1e-3, dtype=torch.float64 if dtype == torch.float64 else None)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, dy, residual = torch.randn(3, *shape).to(dtype)
    expected = step(on_cpu, x, dy, residual if with_residual else None)
    actual = step(on_gpu, x.cuda(), dy.cuda(), residual.cuda() if with_residual else None)
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", NORMS)
def test_empty_input(name: str) -> None:
    x = torch.zeros(0, 6, device="cuda")
    results = step(NORMS[name](6).cuda(), x, x, x)
    assert all(torch.isfinite(result).all() for result in results) and results[-1].eq(0).all()


@pytest.mark.parametrize("channels", [384, 1536, 8192])
@pytest.mark.parametrize("name", NORMS)
def test_same_bits_from_run_to_run(name: str, channels: int) -> None:
    x, dy, residual = torch.randn(3, 1031, channels, device="cuda")
    norm = NORMS[name](channels).cuda()
    first = [tensor.clone() for tensor in step(norm, x, dy, residual)]
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(norm, x, dy, residual), strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_another_stream(name: str) -> None:
    x, dy = torch.randn(2, 2000, 192, device="cuda")
    norm, stream = NORMS[name](192).cuda(), torch.cuda.Stream()
    expected = [tensor.clone() for tensor in step(norm, x, dy)]
    late_x, late_dy = torch.zeros_like(x), torch.zeros_like(dy)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_x.copy_(x)
        late_dy.copy_(dy)
        actual = step(norm, late_x, late_dy)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_a_captured_step_equals_an_eager_one(name: str) -> None:
    norm = NORMS[name](96).cuda()
    static = [torch.randn(300, 96, device="cuda") for _ in range(3)]
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step(norm, *static)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(norm, *static)
    for _ in range(3):
        batch = [torch.randn(300, 96, device="cuda") for _ in range(3)]
        for to, source in zip(static, batch, strict=True):
            to.copy_(source)
        graph.replay()
        results = [tensor.clone() for tensor in captured]
        assert all(torch.equal(a, b) for a, b in zip(results, step(norm, *batch), strict=True))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    rows, channels = 2**21 + 3, 1024
    needed = 5 * 2 * rows * channels
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    norm = NORMS[name](channels).cuda()
    x = torch.ones(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[:, ::2] = -1.0
    x[-1] *= 4.0  # beyond 2^31; a row's size does not matter to its norm
    y = norm(x.requires_grad_())
    y.backward(torch.ones_like(y))
    assert torch.equal(y[-1], y[0]) and float(y[-1, -1].detach()) == 1.0
    signs = torch.ones(channels, device="cuda")
    signs[::2] = -1.0
    torch.testing.assert_close(norm.weight.grad, signs * rows, rtol=1e-4, atol=0)
