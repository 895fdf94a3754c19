"""Initial weights: drawn on the host, distributed as the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers import init
from sparx_jax.layers.ss2d import SS2D

SHAPE = (200, 300)


def mixer(seed=0, dim=48, state_dim=3):
    return SS2D(
        dim,
        inner_ratio=2,
        state_dim=state_dim,
        scan_method="auto",
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(seed),
    )


def test_weights_are_normal_with_deviation_002():
    """Moments within four standard errors; 4.6 % beyond two deviations."""
    w = np.asarray(init.weights(jax.random.key(0), SHAPE), np.float64)
    n = w.size
    assert abs(w.mean()) < 4 * 0.02 / np.sqrt(n)
    assert abs(w.std() / 0.02 - 1) < 4 / np.sqrt(2 * n)
    assert abs((np.abs(w) > 0.04).mean() - 0.0455) < 4 * np.sqrt(0.0455 / n)


def test_the_key_decides_and_tracing_changes_nothing():
    first, again, other = (
        init.weights(jax.random.key(seed), SHAPE) for seed in (0, 0, 1)
    )
    traced = jax.jit(lambda key: init.weights(key, SHAPE))(jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, traced)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.99


def test_abstract_parameters_are_the_real_ones_undrawn(monkeypatch):
    def state():
        return nnx.state(mixer())

    real = state()
    monkeypatch.setattr(np.random, "default_rng", None)  # a draw would raise
    abstract = jax.eval_shape(state)
    facts = [jax.tree.map(lambda a: (a.shape, a.dtype), t) for t in (real, abstract)]
    assert facts[0] == facts[1]


def test_step_sizes_are_log_uniform_from_1e_3_to_1e_1():
    steps = np.log10(jax.nn.softplus(mixer().dt_bias[...])).ravel()
    assert -3 - 1e-4 < steps.min() < -2.95 and -1.05 < steps.max() < -1 + 1e-4
    quarters = np.histogram(steps, 4, (-3, -1))[0] / steps.size
    assert np.abs(quarters - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / steps.size)


def test_decays_are_the_first_integers_and_the_skip_is_one():
    ssm = mixer()
    expected = np.broadcast_to([-1.0, -2.0, -3.0], ssm.a_log.shape)
    np.testing.assert_allclose(-np.exp(ssm.a_log[...]), expected, rtol=1e-6)
    np.testing.assert_array_equal(ssm.skip[...], np.ones((4, 96)))


@pytest.mark.parametrize("name, fan_in", [("x_proj", 96), ("dt_proj", 3)])
def test_projections_are_uniform_over_their_fan_in(name, fan_in):
    w, bound = np.asarray(getattr(mixer(), name)[...]), fan_in**-0.5
    assert np.abs(w).max() <= bound
    assert abs(w.std() * np.sqrt(3) / bound - 1) < 0.05


def test_an_ensemble_draws_what_each_of_its_members_would():
    def draw(key):
        return init.weights(key, (3, 4))

    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(jax.vmap(draw)(keys), [draw(key) for key in keys])
