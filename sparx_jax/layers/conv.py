"""Convolutions with the padding and the initialisation of the authors' network."""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from sparx_jax import ops
from sparx_jax.layers import init
from sparx_jax.typing import Array, Float


def pointwise(
    dim: int, out_dim: int, *, bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """1 x 1 convolution, as the matrix product that it is."""
    return nnx.Linear(
        dim,
        out_dim,
        use_bias=bias,
        kernel_init=init.weights,
        bias_init=init.biases,
        dtype=dtype,
        dot_general=_dot_general,
        rngs=rngs,
    )


def _dot_general(x, kernel, *_, **__):
    """What `nnx.Linear` calls."""
    return ops.matmul(x, kernel)


class GroupedPointwise(nnx.Module):
    """1 x 1 convolution in groups of equal width: one matrix product a group."""

    def __init__(
        self, groups: int, dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        shape = (groups, dim // groups, out_dim // groups)
        self.kernel = nnx.Param(init.weights(rngs.params(), shape))
        self.bias = nnx.Param(init.zeros(out_dim))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        kernels = self.kernel[...].astype(self.dtype)
        parts = jnp.split(x, len(kernels), -1)
        parts = [ops.matmul(*pair) for pair in zip(parts, kernels, strict=True)]
        bias = lax.broadcast_to_rank(self.bias[...].astype(self.dtype), x.ndim)
        return jnp.concatenate(parts, -1) + bias


class DepthwiseConv(nnx.Module):
    """k x k convolution of each channel by itself, padding k // 2.

    With `residual` it adds its input.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        stride: int = 1,
        bias: bool = True,
        residual: bool = False,
        kernel_init: init.Initializer = init.weights,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, dim)))
        self.bias = nnx.Param(init.zeros(dim)) if bias else None
        self.stride = stride
        self.residual = residual
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        bias = None if self.bias is None else self.bias[...]
        return ops.depthwise_conv(
            x.astype(self.dtype),
            self.kernel[...],
            bias,
            stride=self.stride,
            residual=self.residual,
        )
