"""Which rows get 64 bytes more."""

import jax.numpy as jnp
import pytest

from sparx_jax.ops.skew import skewed


@pytest.mark.parametrize(
    "channels, dtype, more",
    [
        (512, "float32", 16),
        (1536, "float32", 16),
        (1024, "bfloat16", 32),
        (500, "float32", 0),
        (256, "float32", 0),
        (512, "bfloat16", 0),
    ],
)
def test_rows_of_whole_half_pages_get_zeros(channels, dtype, more):
    x = jnp.ones((2, 3, channels), dtype)
    y = skewed(x)
    assert y.shape == (2, 3, channels + more) and y.dtype == dtype
    assert y.sum(dtype=jnp.float32) == x.size and (y[..., :channels] == 1).all()
