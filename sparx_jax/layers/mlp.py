"""The feed-forward half of a block."""

import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv, pointwise
from sparx_jax.ops import gelu
from sparx_jax.typing import Array, Float


class Mlp(nnx.Module):
    """Pointwise, residual 3 x 3 depthwise if `conv`, exact GELU, pointwise."""

    def __init__(
        self, dim: int, hidden: int, *, conv: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.expand = pointwise(dim, hidden, **make)
        self.conv = DepthwiseConv(hidden, 3, residual=True, **make) if conv else None
        self.reduce = pointwise(hidden, dim, **make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.expand(x)
        if self.conv is not None:
            x = self.conv(x)
        return self.reduce(gelu(x))
