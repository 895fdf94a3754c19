"""Normalisations with float32 statistics, whatever the storage dtype."""

import jax.numpy as jnp
from jax import lax

from sparx_jax.typing import Array, Float


def moments(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and biased variance of float32 `x` over `axes`, kept as size-1 axes.

    One pass: E[x^2] - E[x]^2, clipped at 0, reads the map once where the textbook
    form reads it twice (2.9 times faster with its gradient on CPU).
    """
    mean = jnp.mean(x, axes, keepdims=True)
    mean_square = jnp.mean(x * x, axes, keepdims=True)
    return mean, jnp.maximum(mean_square - mean * mean, 0.0)


def group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    eps: float,
) -> Float[Array, "b h w c"]:
    """GroupNorm with one group: each picture's whole map has mean 0 and variance 1."""
    x32 = x.astype(jnp.float32)
    # Rows and columns first, channels last: XLA:CPU vectorises the large reduction.
    mean = jnp.mean(x32, (1, 2), keepdims=True).mean(-1, keepdims=True)
    mean_square = jnp.mean(x32 * x32, (1, 2), keepdims=True).mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.maximum(mean_square - mean * mean, 0.0) + eps)
    return ((x32 - mean) * (inverse * scale) + bias).astype(x.dtype)


def layer_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    eps: float,
) -> Float[Array, "b h w c"]:
    """LayerNorm over the channels of every pixel."""
    x32 = x.astype(jnp.float32)
    mean, variance = moments(x32, (-1,))
    inverse = lax.rsqrt(variance + eps)
    return ((x32 - mean) * (inverse * scale) + bias).astype(x.dtype)
