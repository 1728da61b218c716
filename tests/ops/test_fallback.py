"""Without the compiled library everything runs on the references, and says so once."""

import os
import subprocess
import sys

PROGRAM = """
import copy, warnings
import torch
import normfuse.nn

assert not normfuse.build_info()["available"]
eager = torch.nn.Sequential(
    torch.nn.Linear(4, 6), normfuse.nn.UnifiedNorm(6, warmup_iters=1, window_size=2),
    normfuse.nn.PowerNorm(6, warmup_iters=2, group_num=2),
)
inside = copy.deepcopy(eager)
compiled = torch.compile(inside, fullgraph=True, backend="aot_eager_decomp_partition")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(5):
        x = torch.randn(3 + step % 2, 5, 4)
        for model in (eager, compiled):
            model(x).square().sum().backward()
slow = [str(w.message) for w in caught if "normfuse" in str(w.message)]
assert len(slow) == 1, slow
assert "reference" in slow[0] and "cpu" in slow[0] and "NORMFUSE_DISABLE_NATIVE" in slow[0], slow
for name, tensor in eager.state_dict().items():
    torch.testing.assert_close(inside.state_dict()[name], tensor, msg=name)
for a, b in zip(eager.parameters(), inside.parameters()):
    torch.testing.assert_close(a.grad, b.grad)
"""


def test_references_without_the_library():
    environment = {**os.environ, "NORMFUSE_DISABLE_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
