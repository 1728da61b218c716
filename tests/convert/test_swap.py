"""swap_norms: what is found, what is kept of it, what is refused."""

import copy
import re

import pytest
import torch
from torch import nn

from normfuse.convert import Schedule, progressive, swap_norms
from normfuse.nn import (
    Derf,
    DyT,
    EstimatedBatchNorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    UnifiedNorm,
)

C = 8


class LlamaLikeRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-4

    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GemmaLikeRMSNorm(LlamaLikeRMSNorm):
    def forward(self, x):
        return (1 + self.weight) * nn.functional.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Both layouts under one name, as ConvNext has it."""

    def __init__(self, size, first):
        super().__init__(size)
        self.first = first

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if self.first else super().forward(x)


class GainAndBiasLayerNorm(nn.Module):
    """Parameters of four axes with names of their own, on channels first."""

    def __init__(self, size):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, size, 1, 1)), nn.Parameter(torch.zeros(1, size, 1, 1))
        self.eps = 1e-5

    def forward(self, x):
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.g + self.b


class UnitLengthRMSNorm(nn.Module):
    """Divides by the length, not by the root mean square."""

    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * self.gamma


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm and its activation in one class, as in timm."""

    def __init__(self, size, act=None):
        super().__init__(size)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class LayerNormAct2d(LayerNorm2d):
    def __init__(self, size):
        super().__init__(size)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class HiddenReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class ActFirst(BatchNormAct2d):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, self.act(x))


class GroupedRMSNorm(LlamaLikeRMSNorm):
    def forward(self, x):
        halves = x.unflatten(-1, (2, -1))
        return self.weight * nn.functional.rms_norm(halves, halves.shape[-1:]).flatten(-2)


def model():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv", nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, eps=1e-3), LayerNorm2d(C)))
    net.add_module("flat", nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (-1,))))
    net.add_module("turn", Transposed())
    net.add_module("norms", nn.Sequential(nn.LayerNorm(C, eps=1e-6), nn.RMSNorm(C), LlamaLikeRMSNorm(C)))
    net.add_module("plain", nn.LayerNorm(C, elementwise_affine=False))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_every_norm_is_found_and_keeps_what_it_learned():
    net = model().double()
    before = {name: value.clone() for name, value in net.named_parameters()}
    net.norms[0].weight.requires_grad_(False)
    net.norms[1].eval()
    report = swap_norms(net, to="unified", warmup_iters=7)
    assert [s.name for s in report.swaps] == ["conv.1", "conv.2", "norms.0", "norms.1", "norms.2", "plain"]
    assert [s.before for s in report.swaps][-2:] == ["LlamaLikeRMSNorm", "LayerNorm"]
    assert "conv.1: BatchNorm2d -> UnifiedNorm (8 channels)" in str(report) and report.kept == []
    norms = [module for module in net.modules() if isinstance(module, UnifiedNorm)]
    assert len(norms) == 6
    assert [n.channel_dim for n in norms] == [1, 1, -1, -1, -1, -1]
    assert [n.eps for n in norms][:3] == [1e-3, 1e-5, 1e-6] and norms[4].eps == 1e-4
    assert [n.training for n in norms] == [True, True, True, False, True, True]
    assert {n.warmup_iters for n in norms} == {7} and {n.running_var.dtype for n in norms} == {torch.float64}
    after = dict(net.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert set(after) - set(before) == {"norms.1.bias", "norms.2.bias"}
    assert (after["norms.1.bias"] == 0).all() and not net.plain.affine
    assert not net.norms[0].weight.requires_grad and net.norms[0].bias.requires_grad
    y = net(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    assert y.shape == (2, 20, C)
    y.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "shape", "channel_dim"),
    [
        (lambda: LlamaLikeRMSNorm(C), (3, 5, C), -1),
        (lambda: GemmaLikeRMSNorm(C), (3, 5, C), -1),
        (lambda: ChannelsFirstLayerNorm(C, True), (3, C, 5, C), 1),
        (lambda: ChannelsFirstLayerNorm(C, False), (3, 5, 4, C), -1),
        (lambda: GainAndBiasLayerNorm(C), (3, C, 5, C), 1),
        (lambda: UnitLengthRMSNorm(C), (3, 5, C), -1),
    ],
)
def test_what_a_norm_of_another_library_does_is_measured(norm, shape, channel_dim, dtype):
    net = nn.Sequential(norm().to(dtype))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.2, 1.5)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        expected = net(x)
    centred = isinstance(net[0], (nn.LayerNorm, GainAndBiasLayerNorm))
    swap_norms(net, to="unified")
    new = net[0]
    assert new.channel_dim == channel_dim
    rows = x.movedim(channel_dim, -1).float()
    rows = rows - rows.mean(-1, keepdim=True) if centred else rows
    result = torch.nn.functional.rms_norm(rows, (C,)) * new.weight.float() + new.bias.float()
    # 16 bits have a rounding of 2^-8; the trial's own is 2^-8 again
    torch.testing.assert_close(
        result.movedim(-1, channel_dim), expected.float(), rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-3
    )


def test_weights_that_start_at_zero_are_gains_of_one():
    net = nn.Sequential(GemmaLikeRMSNorm(C))
    nn.init.zeros_(net[0].weight)
    swap_norms(net, to="unified")
    assert (net[0].weight == 1).all()


@pytest.mark.parametrize("make", [BatchNormAct2d, LayerNormAct2d])
def test_what_a_class_does_behind_its_norm_stays(make):
    net = nn.Sequential(nn.Conv2d(3, C, 1), make(C)).eval()
    for parameter in net[1].parameters():
        nn.init.uniform_(parameter, -1.5, 1.5)
    act, x = net[1].act, torch.randn(2, 3, 4, 5)
    expected = net(x)
    report = swap_norms(net, to="batch")
    assert net[1].act is act and isinstance(net[1].norm, MaskedBatchNorm)
    assert [(s.name, s.after) for s in report.swaps] == [("1", "MaskedBatchNorm")]
    if make is BatchNormAct2d:  # which has the same statistics
        torch.testing.assert_close(net(x), expected)
    assert net.train()(x).min() >= -0.3  # least of SiLU


@pytest.mark.parametrize("make", [HiddenReLU, ActFirst, GroupedRMSNorm, lambda c: BatchNormAct2d(c, nn.Softmax(1))])
def test_a_class_that_does_something_else_is_refused_or_kept_whole(make):
    net = nn.Sequential(nn.Conv2d(3, C, 1), make(C)).eval()
    old, x = net[1], torch.randn(2, 3, 4, 5)
    if isinstance(getattr(old, "act", None), nn.Softmax):
        expected = net(x)
        swap_norms(net, to="batch")
        torch.testing.assert_close(net(x), expected)
        return
    with pytest.raises(ValueError, match=r"1, a \w+ of .*test_swap, does not .*leave it out with `where`"):
        swap_norms(net, to="batch")
    assert net[1] is old


def test_progressive_mixes_in_front_of_the_activation():
    net = nn.Sequential(nn.Conv2d(3, C, 1), LayerNormAct2d(C)).eval()
    x = torch.randn(2, 3, 4, 5)
    expected = net(x)
    conversion = progressive(net, to="batch", schedule=Schedule(steps=4))
    assert list(conversion.norms) == ["1.norm"]
    torch.testing.assert_close(net(x), expected)


def test_a_batch_norm_hands_over_its_mean_of_squares():
    net = nn.Sequential(nn.BatchNorm1d(C))
    for _ in range(200):
        net(3 + torch.randn(256, C))
    for to, statistic in (("unified", "running_var"), ("power", "running_phi"), ("moving_average", "running_var")):
        twin = nn.Sequential(nn.BatchNorm1d(C))
        twin.load_state_dict(net.state_dict())
        swap_norms(twin, to=to, **({"group_num": None} if to == "power" else {}))
        torch.testing.assert_close(twin[0].get_buffer(statistic), torch.full((C,), 10.0), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("where", "swapped"),
    [
        (r"^norms\.", ["norms.0", "norms.1", "norms.2"]),
        (re.compile("NORMS.[01]", re.IGNORECASE), ["norms.0", "norms.1"]),
        (nn.BatchNorm2d, ["conv.1"]),
        ((nn.RMSNorm, LlamaLikeRMSNorm), ["norms.1", "norms.2"]),
        (lambda name, module: getattr(module, "eps", 0) == 1e-6, ["norms.0"]),
    ],
)
def test_where(where, swapped):
    net = model()
    report = swap_norms(net, to="power", where=where)
    assert [s.name for s in report.swaps] == swapped
    assert len(report.kept) == 6 - len(swapped)
    assert [name for name, m in net.named_modules() if isinstance(m, PowerNorm)] == swapped


@pytest.mark.parametrize(("to", "kind"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm), ("batch", MaskedBatchNorm)])
def test_other_targets_and_back(to, kind):
    net = nn.Sequential(nn.LayerNorm(C, eps=1e-4, bias=to != "rms"))
    nn.init.normal_(net[0].weight)
    weight = net[0].weight.clone()
    swap_norms(net, to="unified")
    swap_norms(net, to=to)
    assert type(net[0]) is kind and net[0].eps == 1e-4 and torch.equal(net[0].weight, weight)
    x = torch.randn(3, 5, C)
    y = net(x)
    if to == "batch":
        torch.testing.assert_close(
            y, nn.functional.batch_norm(x.reshape(-1, C), None, None, weight, None, True, 0.1, 1e-4).view_as(x)
        )


def test_a_shared_norm_stays_shared():
    norm = nn.LayerNorm(C)
    net = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    report = swap_norms(net)
    assert net["a"] is net["b"][0] and isinstance(net["a"], UnifiedNorm)
    assert [s.name for s in report.swaps] == ["a", "b.0"]


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(C)), {"to": "group"}, "to='group' is unknown; give one of 'unified'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "where=None selects nothing; the model has no norms"),
        (lambda: nn.Sequential(nn.GroupNorm(2, C)), {}, r"it knows \(those of class GroupNorm it does not\)"),
        (lambda: nn.Sequential(nn.LayerNorm(C)), {"where": "x"}, "where='x' selects nothing; the norms are 0"),
        (lambda: nn.LayerNorm(C), {}, "model is itself a norm"),
        (lambda: nn.Sequential(nn.LayerNorm((2, C))), {}, r"0, a LayerNorm, normalises over the shape \(2, 8\)"),
        (lambda: nn.Sequential(nn.BatchNorm2d(C)), {"to": "layer"}, "0: LayerNorm works on channels last only"),
        (lambda: nn.Sequential(nn.LayerNorm(C)), {"momentum": 2.0}, r"0: momentum=2\.0 is not allowed"),
    ],
)
def test_refusals_leave_the_model_as_it_was(net, options, message):
    net = net()
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        swap_norms(net, **options)
    assert [type(m) for m in net.modules()] == before


def test_a_bias_that_has_no_place_is_not_lost():
    net = nn.Sequential(nn.LayerNorm(C))
    nn.init.ones_(net[0].bias)
    with pytest.raises(ValueError, match="RMSNorm has no bias to take over"):
        swap_norms(net, to="rms")
    assert isinstance(net[0], nn.LayerNorm)


@pytest.mark.parametrize(
    ("old", "to", "new"),
    [
        (lambda: MaskedBatchNorm(C, channel_dim=1), "unified", UnifiedNorm),
        (lambda: MovingAverageBatchNorm(C), "batch", MaskedBatchNorm),
        (lambda: nn.BatchNorm2d(C), "batch", MaskedBatchNorm),
        (lambda: DyT(C), "layer", nn.LayerNorm),
        (lambda: nn.LayerNorm(C), "dyt", DyT),
        (lambda: UnifiedNorm(C), "derf", Derf),
        (lambda: nn.LayerNorm(C), "moving_average", MovingAverageBatchNorm),
        (lambda: nn.LayerNorm(C), "estimated_batch", EstimatedBatchNorm),
        (lambda: nn.LayerNorm(C), "regularized_batch", RegularizedBatchNorm),
    ],
)
def test_the_whole_family_is_found_and_can_be_put_in(old, to, new):
    net = nn.Sequential(old(), RepBatchNorm(C))
    nn.init.normal_(net[0].weight)
    gain, channel_dim = (
        net[0].weight.detach().clone(),
        getattr(net[0], "channel_dim", 1 if isinstance(net[0], nn.BatchNorm2d) else -1),
    )
    report = swap_norms(net, to=to)
    assert type(net[0]) is new and type(net[1]) is RepBatchNorm and len(report.swaps) == 1
    assert torch.equal(net[0].weight, gain)
    if hasattr(net[0], "channel_dim"):
        assert net[0].channel_dim == channel_dim


@pytest.mark.parametrize("to", ["batch", "estimated_batch", "regularized_batch"])
def test_from_one_batch_norm_to_another_the_function_stays(to):
    net = nn.Sequential(nn.BatchNorm2d(C))
    for _ in range(3):
        net(torch.randn(4, C, 2, 2) * 3 + 1)
    x = torch.randn(2, C, 3, 3)
    expected = net.eval()(x)
    swap_norms(net, to=to)
    torch.testing.assert_close(net(x), expected)


class HeadRMSNorm(nn.Module):
    """Every head has a gain of its own, as in ViT-22B and Cohere's attention."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.eps = 1e-6

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps) * self.gamma


class HeadLayerNorm(HeadRMSNorm):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.beta = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.gamma + self.beta


HEADS = [((3, 1, C), (2, 3, 5, C)), ((1, 3, 1, C), (2, 3, 5, C)), ((3, C), (2, 5, 3, C)), ((C, 1, C), (2, C, C, C))]


@pytest.mark.parametrize(("shape", "size"), HEADS)
@pytest.mark.parametrize("kind", [HeadRMSNorm, HeadLayerNorm])
def test_every_head_keeps_its_own_gain(kind, shape, size):
    net, x = nn.Sequential(kind(*shape)), torch.randn(size)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -1.5, 1.5)
    net[0].gamma.requires_grad_(False)
    expected = net(x)
    report = swap_norms(net, to="layer" if kind is HeadLayerNorm else "rms")
    torch.testing.assert_close(net(x), expected)
    assert [(s.name, s.before, s.num_features) for s in report.swaps] == [("0", kind.__name__, C)]
    assert [p.requires_grad for p in net.parameters()] == [False, True][: 1 + (kind is HeadLayerNorm)]


def test_norms_of_heads_convert_to_static_ones():
    net, x = nn.Sequential(HeadLayerNorm(3, 1, C)), torch.randn(4, 3, 5, C)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    expected = net.eval()(x)
    conversion = progressive(net, to="batch", schedule=Schedule(steps=2))
    torch.testing.assert_close(net(x), expected)
    explained = conversion.calibrate([x])
    assert list(explained) == ["0.norm"]
    conversion.step(2)
    conversion.finish()
    assert (net.eval()(x) - expected).square().mean() < 0.5 * expected.var()


class Bare(nn.Module):
    """Without parameters; its width has a name of its own."""

    def __init__(self, width, centred):
        super().__init__()
        self.width, self.centred, self.eps = width, centred, 1e-5
        self.register_parameter("weight", None)

    def forward(self, x):
        norm = nn.functional.layer_norm if self.centred else nn.functional.rms_norm
        return norm(x, x.shape[-1:], eps=self.eps)


class BareRMSNorm(Bare):
    pass


class SilentRMSNorm(nn.Module):
    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5)


@pytest.mark.parametrize(
    ("make", "to"),
    [
        (lambda: nn.LayerNorm(C, elementwise_affine=False), "layer"),
        (lambda: nn.RMSNorm(C, eps=1e-5, elementwise_affine=False), "rms"),
        (lambda: type("OwnLayerNorm", (nn.LayerNorm,), {})(C, elementwise_affine=False), "layer"),
        (lambda: BareRMSNorm(C, False), "rms"),
        (lambda: BareRMSNorm((C,), True), "layer"),
    ],
)
def test_norms_without_parameters_are_found_swapped_and_converted(make, to):
    x = torch.randn(6, 5, 4) + 1
    net = nn.Sequential(nn.Linear(4, C), make())
    expected = net(x)
    same, converted = copy.deepcopy(net), copy.deepcopy(net)
    assert [s.num_features for s in swap_norms(same, to=to).swaps] == [C]
    torch.testing.assert_close(same(x), expected)
    swap_norms(net, to="unified")
    assert isinstance(net[1], UnifiedNorm) and net[1].weight is None
    conversion = progressive(converted, to="batch", schedule=Schedule(steps=1))
    conversion.calibrate([x])
    conversion.step()
    conversion.finish()
    assert (converted.eval()(x) - expected).square().mean() < expected.var()


def test_a_norm_that_does_not_say_its_width_can_be_told():
    net = nn.Sequential(nn.Linear(4, C), SilentRMSNorm())
    with pytest.raises(ValueError, match=r"1, a SilentRMSNorm, does not say how many.*set its normalized_shape"):
        swap_norms(net)
    net[1].normalized_shape = C
    swap_norms(net)
    assert isinstance(net[1], UnifiedNorm)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(C), lambda: HeadLayerNorm(3, 1, C)])
def test_hooks_run_on_what_takes_the_place_of_a_norm(make):
    net, x = nn.Sequential(make()), torch.randn(2, 3, 5, C)
    handle = net[0].register_forward_hook(lambda module, arguments, result: 2 * result)
    net[0].register_forward_pre_hook(lambda module, arguments, named: ((arguments[0] + 1,), named), with_kwargs=True)
    expected = net(x)
    gradual = copy.deepcopy(net)
    swap_norms(net, to="layer")
    torch.testing.assert_close(net(x), expected)
    handle.remove()
    torch.testing.assert_close(2 * net(x), expected)
    conversion = progressive(gradual, to="batch", schedule=Schedule(steps=1))
    torch.testing.assert_close(gradual(x), expected)
    conversion.step()
    before = gradual.eval()(x)
    conversion.finish()
    torch.testing.assert_close(gradual(x), before)


def test_a_weight_that_a_hook_computes_is_taken_over():
    net, x = nn.Sequential(nn.Linear(4, C), nn.LayerNorm(C)), torch.randn(3, 4)
    nn.utils.weight_norm(net[1], dim=None)
    net[1].weight_g.data.mul_(2)
    expected = net(x)
    swap_norms(net, to="layer")
    torch.testing.assert_close(net(x), expected)
