"""Laws of the mesh: the number of devices changes speed, not results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparx_jax.errors import UserError
from sparx_jax.parallel import (
    batch_sharding,
    check_rules,
    make_mesh,
    state_shardings,
)

ROOT = Path(__file__).parents[2]

# Ten steps with BatchNorm over the whole batch; writes losses and all arrays.
PROGRAM = """
import json, sys, jax, numpy as np
from sparx_jax import parallel
from sparx_jax.parallel import mesh as mesh_module
from sparx_jax.training import state as states
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import prepare
from sparx_jax.training.step import compile_train_step
from tests.training.tiny_config import get_config
mesh_module.MIN_SPLIT_SIZE = 64  # so that fsdp splits this small network too
settings = get_config()
settings.mesh.fsdp, settings.accumulation_steps = map(int, sys.argv[2:])
settings.model.drop_path_rate = 0.2
config, source, _, mesh = prepare(settings)
schedule = learning_rate(config.optimizer, 0, 12)
optimizer = make_optimizer(config.optimizer)
network, state = states.init(
    config.model, optimizer, seed=0, use_ema=True, mesh=mesh)
step = compile_train_step(network, config, optimizer, schedule, state, mesh)
rng, found = np.random.default_rng(0), {"losses": []}
for _ in range(10):
    images = rng.integers(256, size=(16, 32, 32, 3)).astype(np.uint8)
    batch = {"image": images, "label": rng.integers(10, size=16).astype(np.int32)}
    batch["weight"] = np.ones(16, np.float32)
    state, metrics = step(state, parallel.put_batch(batch, mesh))
    found["losses"].append(float(metrics["train_loss"]))
leaves = jax.tree_util.tree_leaves_with_path(state)
split = {parallel.leaf_name(path) for path, a in leaves
         if not a.sharding.is_fully_replicated}
found |= {parallel.leaf_name(path): np.asarray(a) for path, a in leaves}
np.savez(sys.argv[1], **found)
print(json.dumps([sorted(split), mesh.size]))
"""


def train(path, devices, fsdp=1, parts=1):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(fsdp), str(parts)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    assert done.returncode == 0, done.stderr
    return np.load(path), *json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    """In loss, weights, statistics, average and moments, copied, split and in parts."""
    ones = {}
    for parts in (1, 2):
        ones[parts], split, count = train(tmp_path / f"{parts}.npz", 1, 1, parts)
        assert split == [] and count == 1
        assert any(name.endswith(".mean") for name in ones[parts])  # BatchNorm's
    for fsdp, parts in ((1, 1), (4, 1), (4, 2)):
        eight, split, count = train(tmp_path / "eight.npz", 8, fsdp, parts)
        assert count == 8 and bool(split) == (fsdp > 1)
        if split:
            for part in ("weights/params/", "ema/params/", "/mu/", "/nu/"):
                assert any(part in name for name in split), (part, split)
        for name, array in ones[parts].items():
            np.testing.assert_allclose(
                eight[name], array, rtol=1e-5, atol=1e-5, err_msg=name
            )


def test_rules_match_every_array_and_each_of_them_is_needed():
    tree = {"weights": {"stem.kernel": jnp.zeros(()), "stem.bias": jnp.zeros(())}}
    check_rules(tree)
    with pytest.raises(ValueError, match=r"rule 'mu' .* matches no array"):
        check_rules(tree, [("mu", "split"), (r"", "copy")])
    check_rules(tree, [(r"kernel$", "split"), (r"", "copy")])
    with pytest.raises(ValueError, match=r"rule 'bias' .* or earlier rules match"):
        check_rules(tree, [(r"", "copy"), ("bias", "split")])
    with pytest.raises(ValueError, match=r"no sharding rule matches 'weights/stem\.b"):
        state_shardings(tree, make_mesh(), [(r"kernel$", "split")])


def test_batches_and_large_arrays_are_split_and_small_ones_copied():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    shapes = {
        "wide.kernel": (128, 512),
        "odd.kernel": (128, 1023),  # along the largest axis that is divided
        "small.kernel": (64, 512),
        "wide.a_log": (128, 512),  # no product reads it
    }
    tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    specs = {k: s.spec for k, s in state_shardings(tree, mesh).items()}
    assert specs == {
        "wide.kernel": P(None, "fsdp"),
        "odd.kernel": P("fsdp"),
        "small.kernel": P(),
        "wide.a_log": P(),
    }
    one = jax.sharding.AbstractMesh((8, 1), ("data", "fsdp"))
    assert state_shardings(tree, one)["wide.kernel"].spec == P()


@pytest.mark.parametrize("data, fsdp", [(2, 1), (-1, 2), (-1, -1), (0, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(UserError, match="does not fit 1 device"):
        make_mesh(data, fsdp)
