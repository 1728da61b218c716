"""σReparam against a power iteration in NumPy; the weight of evaluation is the one that stays."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.nn import sigma_reparam

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_the_iteration_keeps_its_digits_under_autocast_and_in_half_precision(layer, dtype):
    module = sigma_reparam(LAYERS[layer](), init="spectral")
    twin = copy.deepcopy(module)
    x = torch.randn(2, 5) if layer == "linear" else torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    assert y.dtype == dtype
    twin(x)
    reparam, other = module.parametrizations.weight[0], twin.parametrizations.weight[0]
    assert torch.equal(reparam.u, other.u) and torch.equal(reparam.v, other.v) and reparam.u.dtype == torch.float32
    low = copy.deepcopy(twin).to(dtype)
    assert low.parametrizations.weight[0].u.dtype == torch.float32 and low.weight.dtype == dtype
    assert torch.equal(low.parametrizations.weight[0].u, other.u) or low.training  # the read above iterates in training
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(low.eval().weight.float(), twin.eval().weight, rtol=4 * eps, atol=4 * eps)


def test_the_vision_program_goes_on_from_the_right_vector():
    module = sigma_reparam(nn.Linear(5, 3).double(), program="vision")
    reparam, original = module.parametrizations.weight[0], module.parametrizations.weight.original
    assert reparam.gain.item() == pytest.approx(np.linalg.svd(original.detach().numpy(), compute_uv=False)[0])
    with torch.no_grad():
        original.add_(torch.randn_like(original))
    v, matrix = reparam.v.numpy().copy(), original.detach().numpy()
    weight = module.weight
    u = matrix @ v / np.linalg.norm(matrix @ v)
    v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
    np.testing.assert_allclose(reparam.u.numpy(), u, **EXACT)
    np.testing.assert_allclose(reparam.v.numpy(), v, **EXACT)
    np.testing.assert_allclose(weight.detach().numpy(), reparam.gain.item() * matrix / (u @ matrix @ v), **EXACT)
    with pytest.raises(ValueError, match="program='text' is unknown"):
        sigma_reparam(nn.Linear(2, 2), program="text")


def iterate(matrix, u):
    v = matrix.T @ u
    v /= np.linalg.norm(v)
    u = matrix @ v
    return u / np.linalg.norm(u), v


def matrix_of(weight, layer):
    weight = weight.detach().numpy()
    return (weight.swapaxes(0, 1) if layer == "transposed" else weight).reshape(
        weight.shape[1 if layer == "transposed" else 0], -1
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("init", ["one", "spectral"])
@pytest.mark.parametrize("again", [False, True])
def test_training_and_evaluation_follow_the_formula(layer, init, again):
    module = LAYERS[layer]().double()
    before = module.weight.detach().clone()
    sigma = np.linalg.svd(matrix_of(before, layer), compute_uv=False)[0]
    assert sigma_reparam(module, init=init, iterate_in_evaluation=again) is module
    reparam, original = module.parametrizations.weight[0], module.parametrizations.weight.original
    np.testing.assert_allclose(reparam.gain.item(), sigma if init == "spectral" else 1.0, **EXACT)
    if init == "spectral":
        torch.testing.assert_close(module.weight, before)
    with torch.no_grad():
        original.add_(torch.randn_like(original))  # a step of training
    u = reparam.u.numpy().copy()
    for _ in range(2):
        matrix = matrix_of(original, layer)
        u, v = iterate(matrix, u)
        weight = module.weight
        np.testing.assert_allclose(matrix_of(weight, layer), reparam.gain.item() * matrix / (u @ matrix @ v), **EXACT)
        np.testing.assert_allclose(reparam.u.numpy(), u, **EXACT)
    (grad,) = torch.autograd.grad(weight.square().sum() + weight.sum(), original)
    assert abs((grad * original).sum()) < 1e-10  # the result does not depend on the length of W
    module.eval()
    used = iterate(matrix, u) if again else (u, v)
    expected = reparam.gain.item() * matrix / (used[0] @ matrix @ used[1])
    for _ in range(2):
        np.testing.assert_allclose(matrix_of(module.weight, layer), expected, **EXACT)
    np.testing.assert_allclose(reparam.u.numpy(), u, **EXACT)
    parametrize.remove_parametrizations(module, "weight")
    np.testing.assert_allclose(matrix_of(module.weight, layer), expected, **EXACT)


def test_the_gradient_is_exact_for_vectors_that_stand_still():
    reparam = sigma_reparam(nn.Linear(4, 3).double()).eval().parametrizations.weight[0]
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reparam, weight)


def test_checkpointing_iterates_once():
    once = sigma_reparam(nn.Linear(4, 4))
    with torch.no_grad():
        once.parametrizations.weight.original.add_(torch.randn(4, 4))
    plain, x = copy.deepcopy(once), torch.randn(2, 4)
    torch.utils.checkpoint.checkpoint(once, x, use_reentrant=False).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(once.parametrizations.weight[0].u, plain.parametrizations.weight[0].u)
    assert torch.equal(once.parametrizations.weight.original.grad, plain.parametrizations.weight.original.grad)


def test_refusals():
    with pytest.raises(ValueError, match="init='zero' is unknown; give 'one' or 'spectral'"):
        sigma_reparam(nn.Linear(2, 2), init="zero")
    with pytest.raises(ValueError, match=r"ReLU\.weight is not a weight"):
        sigma_reparam(nn.ReLU())
