"""Rows that do not compete for the same places of a CPU core's cache."""

import jax.numpy as jnp

from sparx_jax.typing import Array, Float


def skewed(x: Float[Array, "*rows c"]) -> Float[Array, "*rows c2"]:
    """`x` with 64 bytes of zeros after each row, if rows are n x 2048 bytes apart.

    Addresses 4096 bytes apart share the 8 or 12 lines of one place in the first cache.
    What reads a column of many rows then finds none of them there again: a depthwise
    5 x 5 of 1024 channels took 3 to 6 times as long, an Eigen matrix product twice.
    """
    *rows, c = x.shape
    size = x.dtype.itemsize
    if c * size % 2048:
        return x
    # Not `jnp.pad`: XLA:CPU would compute `x` inside it, without vector instructions.
    return jnp.concatenate([x, jnp.zeros((*rows, 64 // size), x.dtype)], -1)
