"""Laws of the schedule and of the weight-decay rule."""

import json
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx

from sparx_jax import create_model, list_models
from sparx_jax.interop.names import torch_name
from sparx_jax.training import state as states
from sparx_jax.training.config import OptimizerConfig
from sparx_jax.training.optimizer import is_decayed, learning_rate, make_optimizer

MANIFESTS = Path(__file__).parents[1] / "parity/manifests"


def test_the_rate_rises_linearly_and_falls_as_a_half_cosine():
    config = OptimizerConfig(lr=1.0, warmup_lr=0.1, min_lr=0.2)
    schedule = learning_rate(config, warmup_steps=10, total_steps=110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0.1, 0.55, 1.0, 0.6, 0.2, 0.2], rtol=1e-5)


def test_a_run_without_warm_up_starts_at_the_full_rate():
    assert float(learning_rate(OptimizerConfig(lr=1.0), 0, 10)(0)) == 1.0


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])  # the last is never reached
def test_the_optimizer_is_adamw_of_the_clipped_gradient(clip_norm):
    config = OptimizerConfig(weight_decay=0.1, clip_norm=clip_norm, eps=1e-3)
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    shapes = {"a.kernel": (3, 4), "a.bias": (4,), "b.skip": (2, 3), "b.a_log": (2, 1)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    expected = {k: p.astype(np.float64) for k, p in params.items()}
    state, m, v = (
        optimizer.init(params),
        dict.fromkeys(shapes, 0),
        dict.fromkeys(shapes, 0),
    )
    for step in range(1, 4):
        grads = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        updates, state = optimizer.update(
            grads, state, params, learning_rate=0.01 * step, grad_norm=norm
        )
        params = optax.apply_updates(params, updates)
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for k, g in grads.items():
            g = g * scale
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
            mean, square = (
                m[k] / (1 - config.beta1**step),
                v[k] / (1 - config.beta2**step),
            )
            update = mean / (np.sqrt(square) + config.eps)
            update += 0.1 * expected[k] * (k in ("a.kernel", "b.a_log"))
            expected[k] = expected[k] - 0.01 * step * update
    for k in shapes:
        np.testing.assert_allclose(params[k], expected[k], atol=1e-6, err_msg=k)


def test_weight_decay_acts_on_what_the_authors_trainer_decays():
    """timm exempts tensors of one axis and names that end in ".bias"."""
    manifest = json.loads((MANIFESTS / "sparx_mamba_t.json").read_text())
    shapes = {entry["key"]: entry["shape"] for entry in manifest["tensors"]}
    params = states.split(create_model("sparx_mamba_t"))[1].params
    for path in params:
        name = torch_name(path)
        expected = len(shapes[name]) > 1 and not name.endswith(".bias")
        assert is_decayed(path) == expected, path


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*_t"))
def test_every_parameter_of_every_family_has_a_rule(name):
    for fusion in ("dmca", "dmca_spatial", "concat"):
        connector = dict(mode="densenet", fusion=fusion)
        model = nnx.eval_shape(lambda c=connector: create_model(name, connector=c))
        for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            assert is_decayed(".".join(map(str, path))) in (True, False)


def test_swins_position_biases_are_not_decayed():
    assert not is_decayed("stages.0.blocks.1.mixer.position_bias")


def test_a_parameter_without_rule_is_an_error():
    with pytest.raises(ValueError, match="no weight-decay rule"):
        is_decayed("stages.0.new_thing")
