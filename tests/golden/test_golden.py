"""The trajectories that the authors' programs produced, step by step, state included."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from normfuse.nn import PowerNorm, UnifiedNorm

FILES = sorted(Path(__file__).parent.glob("*.npz"))
LEARNING_RATE = 0.01
# Both sides round in float32 (6e-8) over sums of at most 24 rows and trajectories of at most 24 steps, whose
# weights and statistics carry the difference along: 24 * 6e-8, seven times over.
TOLERANCE = 1e-5


def assert_near(name, actual, expected):
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, name
    scale = max(np.abs(expected).max(), 1e-3)
    worst = np.abs(actual.astype(np.float64) - expected).max()
    assert worst <= TOLERANCE * scale, f"{name}: off by {worst:.1e} at a scale of {scale:.1e}"


def test_all_trajectories_are_here():
    assert len(FILES) == 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trajectory(path, implementation):
    data = np.load(path)
    config = json.loads(bytes(data["config"]))
    norm = {"unified": UnifiedNorm, "power": PowerNorm}[config["kind"]](config["C"], **config["kw"])
    start = {key[len("init_") :].removeprefix("buf_"): data[key] for key in data.files if key.startswith("init_")}
    norm.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()})

    for step in range(config["steps"]):
        arrays = {key[5:]: data[key] for key in data.files if key.startswith(f"s{step:03d}_")}
        x = torch.from_numpy(arrays["x"]).requires_grad_()
        pad_mask = torch.from_numpy(arrays["pad"]) if config["mask"] else None
        norm.zero_grad()
        y = norm(x, pad_mask)
        y.backward(torch.from_numpy(arrays["gy"]))

        results = {"y": y, "gx": x.grad, "gw": norm.weight.grad, "gb": norm.bias.grad}
        results |= {f"buf_{name}": value for name, value in norm.named_buffers()}
        assert set(results) == set(arrays) - {"x", "gy", "pad"}
        for name, value in results.items():
            assert_near(f"step {step}, {name}", value, arrays[name])
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter -= LEARNING_RATE * parameter.grad

    assert_near("evaluation", norm.eval()(torch.from_numpy(data["eval_x"])), data["eval_y"])
