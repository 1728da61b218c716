"""Synchronised training: ranks with rows of their own against one process with all rows.

With gloo on the CPU, and with NCCL where every rank gets a GPU of its own.
"""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from normfuse.nn import (
    EstimatedBatchNorm,
    MaskedBatchNorm,
    RegionNorm,
    RegularizedBatchNorm,
    UnifiedNorm,
    convert_sync,
)

WORKER = Path(__file__).with_name("sync_worker.py")


@pytest.mark.parametrize(("backend", "ranks"), [("gloo", 2), ("gloo", 4), ("nccl", 2), ("nccl", 4)])
def test_ranks_train_like_one_process(backend, ranks):
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"NCCL needs a GPU for each of the {ranks} ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(WORKER), backend, str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("kind", [UnifiedNorm, MaskedBatchNorm, EstimatedBatchNorm])
def test_without_processes_nothing_changes(kind):
    norm, twin = convert_sync(nn.Sequential(kind(4)))[0], kind(4)
    x = torch.randn(5, 4)
    assert torch.equal(norm(x), twin(x))
    assert "synchronised=True" in repr(norm)


def test_torchs_conversion_says_what_it_leaves_alone():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(4), UnifiedNorm(4)))
    with pytest.warns(RuntimeWarning, match=r"leaves UnifiedNorm as it is: call normfuse\.nn\.convert_sync\(model\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.SyncBatchNorm.convert_sync_batchnorm(convert_sync(model))
        assert list(UnifiedNorm(4).children()) == []


@pytest.mark.parametrize("kind", [UnifiedNorm, RegularizedBatchNorm])
def test_copies_share_a_process_group_and_a_stored_norm_forgets_it(kind):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        model = convert_sync(nn.Sequential(kind(4)), group)
        assert AveragedModel(model).module[0].process_group is group
        again = pickle.loads(pickle.dumps(model))[0]
        assert again.synchronised and again.process_group is None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), r"class Sequential has no norm with running statistics to synchronise.*swap_norms"),
        (lambda: nn.BatchNorm1d(2), "are BatchNorms of PyTorch; use torch.nn.SyncBatchNorm.convert_sync_batchnorm"),
        (lambda: MaskedBatchNorm(4, ghost_size=2), r"1 \(MaskedBatchNorm\) has ghost_size=2.*without ghost_size"),
        (lambda: UnifiedNorm(4, ghost_size=8), r"1 \(UnifiedNorm\) has ghost_size=8"),
        (lambda: RegionNorm(4, pool="batch"), r'1 \(RegionNorm with pool="batch"\).*pool="sample"'),
    ],
)
def test_what_cannot_be_synchronised_is_refused_and_left_alone(make, message):
    first = nn.Linear(4, 4) if isinstance(make(), (nn.Linear, nn.BatchNorm1d)) else UnifiedNorm(4)
    model = nn.Sequential(first, make())
    with pytest.raises(ValueError, match=message):
        convert_sync(model)
    assert not any(getattr(module, "synchronised", False) for module in model.modules())
