"""``y, s = norm(x, residual=r)`` of Unified and Power Norm is ``s = x + r; y = norm(s)``, in one pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from normfuse.nn import UnifiedNorm, calibrate, monitor
from tests.norms import running

C = 6
MAKE = running(C, "unified", "power", "power, no groups")


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def leaves(*shape, dtype=torch.float32):
    return [torch.randn(*shape).to(dtype).requires_grad_() for _ in range(2)]


def apart(norm, x, residual, pad_mask=None):
    s = x + residual
    return norm(s, pad_mask), s


def together(norm, x, residual, pad_mask=None):
    return norm(x, pad_mask, residual=residual)


def step(call, norm, x, residual, dy, ds, pad_mask=None):
    """Results, gradients and statistics of one training step."""
    norm.zero_grad()
    x, residual = (tensor.detach().requires_grad_() for tensor in (x, residual))
    y, s = call(norm, x, residual, pad_mask)
    torch.autograd.backward((y, s), (dy, ds))
    parameters = [parameter.grad for parameter in norm.parameters()]
    return [y, s, x.grad, residual.grad, *parameters, *(buffer.clone() for buffer in norm.buffers())]


def assert_same(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2**-6)], ids=str
)
def test_five_steps(make, dtype, tolerance, masked, implementation):
    """The gradient of a bfloat16 sum is rounded once instead of twice."""
    one = make(dtype=torch.float64 if dtype == torch.float64 else None)
    two = copy.deepcopy(one)
    for _ in range(5):
        tensors = [torch.randn(4, 3, C).to(dtype) for _ in range(4)]
        mask = torch.rand(4, 3) < 0.3 if masked else None
        assert_same(step(together, one, *tensors, mask), step(apart, two, *tensors, mask), tolerance)


@pytest.mark.parametrize(
    "options", [{"channel_dim": 1}, {"ghost_size": 2}, {"skip_nonfinite": True}, {"affine": False}]
)
def test_options(make, options, implementation):
    one, two = make(**options), make(**options)
    shape = (4, C, 5) if "channel_dim" in options else (4, 5, C)
    for _ in range(4):
        tensors = torch.randn(4, *shape)
        assert_same(step(together, one, *tensors), step(apart, two, *tensors), 1e-5)


def test_evaluation(make):
    norm = make().eval()
    x, residual = leaves(5, C)
    y, s = norm(x, residual=residual)
    assert torch.equal(s, x + residual) and torch.equal(y, norm(s))
    program = torch.export.export(norm, (x, None, residual))
    assert not any("normfuse" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("used", ["y", "s"])
def test_either_result_may_go_unused(make, used, implementation):
    """Where nothing comes back through the norm, its gradient statistics stay."""
    one, two = make(), make()
    dy = torch.randn(5, C)
    for norm, call in ((one, together), (two, apart)):
        torch.manual_seed(3)
        x, residual = leaves(5, C)
        call(norm, x, residual)[used == "s"].backward(dy)
        norm.inputs = x.grad, residual.grad
    assert_same(one.inputs, two.inputs, 1e-6)
    assert_same(list(one.buffers()), list(two.buffers()), 1e-6)
    assert one.ema_gz.any() == (used == "y")


def test_what_is_kept_for_backward(make):
    """s in place of x: nothing more."""
    norm = make()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda index: index):
        _, s = norm(*leaves(50, C)[:1], residual=leaves(50, C)[0])
    assert [t.data_ptr() for t in kept if t.numel() >= 50 * C] == [s.data_ptr()]


def test_compiled(make):
    one, two = make(), make()

    def block(x, residual):
        y, s = one(x, residual=residual)
        return y.relu() + s

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    for _ in range(4):
        x, residual, dy = torch.randn(3, 5, C)
        inputs = [x.requires_grad_(), residual.requires_grad_()]
        gradients = torch.autograd.grad(compiled(x, residual), [*inputs, *one.parameters()], dy)
        y, s = apart(two, x, residual)
        expected = torch.autograd.grad(y.relu() + s, [*inputs, *two.parameters()], dy)
        assert_same(gradients, expected, 1e-5)
        assert_same(list(one.buffers()), list(two.buffers()), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(make, reentrant, implementation):
    one, two = make(), make()
    for _ in range(4):
        tensors = torch.randn(4, 5, C)

        def through(norm, x, residual, pad_mask):
            return checkpoint(lambda x, r: together(norm, x, r), x, residual, use_reentrant=reentrant)

        assert_same(step(through, one, *tensors), step(together, two, *tensors), 1e-6)


def test_shared_statistics(make, tmp_path):
    """With a process group the add is PyTorch's; here a group of one."""
    from normfuse.ops import PowerNormState, UnifiedNormState, power_norm, unified_norm

    one, two = make(), make()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:

        def shared(norm, x, residual, pad_mask):
            kind, names = (
                (unified_norm, UnifiedNormState) if isinstance(norm, UnifiedNorm) else (power_norm, PowerNormState)
            )
            state = names(**{name: getattr(norm, name) for name in names._fields})
            options = {"warmup_iters": 2} | ({"group_num": norm.group_num} if kind is power_norm else {})
            return kind(
                x, norm.weight, norm.bias, state, training=True, residual=residual, process_group=dist.group.WORLD,
                **options,
            )  # fmt: skip

        for _ in range(3):
            tensors = torch.randn(4, 5, C)
            assert_same(step(shared, one, *tensors), step(apart, two, *tensors), 1e-5)
    finally:
        dist.destroy_process_group()


class Model(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        y, s = self.norm(x, residual=3 * x)
        return y + s


def test_what_looks_at_a_norms_input_sees_the_sum(make):
    batches = [torch.randn(20, C) for _ in range(3)]
    one, other = Model(make()), make()
    calibrate(one, batches, progress=False)
    calibrate(torch.nn.Sequential(other), [4 * x for x in batches], progress=False)
    assert_same(list(one.norm.buffers()), list(other.buffers()), 1e-5)
    with monitor(one, every=1) as watch:
        one(batches[0])
    q = (4 * batches[0]).square().mean() if not getattr(one.norm, "group_num", None) else torch.tensor(1.0)
    assert watch.to_json()["layers"]["norm"]["batch"][0] == pytest.approx(q.item(), rel=1e-3)


class Additions(TorchDispatchMode):
    """Counts additions of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.add.Tensor and result.shape == self.shape
        return result


def test_watching_adds_the_residual_only_where_it_records(make):
    norm, (x, residual) = make(), leaves(5, C)
    with monitor(norm, every=3):
        for recorded in (True, False, False, True):
            with Additions(x.shape) as additions:
                norm(x, residual=residual)
            assert additions.count == recorded


def test_refusals(make):
    x = torch.randn(3, C)
    for norm in (make(), make().eval()):
        with pytest.raises(ValueError, match=r"residual is torch.float32 of shape \(1, 6\).*must be like x"):
            norm(x, residual=x[:1])
        with pytest.raises(ValueError, match=r"residual is torch.float64.*must be like x, torch.float32"):
            norm(x, residual=x.double())
