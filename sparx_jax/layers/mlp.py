"""The feed-forward half of a block."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv, pointwise
from sparx_jax.typing import Array, Float


class ConvMlp(nnx.Module):
    """Pointwise, residual 3 x 3 depthwise, exact GELU, pointwise."""

    def __init__(self, dim: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.expand = pointwise(dim, hidden, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(hidden, 3, dtype=dtype, rngs=rngs)
        self.reduce = pointwise(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.expand(x)
        x = x + self.conv(x)
        return self.reduce(jax.nn.gelu(x, approximate=False))
