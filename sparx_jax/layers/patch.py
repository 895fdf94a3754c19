"""Stem and downsampling: where the map gets smaller."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import conv3x3
from sparx_jax.layers.norm import BatchNorm
from sparx_jax.typing import Array, Float


class Stem(nnx.Module):
    """Picture to the first stage's map at a quarter of its size.

    Convolutions of stride 2 first and last; `num_convs - 2` of stride 1 between them.
    """

    def __init__(
        self, in_dim: int, dim: int, *, num_convs: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        dims = (in_dim, *[dim // 2] * (num_convs - 1), dim)
        strides = (2, *[1] * (num_convs - 2), 2)
        self.convs = nnx.List(
            conv3x3(a, b, stride=stride, dtype=dtype, rngs=rngs)
            for a, b, stride in zip(dims, dims[1:], strides, strict=False)
        )
        self.norms = nnx.List(BatchNorm(d) for d in dims[1:])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h4 w4 c2"]:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            x = norm(conv(x))
        return x


class Downsample(nnx.Module):
    """Halves the map and changes its width between two stages."""

    def __init__(self, dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(dim, out_dim, stride=2, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out_dim)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.norm(self.conv(x))
