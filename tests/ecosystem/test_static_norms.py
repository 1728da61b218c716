"""Networks of torchvision and timm, small, trained with every static norm in the place of their own; then exported."""

import pytest
import torch
from torch import nn

from normfuse.convert import swap_norms
from normfuse.folding import fold
from normfuse.nn import RegularizedBatchNorm, batch_norm_penalty

MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"
CLASSES, BATCH = 3, 8


def torchvision(name, **options):
    def make():
        models = pytest.importorskip("torchvision.models", reason=MISSING)
        return getattr(models, name)(num_classes=CLASSES, **options)

    return make


def timm(kind, **options):
    def make():
        models = pytest.importorskip("timm.models", reason=MISSING)
        module, _, cls = kind.rpartition(".")
        return getattr(getattr(models, module), cls)(num_classes=CLASSES, **options)

    return make


def regnet():
    models = pytest.importorskip("timm.models", reason=MISSING)
    config = models.regnet.RegNetCfg(w0=16, wa=24.0, wm=2.0, group_size=8, depth=5, se_ratio=0.25)
    return models.regnet.RegNet(config, num_classes=CLASSES, zero_init_last=False)


NETWORKS = {
    "resnet18": torchvision("resnet18"),
    "mobilenet_v2": torchvision("mobilenet_v2", width_mult=0.25, dropout=0.0),
    "efficientnet_b0": torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0),
    "convnext": timm("convnext.ConvNeXt", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    "regnet": regnet,
    "swin": timm(
        "swin_transformer.SwinTransformer",
        img_size=64, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, drop_path_rate=0.0,
    ),
}  # fmt: skip
NORMS = {
    "unified": {"warmup_iters": 2, "window_size": 2},
    "power": {"warmup_iters": 2, "group_num": None},
    "batch": {},
    "batch, ghosts": {"ghost_size": 4},
    "rep_batch": {},
    "regularized_batch": {},
    "estimated_batch": {"momentum": 0.5},
    "moving_average": {"warmup_iters": 2, "window_size": 2},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_train_with_static_norms_and_lose_them(network, norm):
    torch.manual_seed(0)
    model = NETWORKS[network]().train()
    report = swap_norms(model, norm.partition(",")[0], **NORMS[norm])
    assert report.swaps and not report.kept
    labels = torch.arange(BATCH) % CLASSES
    x = torch.randn(CLASSES, 3, 64, 64)[labels] + 0.3 * torch.randn(BATCH, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), labels)
        if any(isinstance(module, RegularizedBatchNorm) for module in model.modules()):
            loss = loss + batch_norm_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite()) and min(losses[1:]) < losses[0]
    model.eval()
    program = torch.export.export(model, (x[:2],))
    folded, found = fold(program)
    # timm's norms with an activation in them are split: the norm is a part of what takes their place.
    names = {record.name for record in found.norms}
    assert all({swap.name, f"{swap.name}.norm"} & names for swap in report.swaps)
    assert not [record for record in found.norms if record.status != "folded"]
    torch.testing.assert_close(folded.module()(x[:2]), model(x[:2]), rtol=1e-3, atol=1e-3)
