"""Stem and downsampling: where the map gets smaller."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers import init
from sparx_jax.layers.conv import pointwise
from sparx_jax.layers.norm import BatchNorm, LayerNorm
from sparx_jax.ops import gelu
from sparx_jax.typing import Array, Float

PATCH = 4

ConvNorm = Literal["batch", "layer"]


def conv3x3(
    dim: int,
    out_dim: int,
    *,
    stride: int,
    norm: ConvNorm,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """3 x 3 convolution before a norm, one pixel of padding on every side.

    XLA's "SAME" would pad a stride-2 window by (0, 1) and shift the image.  SparX's
    BatchNorm makes a bias void; VMamba's convolutions are initialised as torch's.
    """
    own = norm == "batch"
    return nnx.Conv(
        dim,
        out_dim,
        (3, 3),
        stride,
        padding=1,
        use_bias=not own,
        kernel_init=init.weights if own else init.torch_conv,
        bias_init=init.biases,
        dtype=dtype,
        rngs=rngs,
    )


class Stem(nnx.Module):
    """Image to the first stage's map at a quarter of its size.

    3 x 3 convolutions of stride 2 first and last; `num_convs - 2` of stride 1 between.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        num_convs: int,
        norm: ConvNorm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        dims = (in_dim, *[dim // 2] * (num_convs - 1), dim)
        strides = (2, *[1] * (num_convs - 2), 2)
        self.convs = nnx.List(
            conv3x3(a, b, stride=stride, norm=norm, dtype=dtype, rngs=rngs)
            for a, b, stride in zip(dims[:-1], dims[1:], strides, strict=True)
        )
        self.norms = nnx.List(_norm_of(norm)(d) for d in dims[1:])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h4 w4 c2"]:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i:
                x = gelu(x)
            x = norm(conv(x))
        return x


class Downsample(nnx.Module):
    """Halves the map by a 3 x 3 convolution and changes its width."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        norm: ConvNorm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.conv = conv3x3(dim, out_dim, stride=2, norm=norm, **make)
        self.norm = _norm_of(norm)(out_dim)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.norm(self.conv(x))


class PatchStem(nnx.Module):
    """Image to patches of 4 x 4 pixels, projected and normalised.

    Source: Liu et al., "Swin Transformer", arXiv:2103.14030.
    """

    def __init__(self, in_dim: int, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = nnx.Conv(
            in_dim,
            dim,
            (PATCH, PATCH),
            PATCH,
            padding="VALID",
            kernel_init=init.torch_conv,
            bias_init=init.biases,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(dim)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h4 w4 c2"]:
        return self.norm(self.proj(_fill_up(x, PATCH)))


class PatchMerging(nnx.Module):
    """Halves the map: the channels of 2 x 2 pixels, normalised and projected.

    The four lie column by column, each from top to bottom.
    Source: Liu et al., "Swin Transformer", arXiv:2103.14030.
    """

    def __init__(self, dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim)
        self.proj = pointwise(4 * dim, out_dim, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = _fill_up(x, 2)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
        return self.proj(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


def _fill_up(x, multiple):
    """Zeros below and to the right, up to a multiple of rows and columns."""
    rows, columns = (-size % multiple for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))


def _norm_of(kind):
    return BatchNorm if kind == "batch" else LayerNorm
