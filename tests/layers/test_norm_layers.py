"""Norm layers: torch's running statistics, constants and modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.norm import BatchNorm, ChannelAffine, GroupNorm, LayerNorm

# float32 against float64, values of about unit size.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)

SHAPE = (3, 4, 5, 6)
AXES = (0, 1, 2)


def draw(seed=0, mean=2.0, std=3.0):
    rng = np.random.default_rng(seed)
    return (mean + std * rng.standard_normal(SHAPE)).astype(np.float32)


def filled(layer):
    """`layer` with parameters that are not their initial values."""
    rng = np.random.default_rng(7)
    for name in ("scale", "bias"):
        variable = getattr(layer, name)
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), float))
    return layer


def affine(x, layer):
    return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def test_running_statistics_are_torchs():
    """After two batches: momentum 0.1 for the new one, the variance unbiased."""
    norm = BatchNorm(6)
    norm.train()
    mean, var = np.zeros(6), np.ones(6)
    for seed in (0, 1):
        x = draw(seed)
        norm(jnp.asarray(x))
        x = x.astype(np.float64)
        mean = 0.9 * mean + 0.1 * x.mean(AXES)
        var = 0.9 * var + 0.1 * x.var(AXES, ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, **TOLERANCE)
    np.testing.assert_allclose(norm.var[...], var, **TOLERANCE)
    # The biased variance would differ by 1 part in 60, far above the tolerance.


def test_training_normalises_by_the_batch_and_evaluation_by_the_running_statistics():
    norm, x = filled(BatchNorm(6)), draw()
    norm.train()
    got = norm(jnp.asarray(x))
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(AXES)) / np.sqrt(x64.var(AXES) + 1e-5)
    np.testing.assert_allclose(got, affine(expected, norm), **TOLERANCE)

    norm.eval()
    mean, var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
    got = norm(jnp.asarray(x))
    np.testing.assert_allclose(
        got, affine((x64 - mean) / np.sqrt(var + 1e-5), norm), **TOLERANCE
    )
    np.testing.assert_array_equal(norm.mean[...], mean)  # evaluation leaves no trace


def test_one_value_a_channel_has_variance_zero_not_nan():
    norm = BatchNorm(6)
    norm.train()
    y = norm(jnp.asarray(draw()[:1, :1, :1]))
    np.testing.assert_array_equal(y, np.zeros_like(y))
    np.testing.assert_allclose(norm.var[...], np.full(6, 0.9), rtol=1e-6)


def test_gradient_passes_through_the_batch_statistics():
    """The textbook formula, and none through the running averages."""
    x, cotangent = draw(), draw(2, 0.0, 1.0)

    @jax.jit
    @jax.grad
    def gradient(x):
        norm = filled(BatchNorm(6))
        norm.train()
        loss = (norm(x) * cotangent).sum()
        return loss + 100 * (norm.mean[...] + norm.var[...]).sum()

    std = np.sqrt(x.var(AXES, dtype=np.float64) + 1e-5)
    unit = (x - x.mean(AXES, dtype=np.float64)) / std
    g = cotangent * np.asarray(filled(BatchNorm(6)).scale[...], np.float64)
    expected = (g - g.mean(AXES) - unit * (g * unit).mean(AXES)) / std
    np.testing.assert_allclose(gradient(x), expected, **TOLERANCE)


@pytest.mark.parametrize("norm, axes", [(GroupNorm, (1, 2, 3)), (LayerNorm, (3,))])
def test_group_and_layer_norm_use_epsilon_1e_5(norm, axes):
    layer, x = filled(norm(6)), 1e-3 * draw(mean=0.0)
    x64 = x.astype(np.float64)
    var = x64.var(axes, keepdims=True)
    expected = (x64 - x64.mean(axes, keepdims=True)) / np.sqrt(var + 1e-5)
    got = layer(jnp.asarray(x))
    np.testing.assert_allclose(got, affine(expected, layer), **TOLERANCE)


def test_channel_affine_is_the_identity_at_first():
    layer, x = ChannelAffine(6), draw()
    np.testing.assert_array_equal(layer(jnp.asarray(x)), x)
    np.testing.assert_allclose(
        filled(layer)(jnp.asarray(x)), affine(x, layer), **TOLERANCE
    )


@pytest.mark.parametrize("layer", [BatchNorm, GroupNorm, LayerNorm, ChannelAffine])
def test_storage_dtype_is_kept_and_parameters_stay_float32(layer):
    layer = layer(6)
    x = jnp.asarray(draw(), jnp.bfloat16)
    for mode in (layer.eval, layer.train):
        mode()
        assert layer(x).dtype == jnp.bfloat16
    assert {str(v.dtype) for v in jax.tree.leaves(nnx.state(layer))} == {"float32"}
