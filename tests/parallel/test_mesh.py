"""Laws of the mesh: the number of devices changes speed, not results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparx_jax.errors import UserError
from sparx_jax.parallel import make_mesh

ROOT = Path(__file__).parents[2]

# Three steps with BatchNorm over the whole batch; prints losses and a weight.
PROGRAM = """
import json, sys, jax, numpy as np
from sparx_jax.training import state as states
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import prepare
from sparx_jax.training.step import compile_train_step
from sparx_jax import parallel
from sparx_jax.parallel import mesh as mesh_module
from tests.training.conftest import tiny_settings
mesh_module.MIN_SPLIT_SIZE = 64  # so that fsdp splits this small network too
config, source, _, mesh = prepare(tiny_settings(**json.loads(sys.argv[1])))
schedule = learning_rate(config.optimizer, 0, 12)
optimizer = make_optimizer(config.optimizer, schedule)
network, state = states.init(
    config.model, optimizer, seed=0, use_ema=True, mesh=mesh)
step = compile_train_step(network, config, optimizer, schedule, state, mesh)
rng, losses = np.random.default_rng(0), []
for _ in range(3):
    images = rng.integers(256, size=(16, 32, 32, 3)).astype(np.uint8)
    batch = {"image": images, "label": rng.integers(10, size=16).astype(np.int32)}
    batch["weight"] = np.ones(16, np.float32)
    state, metrics = step(state, parallel.put_batch(batch, mesh))
    losses.append(float(metrics["train_loss"]))
sums = [float(np.abs(np.asarray(a)).sum()) for a in jax.tree.leaves(state.ema)]
split = sum(not a.sharding.is_fully_replicated for a in jax.tree.leaves(state))
print(json.dumps([losses, sums, split, mesh.size]))
"""


def train(devices, **settings):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(settings)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_several_devices_equal_one():
    # Adam divides gradients that are only rounding by themselves; this epsilon lets
    # them stay rounding.
    calm = {"optimizer.eps": 1e-3}
    losses, sums, split, count = train(1, **calm)
    assert split == 0 and count == 1
    for settings in ({}, {"mesh.fsdp": 2}):
        others, other_sums, split, count = train(4, **calm, **settings)
        assert count == 4 and (split > 0) == bool(settings)
        assert others == pytest.approx(losses, rel=1e-5)
        assert other_sums == pytest.approx(sums, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("data, fsdp", [(2, 1), (-1, 2), (-1, -1), (0, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(UserError, match="does not fit 1 device"):
        make_mesh(data, fsdp)
