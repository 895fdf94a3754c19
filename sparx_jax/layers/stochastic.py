"""Stochastic depth."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.typing import Array, Float, Key


class DropPath(nnx.Module):
    """Zeroes a residual branch per picture, at `rate`, and scales the others up.

    Does nothing in evaluation mode.  Source: Huang et al., arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = True  # the name that nnx's train() and eval() set

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None
    ) -> Float[Array, "b h w c"]:
        if self.deterministic or self.rate == 0.0:
            return x
        if key is None:
            raise ValueError(
                "drop path in training mode needs a key: model(x, key=...)"
            )
        keep = jax.random.bernoulli(key, 1 - self.rate, (len(x), 1, 1, 1))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
