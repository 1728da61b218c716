"""The ranks of the tests of synchronised training: ``python sync_worker.py BACKEND RANKS``, run by ``test_sync.py``."""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from normfuse.nn import (
    BatchChannelNorm,
    DomainSplitNorm,
    MaskedBatchNorm,
    ProgressiveNorm,
    RegularizedBatchNorm,
    RepBatchNorm,
    batch_norm_penalty,
    calibrate,
    convert_sync,
)
from tests.norms import running, with_statistics

C = 6
# Every norm with statistics of its own, but for parts of a batch, which ranks would cut elsewhere; then options.
NORMS = {
    name: make
    for name, make in with_statistics(C, channel_dim=-1, warmup_iters=2, window_size=2).items()
    if make().ghost_size is None
}
NORMS |= running(C, "unified, filtered", "power", "power, paper")
NORMS |= {
    "batch, average of all": lambda: MaskedBatchNorm(C, momentum=None),
    "regularized": lambda: RegularizedBatchNorm(C, 0.3, 0.2),
    "progressive": lambda: ProgressiveNorm(nn.LayerNorm(C), RepBatchNorm(C), end=4),
    "batch-channel": lambda: BatchChannelNorm(C, 3),
    "batch-channel, estimated": lambda: BatchChannelNorm(C, 3, estimated=True),
}
WITHOUT_MASK = ("batch-channel", "batch-channel, estimated")
BACKEND = "aot_eager_decomp_partition"  # of torch.compile
ROWS = 12
# Uneven, and in some steps a rank has nothing.
SPLITS = {2: [(6, 6), (5, 7), (12, 0), (1, 11)], 4: [(3, 3, 3, 3), (1, 5, 2, 4), (0, 6, 6, 0), (12, 0, 0, 0)]}


def near(actual, expected, what):
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"rank {dist.get_rank()}, {what}: {m}"
    )


def my_rows(step, *tensors):
    sizes = SPLITS[dist.get_world_size()][step % 4]
    return [tensor.split(sizes)[dist.get_rank()] for tensor in tensors]


def random(step, *shape):
    generator = torch.Generator("cpu").manual_seed(step)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())


def buffers_near(actual, expected, what):
    for (name, value), other in zip(actual.named_buffers(), expected.buffers(), strict=True):
        near(value, other, f"{what}, {name}")


def loss_terms(norm, count):
    """What norms add to the loss: every rank adds it, so that it counts once in a loss averaged over ranks."""
    has_term = any(isinstance(module, RegularizedBatchNorm) for module in norm.modules())
    return count * batch_norm_penalty(norm) if has_term else 0.0


def ranks_like_one(name, compiled=False, masked=True, bad_step=None):
    """Output, gradients and statistics of this rank's rows, with masks; parameter gradients add up."""
    options = {} if bad_step is None else {"skip_nonfinite": True}
    masked = masked and name not in WITHOUT_MASK
    alone = NORMS[name](**options).double()
    shared = convert_sync(nn.Sequential(NORMS[name](**options).double()))[0]
    # One program for every number of rows from two on, and one each for a single row and for none.
    options = {"fullgraph": True, "dynamic": True, "backend": BACKEND}
    call = torch.compile(shared, **options) if compiled else shared
    for step in range(8):
        x, dy = random(step, 2, ROWS, C)
        if step == bad_step:
            x[0, 1] = float("nan")  # of one rank's rows only
            dy[-1, 2] = float("inf")
        pad_mask = random(100 + step, ROWS) < -0.5 if masked else None
        whole = x.clone().requires_grad_()
        alone.zero_grad(), shared.zero_grad()
        y = alone(whole, *([pad_mask] if masked else []))
        ((y * dy).sum() + loss_terms(alone, dist.get_world_size())).backward()
        own_x, own_dy, own_y, own_dx = my_rows(step, x, dy, y, whole.grad)
        own_mask = my_rows(step, pad_mask)[0] if masked else None
        part = own_x.clone().requires_grad_()
        result = call(part, *([own_mask] if masked else []))
        ((result * own_dy).sum() + loss_terms(shared, 1)).backward()
        if step != bad_step:
            near(result, own_y, f"{name}, step {step}, y")
            near(part.grad, own_dx, f"{name}, step {step}, dx")
            for a, b in zip(shared.parameters(), alone.parameters(), strict=True):
                dist.all_reduce(a.grad)
                near(a.grad, b.grad, f"{name}, step {step}, parameters")
        buffers_near(shared, alone, f"{name}, step {step}")
    # No rank has drifted from another by a single bit.
    for value in shared.buffers():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value)
    near(shared.eval()(own_x), alone.eval()(own_x), "evaluation")


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, C), NORMS[name](), nn.Linear(C, 4)

    def forward(self, x):
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def trains_like_one(name, wrap):
    """Whole trainings: with gradients averaged over ranks, the sum of squares times the number of ranks."""
    torch.manual_seed(0)
    alone = Net(name).double()
    inside = Net(name).double()
    inside.load_state_dict(alone.state_dict())
    model = wrap(convert_sync(inside))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (alone, model)]
    for step in range(5):
        x = random(step, ROWS, 4)
        (own,) = my_rows(step, x)
        losses = alone(x).square().sum() / ROWS, model(own).square().sum() / ROWS
        # The gradient that arrives at the norm is that of one process; the average over ranks is undone.
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for parameter in model.parameters():
            parameter.grad.mul_(dist.get_world_size())
        for optimizer in optimizers:
            optimizer.step()
        buffers_near(inside.norm, alone.norm, f"{name}, step {step}")
    for (label, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        near(a.full_tensor() if hasattr(a, "full_tensor") else a, b, label)


def in_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def compiled_in_ddp(model):
    return torch.compile(in_ddp(model), backend=BACKEND)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    fully_shard(model.norm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def subgroups():
    """Two groups that share statistics among themselves only."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, second = divmod(dist.get_rank(), 2)
    alone = NORMS["UnifiedNorm"]().double()
    shared = convert_sync(NORMS["UnifiedNorm"]().double(), groups[half])
    for step in range(4):
        x, dy = random(10 * half + step, 2, 8, C)
        y = alone(x)
        y.backward(dy)
        mine = slice(3, 8) if second else slice(0, 3)
        result = shared(x[mine])
        result.backward(dy[mine])
        near(result, y[mine], "y")
        buffers_near(shared, alone, f"step {step}")


def checkpointed(name):
    from torch.utils.checkpoint import checkpoint

    kept, dropped = (convert_sync(NORMS[name]().double()) for _ in range(2))
    for step in range(4):
        x, dy = my_rows(step, *random(step, 2, ROWS, C))
        kept(x.clone().requires_grad_()).backward(dy)
        checkpoint(dropped, x.clone().requires_grad_(), use_reentrant=False).backward(dy)
        assert all(torch.equal(a, b) for a, b in zip(dropped.buffers(), kept.buffers(), strict=True))


def domains():
    """Every rank holds rows of both domains, in equal parts; each domain's norm has the rows of all ranks."""
    alone = DomainSplitNorm(MaskedBatchNorm(C)).double()
    shared = convert_sync(DomainSplitNorm(MaskedBatchNorm(C)).double())
    for step in range(4):
        x, dy = random(step, 2, 2, ROWS, C)  # of two domains
        whole = x.clone().requires_grad_()
        y = alone(whole.flatten(0, 1)).view_as(x)
        y.backward(dy)
        own_x, own_dy, own_y, own_dx = (torch.stack(my_rows(step, *v)).flatten(0, 1) for v in (x, dy, y, whole.grad))
        part = own_x.clone().requires_grad_()
        result = shared(part)
        result.backward(own_dy)
        near(result, own_y, f"domains, step {step}, y")
        near(part.grad, own_dx, f"domains, step {step}, dx")
        buffers_near(shared, alone, f"domains, step {step}")


def calibrated():
    """One batch each, of different sizes: the statistics of all rows of all ranks."""
    rows = 3 + random(0, ROWS, C)
    for name in ("UnifiedNorm", "MaskedBatchNorm"):
        norm = convert_sync(NORMS[name]().double())
        for sizes in SPLITS[dist.get_world_size()]:
            norm.reset_running_stats()
            own = rows.split(sizes)[dist.get_rank()]
            assert calibrate(norm, [own] if len(own) else [], progress=False) == (len(own) > 0)
            if name == "MaskedBatchNorm":
                near(norm.running_mean, rows.mean(0), "calibrated mean")
                near(norm.running_var, rows.var(0), "calibrated variance")
            else:
                near(norm.running_var, rows.square().mean(0), "calibrated")
            assert norm.synchronised


def main(rank, backend, address, ranks):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.set_default_device(torch.device("cuda", rank))
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
    for name in NORMS:
        ranks_like_one(name)
    calibrated()
    domains()
    if ranks == 4:
        subgroups()
        trains_like_one("UnifiedNorm", in_ddp)
    else:
        ranks_like_one("UnifiedNorm", masked=False)
        trains_like_one("UnifiedNorm", compiled_in_ddp)
        for name in ("UnifiedNorm", "power"):
            ranks_like_one(name, bad_step=4)
            trains_like_one(name, sharded)
        for name in ("UnifiedNorm", "power", "regularized", "MovingAverageBatchNorm"):
            ranks_like_one(name, compiled=True)
            checkpointed(name)
            trains_like_one(name, in_ddp)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # where the ranks meet
        backend, address, ranks = sys.argv[1], f"file://{folder}/ranks", int(sys.argv[2])
        # Copies of this process, which has imported everything, what compiling needs included.
        torch.compile(torch.sin, backend=BACKEND)(torch.ones(2))
        # The first that fails ends all, with its traceback.
        multiprocessing.start_processes(main, (backend, address, ranks), ranks, start_method="fork")
