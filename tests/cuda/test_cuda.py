"""The kernels on a GPU: against the CPU, over streams, in CUDA graphs, bit for bit, beyond 2^31 elements.

Everything here needs a GPU and a build with CUDA kernels, and is skipped without them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normfuse import _native
from normfuse.nn import PowerNorm, UnifiedNorm

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.available and _native.build_info()["cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)
pytestmark = needs_gpu

NORMS = {
    "unified": lambda c: UnifiedNorm(c, window_size=3, warmup_iters=5),
    "unified-filtered": lambda c: UnifiedNorm(c, window_size=3, warmup_iters=5, outlier_filtration=True),
    "power": lambda c: PowerNorm(c, group_num=None, warmup_iters=5),
    "power-grouped": lambda c: PowerNorm(c, group_num=1, warmup_iters=5),
    "power-groups": lambda c: PowerNorm(c, group_num=3 if c % 3 == 0 else 1, warmup_iters=5),
}
SHAPES = [(1, 1), (1, 8), (7, 5), (64, 33), (1000, 192), (197, 384), (513, 1023), (4096, 768), (300, 2304), (5, 8200)]
# One rounding of the dtype for the result, and the sums of both sides in float32, which differ in order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-11}
STEPS = 9  # beyond warm-up, with the window filled


def step(norm: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Forward and backward; result, gradients and every statistic."""
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x, mask)
    y.backward(dy)
    gradients = [parameter.grad for parameter in norm.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in norm.buffers())]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for have, want in zip(actual, expected, strict=True):
        have, want = have.double().cpu(), want.double()
        scale = max(float(want.abs().max()), 1e-3) if want.numel() else 1.0
        torch.testing.assert_close(have, want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gpu_equals_cpu(name: str, shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    on_cpu = NORMS[name](shape[1])
    on_cpu = on_cpu.double() if dtype == torch.float64 else on_cpu
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for _ in range(STEPS):
        x, dy = torch.randn(2, *shape).to(dtype)
        mask = torch.rand(shape[0]) < 0.3 if masked else None
        expected = step(on_cpu, x, dy, mask)
        actual = step(on_gpu, x.cuda(), dy.cuda(), None if mask is None else mask.cuda())
        # Statistics feed back into the next step: compare each step from the same state.
        assert_near(actual, expected, TOLERANCE[dtype])
        on_gpu.load_state_dict(on_cpu.state_dict())


@pytest.mark.parametrize("name", NORMS)
def test_empty_input(name: str) -> None:
    norm = NORMS[name](6).cuda()
    results = step(norm, torch.zeros(0, 6, device="cuda"), torch.zeros(0, 6, device="cuda"))
    assert all(torch.isfinite(result.double()).all() for result in results)


@pytest.mark.parametrize("name", NORMS)
def test_unaligned_rows(name: str) -> None:
    """A view that starts between two 16-byte words takes the scalar path."""
    norm, other = NORMS[name](64).cuda(), NORMS[name](64).cuda()
    x, dy = torch.randn(2, 100 * 64 + 1, device="cuda")
    shifted = step(norm, x[1:].view(100, 64), dy[1:].view(100, 64))
    aligned = step(other, x[1:].clone().view(100, 64), dy[1:].clone().view(100, 64))
    assert_near(shifted, [tensor.cpu() for tensor in aligned], TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", NORMS)
def test_same_bits_from_run_to_run(name: str) -> None:
    x, dy = torch.randn(2, 4099, 384, device="cuda")
    first = step(NORMS[name](384).cuda(), x, dy)
    for _ in range(5):
        again = step(NORMS[name](384).cuda(), x, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_another_stream(name: str) -> None:
    """Work is queued on the current stream: behind a long kernel on it, results are still right."""
    x, dy = torch.randn(2, 2000, 192, device="cuda")
    expected = step(NORMS[name](192).cuda(), x, dy)
    norm, stream = NORMS[name](192).cuda(), torch.cuda.Stream()
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
    """Counters, windows and skips live on the device, so a replayed graph goes on exactly like the eager steps."""
    eager, captured = NORMS[name](96).cuda(), NORMS[name](96).cuda()
    x = torch.randn(300, 96, device="cuda", requires_grad=True)
    dy, warm_up = torch.randn(300, 96, device="cuda"), torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            captured.zero_grad()
            x.grad = None
            captured(x).backward(dy)
    torch.cuda.current_stream().wait_stream(warm_up)
    captured.reset_running_stats()
    captured.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(x)
        y.backward(dy)
    captured.reset_running_stats()
    for _ in range(STEPS):
        batch, gradient = torch.randn(2, 300, 96, device="cuda")
        with torch.no_grad():
            x.copy_(batch)
            dy.copy_(gradient)
            for parameter in [x, *captured.parameters()]:
                parameter.grad.zero_()
        graph.replay()
        expected = step(eager, batch, gradient)
        gradients = [x.grad, *(parameter.grad for parameter in captured.parameters())]
        actual = [y.detach(), *gradients, *captured.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["unified", "power"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    norm = NORMS[name](64).cuda()
    x, dy = torch.randn(2, 500, 64, device="cuda")
    step(norm, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(norm, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["unified", "power"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    rows, channels = 2**21 + 3, 1024
    needed = 5 * 2 * rows * channels
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    norm = NORMS[name](channels).cuda()
    x = torch.ones(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[-1] = 2.0  # beyond 2^31
    y = norm(x.requires_grad_())
    y.backward(torch.ones_like(y))
    # q = 1 up to the last row, so y is 1, and 2 in the last row; every weight gradient is the sum of y.
    assert float(y[0, 0]) == 1.0 and float(y[-1, -1]) == 2.0
    torch.testing.assert_close(norm.bias.grad, torch.full_like(norm.bias.grad, rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.weight.grad, torch.full_like(norm.weight.grad, rows + 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["unified", "power"])
def test_cuda_graph_trees(name: str) -> None:
    """``torch.compile(mode="reduce-overhead")`` over steps, statistics included."""
    eager = NORMS[name](64).cuda()
    compiled_norm = copy.deepcopy(eager)
    compiled = torch.compile(compiled_norm, mode="reduce-overhead", fullgraph=True)
    for _ in range(STEPS):
        x, dy = torch.randn(2, 200, 64, device="cuda")
        expected = [tensor.cpu() for tensor in step(eager, x, dy)]
        x = x.detach().requires_grad_()
        compiled_norm.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.backward(dy)
        gradients = [parameter.grad for parameter in compiled_norm.parameters()]
        assert_near([y.detach(), x.grad, *gradients, *compiled_norm.buffers()], expected, TOLERANCE[torch.float32])
