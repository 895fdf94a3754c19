"""Stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.layers.stochastic import DropPath

RATE = 0.3


def dropped(key, batch=4000, rate=RATE):
    layer = DropPath(rate)
    layer.train()
    x = jnp.ones((batch, 2, 2, 3))
    return np.asarray(layer(x, jax.random.uniform(key, (batch,))))


def test_expectation_is_kept():
    """Within four standard errors of the mean over 4,000 pictures."""
    y = dropped(jax.random.key(0))
    error = np.sqrt(RATE / (1 - RATE) / len(y))
    assert abs(y.mean() - 1) < 4 * error


def test_a_image_is_kept_whole_or_dropped_whole():
    y = dropped(jax.random.key(0)).reshape(4000, -1)
    assert (y == y[:, :1]).all()
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - RATE)], rtol=1e-6)


def test_the_draws_decide():
    first, again, other = (dropped(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_evaluation_is_the_identity_without_draws():
    layer = DropPath(RATE)
    x = jnp.arange(24.0).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(layer(x, None), x)
    layer.train()
    layer.eval()
    np.testing.assert_array_equal(layer(x, None), x)


def test_rate_zero_is_the_identity_without_draws():
    layer = DropPath(0.0)
    layer.train()
    x = jnp.ones((2, 2, 2, 3))
    np.testing.assert_array_equal(layer(x, None), x)


def test_training_without_a_key_says_how_to_give_one():
    layer = DropPath(RATE)
    layer.train()
    with pytest.raises(ValueError, match=r"key=\.\.\."):
        layer(jnp.ones((2, 2, 2, 3)), None)


def test_gradient_is_scaled_as_the_value():
    layer = DropPath(RATE)
    layer.train()
    draws, x = jnp.linspace(0, 0.9, 8), jnp.ones((8, 1, 1, 1))
    grad = jax.grad(lambda x: layer(x, draws).sum())(x)
    np.testing.assert_array_equal(grad, layer(x, draws))
