"""The kernels on a GPU: against the CPU, over streams, in CUDA graphs, bit for bit, beyond 2^31 elements.

Everything here needs a GPU and a build with CUDA kernels, and is skipped without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from norms import running
from torch import Tensor, nn

import normfuse
from normfuse.nn.registry import NORMS as REGISTRY

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and normfuse.build_info()["available"] and normfuse.build_info()["cuda"]),
    reason="needs a GPU and a build with CUDA kernels",
)
pytestmark = needs_gpu

DEVICE = "cuda"


class AfterSum(nn.Module):
    """A norm without a residual of its own, after a plain add."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        s = x if residual is None else x + residual
        return self.norm(s) if residual is None else (self.norm(s), s)


def running_form(name: str, channels: int, groups: int | None = None, **options: object) -> nn.Module:
    """A norm of :func:`norms.running`, with groups where they divide the channels."""
    options |= {"group_num": groups if channels % groups == 0 else 1} if groups else {}
    return running(channels, name)[name](**options)


RUNNING: dict[str, Callable[..., nn.Module]] = {
    name: partial(running_form, name, groups=3 if name == "power" else None) for name in running(1)
}
RUNNING["power, one group"] = partial(running_form, "power", groups=1)
ROWS = {entry.name: entry.make for entry in REGISTRY}
NORMS: dict[str, Callable[..., nn.Module]] = {
    **RUNNING,
    **{name: partial(ROWS[name], eps=1e-3) for name in ("LayerNorm", "RMSNorm", "CRMSNorm")},
    "DyT": lambda c, **o: AfterSum(ROWS["DyT"](c, **o)),
    "Derf": lambda c, **o: AfterSum(ROWS["Derf"](c, shift=0.3, **o)),
}
# A warp a row, a block of 4 and of 16 warps, rows too wide to keep; aligned or not; few and many rows.
SHAPES = [
    (1, 1),
    (1, 8),
    (7, 5),
    (64, 33),
    (1000, 192),
    (197, 384),
    (513, 1023),
    (4096, 768),
    (300, 2304),
    (300, 4096),
    (5, 8200),
    (5, 8197),
]
# One rounding of the dtype for the result, and the sums of both sides in float32, which differ in order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-11}
STEPS = 9  # beyond warm-up, with the window filled


def step(
    norm: nn.Module, x: Tensor, dy: Tensor, pad_mask: Tensor | None = None, residual: Tensor | None = None
) -> list[Tensor]:
    """Forward and backward; results, gradients and every statistic."""
    norm.zero_grad()
    inputs = [tensor.detach().requires_grad_() for tensor in (x, residual) if tensor is not None]
    options = {} if pad_mask is None else {"pad_mask": pad_mask}
    results = norm(inputs[0], **options) if residual is None else norm(inputs[0], residual=inputs[1], **options)
    results = (results,) if residual is None else results
    torch.autograd.backward(results, [dy] * len(results))
    gradients = [tensor.grad for tensor in (*inputs, *norm.parameters())]
    return [*(result.detach() for result in results), *gradients, *(buffer.clone() for buffer in norm.buffers())]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    cancelling = max(actual[0].numel(), 1) ** 0.5  # what is left of a sum over everything, of terms of any sign
    for have, want in zip(actual, expected, strict=True):
        have, want = have.double().cpu(), want.double()
        least = cancelling if want.dim() == 0 else 1e-3
        scale = max(float(want.abs().max()), least) if want.numel() else 1.0
        torch.testing.assert_close(have, want, rtol=0, atol=tolerance * scale)


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("given", ["x", "mask", "residual", "mask and residual"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gpu_equals_cpu(name: str, shape: tuple[int, int], dtype: torch.dtype, given: str) -> None:
    if "mask" in given and name not in RUNNING:
        pytest.skip("rows have nothing to do with each other: there is no mask")
    on_cpu = NORMS[name](shape[1], dtype=torch.float64 if dtype == torch.float64 else None)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    for _ in range(STEPS if name in RUNNING else 1):
        x, dy, residual = torch.randn(3, *shape).to(dtype)
        tensors = [
            x,
            dy,
            torch.rand(shape[0]) < 0.3 if "mask" in given else None,
            residual if "residual" in given else None,
        ]
        expected = step(on_cpu, *tensors)
        actual = step(on_gpu, *(None if tensor is None else tensor.to(DEVICE) for tensor in tensors))
        assert_near(actual, expected, TOLERANCE[dtype])
        # Statistics feed back into the next step: compare each step from the same state.
        on_gpu.load_state_dict(on_cpu.state_dict())


@pytest.mark.parametrize("name", NORMS)
def test_empty_input(name: str) -> None:
    x = torch.zeros(0, 6, device=DEVICE)
    results = step(NORMS[name](6).to(DEVICE), x, x, residual=x)
    assert all(torch.isfinite(result.double()).all() for result in results)


@pytest.mark.parametrize("name", NORMS)
def test_unaligned_rows(name: str) -> None:
    """A view that starts between two 16-byte words takes the scalar path."""
    norm, other = NORMS[name](64).to(DEVICE), NORMS[name](64).to(DEVICE)
    x, dy = torch.randn(2, 100 * 64 + 1, device=DEVICE)
    shifted = step(norm, x[1:].view(100, 64), dy[1:].view(100, 64))
    aligned = step(other, x[1:].clone().view(100, 64), dy[1:].clone().view(100, 64))
    assert_near(shifted, [tensor.cpu() for tensor in aligned], TOLERANCE[torch.float32])


@pytest.mark.parametrize("channels", [384, 1536, 8192])
@pytest.mark.parametrize("name", NORMS)
def test_same_bits_from_run_to_run(name: str, channels: int) -> None:
    x, dy, residual = torch.randn(3, 1031, channels, device=DEVICE)
    first = step(NORMS[name](channels).to(DEVICE), x, dy, residual=residual)
    for _ in range(5):
        assert_same_bits(step(NORMS[name](channels).to(DEVICE), x, dy, residual=residual), first)


@pytest.mark.parametrize("name", NORMS)
def test_another_stream(name: str) -> None:
    """Work is queued on the current stream: behind a long kernel on it, results are still right."""
    x, dy = torch.randn(2, 2000, 192, device=DEVICE)
    expected = step(NORMS[name](192).to(DEVICE), x, dy)
    norm, stream = NORMS[name](192).to(DEVICE), torch.cuda.Stream()
    late_x, late_dy = torch.zeros_like(x), torch.zeros_like(dy)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_x.copy_(x)
        late_dy.copy_(dy)
        actual = step(norm, late_x, late_dy)
    stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", NORMS)
def test_a_captured_step_equals_an_eager_one(name: str) -> None:
    """Counters, windows and skips live on the device, so a replayed graph goes on exactly like the eager steps."""
    eager, captured = NORMS[name](96).to(DEVICE), NORMS[name](96).to(DEVICE)
    start = copy.deepcopy(captured.state_dict())
    tensors = torch.randn(3, 300, 96, device=DEVICE)
    x, dy, residual = tensors
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step(captured, x, dy, residual=residual)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, x, dy, residual=residual)
    captured.load_state_dict(start)
    for _ in range(STEPS):
        batch = torch.randn(3, 300, 96, device=DEVICE)
        tensors.copy_(batch)
        graph.replay()
        assert_same_bits(results, step(eager, batch[0], batch[1], residual=batch[2]))


@pytest.mark.parametrize("name", ["unified", "power, no groups", "LayerNorm", "Derf"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    norm = NORMS[name](64).to(DEVICE)
    x, dy = torch.randn(2, 500, 64, device=DEVICE)
    step(norm, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(norm, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["unified", "power, no groups", "LayerNorm", "RMSNorm"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    rows, channels = 2**21 + 3, 1024
    needed = 5 * 2 * rows * channels
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    norm = NORMS[name](channels).to(DEVICE)
    signs = torch.ones(channels, device=DEVICE)
    signs[::2] = -1.0
    x = signs.to(torch.bfloat16).repeat(rows, 1)
    x[-1] *= 2.0  # beyond 2^31
    y = norm(x.requires_grad_())
    y.backward(torch.ones_like(y))
    # The quadratic mean of every channel is 1 up to the last row, so y is ±1 there, and ±2 in the last row; norms along
    # the row make ±1 of that too. Weight gradients are the sums of y, up to eps.
    last = 2.0 if name in RUNNING else 1.0
    assert abs(float(y[0, -1]) - 1.0) < 2**-7 and abs(float(y[-1, -1]) - last) < 2**-6
    torch.testing.assert_close(norm.weight.grad, signs * (rows - 1 + last), rtol=1e-3, atol=0)
    if getattr(norm, "bias", None) is not None:
        torch.testing.assert_close(norm.bias.grad, torch.full_like(norm.bias.grad, rows), rtol=1e-5, atol=0)


def test_more_than_two_to_the_31_elements_of_a_dynamic_activation() -> None:
    rows, channels = 2**21 + 3, 1024
    needed = 5 * 2 * rows * channels
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    norm = ROWS["DyT"](channels).to(DEVICE)
    x = torch.zeros(rows, channels, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 64.0  # beyond 2^31; its tanh is 1, with slope 0
    y = norm(x.requires_grad_())
    y.backward(torch.ones_like(y))
    assert y[:-1].eq(0).all() and y[-1].eq(1).all() and x.grad[:-1].eq(0.5).all() and x.grad[-1].eq(0).all()
    torch.testing.assert_close(norm.weight.grad, torch.ones(channels, device=DEVICE))
    torch.testing.assert_close(norm.bias.grad, torch.full_like(norm.bias.grad, rows), rtol=1e-5, atol=0)
    assert abs(float(norm.alpha.grad)) < 1e-6


@pytest.mark.parametrize("name", ["unified", "power, no groups"])
def test_cuda_graph_trees(name: str) -> None:
    """``torch.compile(mode="reduce-overhead")`` over steps, statistics included."""
    eager = NORMS[name](64).to(DEVICE)
    compiled_norm = copy.deepcopy(eager)
    compiled = torch.compile(compiled_norm, mode="reduce-overhead", fullgraph=True)
    for _ in range(STEPS):
        x, dy = torch.randn(2, 200, 64, device=DEVICE)
        expected = [tensor.cpu() for tensor in step(eager, x, dy)]
        x = x.detach().requires_grad_()
        compiled_norm.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.backward(dy)
        gradients = [parameter.grad for parameter in compiled_norm.parameters()]
        assert_near([y.detach(), x.grad, *gradients, *compiled_norm.buffers()], expected, TOLERANCE[torch.float32])
