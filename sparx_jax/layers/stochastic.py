"""Stochastic depth."""

import jax.numpy as jnp
from flax import nnx

from sparx_jax.typing import Array, Float


class DropPath(nnx.Module):
    """Zeroes a residual branch per image, at `rate`, and scales the others up.

    Does nothing in evaluation mode.  Source: Huang et al., arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = True  # the name that nnx's train() and eval() set

    def __call__(
        self, x: Float[Array, "b h w c"], draws: Float[Array, " b"] | None
    ) -> Float[Array, "b h w c"]:
        """`draws` are uniform in [0, 1): those of 1 - `rate` or more drop theirs."""
        if self.deterministic or self.rate == 0.0:
            return x
        if draws is None:
            raise ValueError(
                "drop path in training mode needs a key: model(x, key=...)"
            )
        keep = (draws < 1 - self.rate)[:, None, None, None]
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
