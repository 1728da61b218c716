"""The modules under torch.compile (training) and torch.export (evaluation)."""

import copy

import pytest
import torch
from torch import nn

from normfuse.nn import PowerNorm, UnifiedNorm

C = 6
CASES = {
    "unified": lambda: UnifiedNorm(C, warmup_iters=2, window_size=2, outlier_filtration=True),
    "power": lambda: PowerNorm(C, warmup_iters=3, group_num=2),
    "power, no group scaling": lambda: PowerNorm(C, warmup_iters=3, group_num=None, backward="paper"),
    "unified, channels first": lambda: UnifiedNorm(C, warmup_iters=2, window_size=3, channel_dim=1),
    "power, channels first": lambda: PowerNorm(C, warmup_iters=3, group_num=3, channel_dim=1),
}


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner = nn.Linear(4, C)
        self.norm = norm
        self.outer = nn.Linear(C, 4)

    def forward(self, x, pad_mask=None):
        hidden = self.inner(x)
        if self.norm.channel_dim == 1:
            hidden = self.norm(hidden.transpose(1, 2), pad_mask).transpose(1, 2)
        else:
            hidden = self.norm(hidden, pad_mask)
        return self.outer(hidden)


def states_near(a, b):
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "aot_eager") for case in CASES), ("unified", "inductor"), ("power, channels first", "inductor")],
)
def test_compiled_training_equals_eager(case, backend):
    """Whole graph, forward and backward, state included, and no compilation once the shapes are known to vary."""
    torch.compiler.reset()
    eager = Block(CASES[case]()).double()
    inside = copy.deepcopy(eager)
    compiled = torch.compile(inside, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (eager, inside)]
    for step in range(50):
        shape = (2 + step % 3, 5 - step % 2)
        x = torch.randn(*shape, 4, dtype=torch.float64)
        pad_mask = torch.rand(shape) < 0.3
        stance = "default" if step < 3 else "fail_on_recompile"
        outputs = []
        with torch.compiler.set_stance(stance):
            for call, optimizer in ((eager, optimizers[0]), (compiled, optimizers[1])):
                optimizer.zero_grad()
                y = call(x, pad_mask)
                y.square().mean().backward()
                optimizer.step()
                outputs.append(y.detach())
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
        states_near(inside, eager)


def test_compiled_forward_twice_before_backward():
    torch.compiler.reset()
    for case in ("unified", "power"):
        eager = CASES[case]().double()
        inside = copy.deepcopy(eager)
        compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
        inputs = torch.randn(4, 2, 7, C, dtype=torch.float64)
        for first, second in (inputs[:2], inputs[2:]):
            for call in (eager, compiled):
                (call(first).sin().sum() + call(second).cos().sum()).backward()
            states_near(inside, eager)
        torch.testing.assert_close(inside.weight.grad, eager.weight.grad)


AFFINE = ["aten.add.Tensor", "aten.rsqrt.default", "aten.mul.Tensor", "aten.addcmul.default"]


def exported(norm, x):
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    dynamic = {0: batch, (1 if norm.channel_dim == -1 else 2): sequence}
    return torch.export.export(norm.eval(), (x,), dynamic_shapes=(dynamic,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_evaluation_exports_as_plain_aten(case, dtype):
    norm = CASES[case]()

    def make(batch, sequence):
        shape = (batch, C, sequence) if norm.channel_dim == 1 else (batch, sequence, C)
        return torch.randn(shape)

    for _ in range(3):
        norm(make(4, 3).requires_grad_()).sum().backward()
    norm.to(dtype)
    program = exported(norm, make(3, 5).to(dtype))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(str(target).startswith("aten.") for target in calls), calls
    if case in ("unified", "power, no group scaling") and dtype != torch.bfloat16:
        assert [str(target) for target in calls] == AFFINE
    assert not program.graph_signature.buffers_to_mutate
    for shape in ((2, 9), (7, 2), (1, 1)):
        x = make(*shape).to(dtype)
        assert torch.equal(program.module()(x), norm(x))


def test_exported_mask_is_of_no_consequence():
    norm = CASES["unified"]().eval()
    x, pad_mask = torch.randn(3, 5, C), torch.zeros(3, 5, dtype=torch.bool)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    shapes = ({0: batch, 1: sequence}, {0: batch, 1: sequence})
    program = torch.export.export(norm, (x, pad_mask), dynamic_shapes=shapes)
    x = torch.randn(2, 7, C)
    assert torch.equal(program.module()(x, torch.ones(2, 7, dtype=torch.bool)), norm(x))
