"""A run small enough for tests: one compiled step serves all of them."""

from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from sparx_jax.training import state as states
from sparx_jax.training.config import default_config
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import Setup, prepare
from sparx_jax.training.step import compile_eval_step, compile_train_step


def tiny_settings(**overrides):
    """Digits and four layers, one a ganglion; `overrides` are by dotted path."""
    settings = default_config()
    defaults = {
        "model.name": "sparx_mamba_nano",
        "model.depths": (1, 1, 1, 1),
        "model.dims": (8, 8, 12, 16),
        "model.connector.stride": (0, 0, 1, 0),
        "model.connector.start": (0, 0, 0, 0),
        "model.drop_path_rate": 0.2,
        "data.name": "digits",
        "data.image_size": 32,
        "data.crop": "padded",
        "data.flip": False,
        "batch_size": 16,
        "eval_batch_size": 64,
        "ema_decay": 0.9,
        "optimizer.warmup_epochs": 0.02,
        "train_epochs": 0.13,  # 12 steps
        "eval_every_epochs": 0.045,  # 4 steps
        "log_every_steps": 2,
    }
    for path, value in (defaults | overrides).items():
        *parents, name = path.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node[name] = value
    return settings


class Run(NamedTuple):
    """A compiled run of the tiny network before its first step."""

    setup: Setup
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    train_step: object
    eval_step: object
    init: object

    @property
    def config(self):
        return self.setup.config


@pytest.fixture(scope="session")
def run():
    setup = prepare(tiny_settings())
    config, mesh = setup.config, setup.mesh
    schedule = learning_rate(config.optimizer, 2, 12)
    optimizer = make_optimizer(config.optimizer)

    def init():
        return states.init(
            config.model, optimizer, seed=config.seed, use_ema=True, mesh=mesh
        )

    network, state = init()
    return Run(
        setup,
        optimizer,
        schedule,
        compile_train_step(network, config, optimizer, schedule, state, mesh),
        compile_eval_step(network, config, state.weights, mesh),
        lambda: init()[1],
    )


@pytest.fixture(scope="session")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(16, 32, 32, 3)).astype(np.uint8)
    labels = (np.arange(16) % 10).astype(np.int32)
    return {"image": images, "label": labels, "weight": np.ones(16, np.float32)}


def digest(tree):
    """The bits of every array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}
