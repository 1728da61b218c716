"""The trajectories of the authors' programs, reproduced by the emulated CUDA kernels and the host kernels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
TOLERANCE = 1e-5  # float32 on both sides, over trajectories of at most 24 steps


def run_unified(call, kw, x, dy, pad, state):
    options = {"window_size": 4, "warmup_iters": 4000, "outlier_filtration": False, "momentum": 0.9} | kw
    warmup, momentum = options["warmup_iters"], options["momentum"]
    buffers = (state["running_var"], state["buffer_x2"], state["iters"], state["skip_counter"])
    y, stats, step = call(
        *("unified_norm_forward", x, pad, state["weight"], state["bias"], *buffers),
        *(warmup, options["outlier_filtration"], 1e-5, momentum, None, None),
    )
    gradient_state = (state["ema_gz"], state["buffer_gz"])
    return y, *call(
        "unified_norm_backward", dy, x, state["weight"], stats, step, *gradient_state, warmup, momentum, None
    )


def run_power(call, kw, x, dy, pad, state):
    options = {"warmup_iters": 10000, "group_num": 1, "alpha_fwd": 0.9, "alpha_bkw": 0.9} | kw
    groups = options["group_num"]
    y, stats, row_scale = call(
        *("power_norm_forward", x, pad, state["weight"], state["bias"], state["running_phi"], state["iters"]),
        *(options["warmup_iters"], groups, 1e-5, 1e-5, options["alpha_fwd"], None, None),
    )
    return y, *call(
        *("power_norm_backward", dy, x, state["weight"], stats, row_scale, state["ema_gz"]),
        *(groups, options["alpha_bkw"], False, None),
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trajectory(path, implementation):
    data = np.load(path)
    config = json.loads(bytes(data["config"]))
    channels = config["C"]
    run = {"unified": run_unified, "power": run_power}[config["kind"]]
    state = {}
    for key in (key for key in data.files if key.startswith("init_")):
        name = key.removeprefix("init_").removeprefix("buf_")
        shape = (-1, channels) if name.startswith("buffer") else (-1,)
        state[name] = torch.from_numpy(data[key].reshape(shape).copy())
    for name in ("iters", "skip_counter"):
        if name in state:
            state[name] = state[name].long()

    for index in range(config["steps"]):
        prefix = f"s{index:03d}_"
        step = {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}
        x, dy = (torch.from_numpy(step[name].reshape(-1, channels).copy()) for name in ("x", "gy"))
        pad = torch.from_numpy(step["pad"].reshape(-1).astype(bool)) if config["mask"] else None
        y, gx, gw, gb = run(implementation, config["kw"], x, dy, pad, state)
        results = {"y": y, "gx": gx, "gw": gw, "gb": gb}
        results |= {name: state[name.removeprefix("buf_")] for name in step if name.startswith("buf_")}
        for name, value in results.items():
            want = step[name].astype(np.float64).ravel()
            worst = np.abs(value.double().numpy().ravel() - want).max()
            assert worst <= TOLERANCE * max(np.abs(want).max(), 1e-3), f"step {index}, {name}: off by {worst:.1e}"
        state["weight"] -= 0.01 * gw
        state["bias"] -= 0.01 * gb


def test_all_trajectories_are_here():
    assert len(FILES) == 8
