"""Normalisations against float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.ops import group_norm, layer_norm, moments

# Absolute error of values of unit variance.  A float32 mean of m is itself off by about
# m * 1e-7.  The terms of the gradient are a few times larger than the values.
TOLERANCE = {"unit": 2e-6, "mean 100": 3e-5, "bfloat16": 1e-2, "gradient": 5e-6}

EPS = 1e-5
AXES = {group_norm: (1, 2, 3), layer_norm: (3,)}
NORMS = pytest.mark.parametrize("norm", AXES)


def draw(mean=0.0, std=1.0, shape=(2, 7, 5, 24), dtype=np.float32):
    rng = np.random.default_rng(0)
    x = (mean + std * rng.standard_normal(shape)).astype(dtype)
    scale, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    return x, scale, bias


def normalize64(x, scale, bias, axes, eps=EPS):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(x.var(axes, keepdims=True) + eps) * scale + bias


@NORMS
@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_equals_float64(norm, size):
    x, scale, bias = draw(shape=(2, *size, 24))
    got = jax.jit(partial(norm, eps=EPS))(x, scale, bias)
    expected = normalize64(x, scale, bias, AXES[norm])
    np.testing.assert_allclose(got, expected, rtol=0, atol=3 * TOLERANCE["unit"])


@NORMS
@pytest.mark.parametrize("mean", [100, -100])
def test_a_large_mean_does_not_cancel_the_variance(norm, mean):
    """E[x^2] - E[x]^2 in float32 is off by 3e-3 here: a hundred times the limit."""
    x, scale, bias = draw(mean, shape=(2, 28, 28, 96))
    got = jax.jit(partial(norm, eps=EPS))(x, scale, bias)
    expected = normalize64(x, scale, bias, AXES[norm])
    atol = TOLERANCE["mean 100"] * np.abs(scale).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@NORMS
def test_epsilon_stands_under_the_root(norm):
    x, scale, bias = draw(std=1e-3)
    got = jax.jit(partial(norm, eps=EPS))(x, scale, bias)
    expected = normalize64(x, scale, bias, AXES[norm])
    np.testing.assert_allclose(got, expected, rtol=0, atol=3 * TOLERANCE["unit"])
    without = normalize64(x, scale, bias, AXES[norm], eps=0)
    assert np.abs(without - expected).max() > 0.1, "the case would not show it"


@NORMS
def test_a_constant_map_becomes_the_bias(norm):
    x, scale, bias = draw(mean=3, std=0)
    got = jax.jit(partial(norm, eps=EPS))(x, scale, bias)
    np.testing.assert_allclose(got, np.broadcast_to(bias, x.shape), atol=1e-3)


@NORMS
def test_bfloat16_storage_has_float32_statistics(norm):
    x, scale, bias = draw(mean=4, shape=(2, 28, 28, 24), dtype=jnp.bfloat16)
    got = jax.jit(partial(norm, eps=EPS))(x, scale, bias)
    assert got.dtype == jnp.bfloat16
    expected = normalize64(x, scale, bias, AXES[norm])
    error = np.abs(np.asarray(got, np.float64) - expected) / (1 + np.abs(expected))
    assert error.max() < TOLERANCE["bfloat16"]


@NORMS
def test_gradient_passes_through_the_statistics(norm):
    """Against the textbook formula in float64."""
    x, scale, bias = draw(mean=2)
    cotangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    _, vjp = jax.vjp(jax.jit(partial(norm, eps=EPS)), x, scale, bias)
    grad_x, grad_scale, grad_bias = vjp(cotangent)

    axes, cotangent = AXES[norm], cotangent.astype(np.float64)
    unit = normalize64(x, 1.0, 0.0, axes)
    std = np.sqrt(np.var(x, axes, keepdims=True, dtype=np.float64) + EPS)
    g = cotangent * scale
    means = g.mean(axes, keepdims=True), (g * unit).mean(axes, keepdims=True)
    expected = (g - means[0] - unit * means[1]) / std
    np.testing.assert_allclose(grad_x, expected, atol=TOLERANCE["gradient"])
    over = (0, 1, 2)
    np.testing.assert_allclose(grad_scale, (cotangent * unit).sum(over), rtol=1e-4)
    np.testing.assert_allclose(grad_bias, cotangent.sum(over), rtol=1e-4, atol=1e-5)


@NORMS
def test_gradients_of_bfloat16_maps_are_summed_in_float32(norm):
    """Sums in bfloat16 would leave the gradients of scale and bias 8 bits."""
    x, scale, bias = draw(shape=(2, 28, 28, 24), dtype=jnp.bfloat16)
    cotangent = draw(mean=1, shape=x.shape, dtype=jnp.bfloat16)[0]
    _, vjp = jax.vjp(jax.jit(partial(norm, eps=EPS)), x, scale, bias)
    _, grad_scale, grad_bias = vjp(jnp.asarray(cotangent))
    wide = cotangent.astype(np.float64)
    unit = normalize64(x, 1.0, 0.0, AXES[norm])
    over = (0, 1, 2)
    np.testing.assert_allclose(grad_bias, wide.sum(over), rtol=1e-5)
    np.testing.assert_allclose(grad_scale, (wide * unit).sum(over), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 3), (3,)])
def test_moments_are_mean_and_biased_variance(axes):
    x = draw(mean=100, std=0.5)[0]
    mean, variance = moments(jnp.asarray(x), axes)
    x = x.astype(np.float64)
    np.testing.assert_allclose(mean, x.mean(axes, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(variance, x.var(axes, keepdims=True), rtol=1e-4)
