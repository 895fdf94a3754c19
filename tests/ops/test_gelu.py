"""The exact GELU against the error function of Python's library."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.ops import gelu

X = np.concatenate([np.linspace(-12, 12, 999), [0, -1e4, 1e4, 1e-30, -5.5]])


def expected(x):
    erf, exp = np.vectorize(math.erf), np.vectorize(math.exp)
    share = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * share, share + x * exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(
    "dtype, error", [(jnp.float32, 3e-7), (jnp.bfloat16, 2**-8)], ids=str
)
def test_values_and_slopes_are_exact(dtype, error):
    x = jnp.asarray(X, dtype)
    values, slopes = expected(np.asarray(x, np.float64))
    got = jax.jit(gelu)(x)
    slope = jax.jit(jax.grad(lambda x: gelu(x).sum(dtype=jnp.float32)))(x)
    assert got.dtype == slope.dtype == dtype
    size = 1 + np.abs(np.asarray(x, np.float64))
    np.testing.assert_array_less(np.abs(np.float64(got) - values) / size, error)
    np.testing.assert_array_less(np.abs(np.float64(slope) - slopes) / 2, error)


def test_bfloat16_is_computed_in_float32():
    """On CPU XLA does so by itself; a TPU has units for bfloat16."""
    gradient = jax.grad(lambda x: gelu(x).sum())
    text = str(jax.make_jaxpr(gradient)(jnp.ones(8, jnp.bfloat16)))
    assert text.count("f32[8] = erf") == text.count("= erf ") == 2
    assert "bf16[8] = erf" not in text and "bf16[8] = exp" not in text


def test_the_test_tells_it_from_the_approximation():
    values, _ = expected(X)
    near = np.float64(jax.nn.gelu(jnp.asarray(X, jnp.float32), approximate=True))
    assert np.max(np.abs(near - values) / (1 + np.abs(values))) > 1e-4


def test_only_the_input_is_kept_for_the_gradient():
    x = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    _, kept = jax.eval_shape(lambda x: jax.vjp(gelu, x), x)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)] == [
        ((8,), jnp.bfloat16)
    ]


def test_no_map_is_kept_for_the_gradient():
    """XLA would compute one erf for both passes, and hold it in memory between them."""

    def both(x, grad):
        y, vjp = jax.vjp(gelu, x)
        return y, vjp(grad)

    x = jnp.ones((64, 64))
    text = jax.jit(both).lower(x, x).compile().as_text()
    assert text.count(" erf(") == 2
