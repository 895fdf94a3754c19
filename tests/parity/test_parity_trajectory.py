"""The compiled step against PyTorch and timm, over warm-up, clipping and decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax import load_torch_weights, models
from sparx_jax.interop.names import to_torch
from sparx_jax.parallel import make_mesh
from sparx_jax.training import state as states
from sparx_jax.training.config import default_config, from_config_dict
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.step import compile_train_step
from tests.parity import generate
from tests.parity.reference import facts
from tests.parity.trajectory import SETTING, batch, moved

pytestmark = pytest.mark.slow
GOLDEN = "swin_trajectory"


def config():
    settings, s = default_config(), SETTING
    settings.model.name = "swin_t"
    settings.model.depths = s["depths"]
    settings.model.dims = tuple(s["dim"] * 2**i for i in range(4))
    settings.model.head_dim, settings.model.window_size = s["head_dim"], s["window"]
    settings.model.num_classes, settings.model.drop_path_rate = s["classes"], 0.0
    settings.data.image_size, settings.batch_size = s["image_size"], s["batch"]
    settings.label_smoothing, settings.ema_decay = s["smoothing"], s["ema_decay"]
    for name in ("lr", "weight_decay", "warmup_lr", "min_lr", "clip_norm", "eps"):
        settings.optimizer[name] = s[name]
    return from_config_dict(settings)


@functools.cache
def trajectory():
    """The metrics of each step, and the initial and last arrays by torch name."""
    settings, s = config(), SETTING
    model = models.build(settings.model, 0)
    shapes = facts(GOLDEN)["shapes"]
    initial = {key: generate.tensor(key, shape) for key, shape in shapes.items()}
    load_torch_weights(model, initial)
    network, weights = states.split(model)
    optimizer, mesh = make_optimizer(settings.optimizer), make_mesh(1, 1)
    schedule = learning_rate(settings.optimizer, s["warmup_steps"], s["steps"])
    state = states.TrainState(
        jnp.zeros((), jnp.int32),
        weights,
        jax.tree.map(jnp.copy, weights),
        optimizer.init(weights.params),
    )
    step = compile_train_step(network, settings, optimizer, schedule, state, mesh)
    rows = []
    for i in range(s["steps"]):
        images, labels = batch(i)
        weight = np.ones(len(labels), np.float32)
        state, metrics = step(state, dict(image=images, label=labels, weight=weight))
        rows.append(jax.device_get(metrics))
    last = {k: to_torch(jax.device_get(w.params)) for k, w in
            (("raw", state.weights), ("ema", state.ema))}  # fmt: skip
    return rows, initial, last


@pytest.mark.parametrize("name", ["train_loss", "grad_norm", "learning_rate"])
def test_every_step_has_the_numbers_of_timm(name, check):
    expected = [row[name] for row in facts(GOLDEN)["steps"]]
    clipped = sum(
        row["grad_norm"] > SETTING["clip_norm"] for row in facts(GOLDEN)["steps"]
    )
    assert 0 < clipped < len(expected)
    scale = max(expected) if name == "learning_rate" else np.array(expected)
    found = np.array([row[name] for row in trajectory()[0]])
    errors = np.abs(found - expected) / scale
    check(GOLDEN, f"trajectory {name}", {f"step {i}": e for i, e in enumerate(errors)})


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_weights_moved_as_timms(kind, check):
    """In units of the way: its length, and a probe of its direction."""
    _, initial, last = trajectory()
    assert last[kind].keys() == facts(GOLDEN)[kind].keys()
    errors = {}
    for key, (norm, probe) in facts(GOLDEN)[kind].items():
        found_norm, found_probe = moved(key, last[kind][key], initial[key])
        errors[f"norm {key}"] = abs(found_norm / norm - 1)
        errors[f"probe {key}"] = abs(found_probe - probe) / norm
    check(GOLDEN, f"trajectory {kind}", errors)
