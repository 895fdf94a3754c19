"""Depthwise convolution as GPU kernels, by Pallas and Triton.

A program walks down some columns of one image, for some channels.  Each row of the
input is read once for every column of the filter and added to the k rows of the output
that it belongs to, whose sums stay in registers, as the filter does.  The filter's
gradient walks likewise, with the last k rows of the output's gradient in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sparx_jax.typing import Array, Float

# Of a program: two warps, whose threads have four channels of one pixel each, so that
# a filter of 5 x 5 takes 100 registers.
COLUMNS, CHANNELS = 4, 64
LARGEST = 5  # filter


def depthwise(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    bias: Float[Array, " c"] | None = None,
    *,
    residual: bool,
    interpret: bool,
) -> Float[Array, "b h w c"]:
    """As `ops.depthwise_conv` with stride 1 and k <= LARGEST."""
    block, grid = _grid(x)
    k, kernel = len(kernel), kernel.astype(jnp.float32)
    if residual:
        kernel = kernel.at[k // 2, k // 2].add(1.0)
    bias = jnp.zeros(x.shape[-1]) if bias is None else bias
    return pl.pallas_call(
        partial(_forward, k=k, block=block, interpret=interpret),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=_params(block),
        interpret=interpret,
        name="depthwise_forward",
    )(x, kernel, bias.astype(jnp.float32)[None, None])


def depthwise_vjp(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    grad: Float[Array, "b h w c"],
    *,
    residual: bool,
    interpret: bool,
) -> tuple[Float[Array, "b h w c"], Float[Array, "k k c"], Float[Array, " c"]]:
    """Gradients of `x`, `kernel` and the bias."""
    grad_x = depthwise(grad, kernel[::-1, ::-1], residual=residual, interpret=interpret)
    block, grid = _grid(x)
    k, parts = len(kernel), grid[0] * grid[2]
    sums = pl.pallas_call(
        partial(_filter_gradient, k=k, block=block, interpret=interpret),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((parts, k * k + 1, x.shape[-1]), jnp.float32),
        compiler_params=_params(block),
        interpret=interpret,
        name="depthwise_gradient",
    )(x, grad)
    sums = sums.sum(0).astype(kernel.dtype)
    return grad_x, sums[:-1].reshape(kernel.shape), sums[-1]


def _grid(x):
    """Channels of a program; programs by columns, channels and images."""
    batch, _, width, channels = x.shape
    # A power of two, and one that divides the channels if that is half a line of cache.
    block = min(CHANNELS, channels & -channels)
    block = block if block >= 32 else min(CHANNELS, pl.next_power_of_2(channels))
    return block, (pl.cdiv(width, COLUMNS), pl.cdiv(channels, block), batch)


def _params(block):
    return plt.CompilerParams(num_warps=max(1, COLUMNS * block // 128), num_stages=1)


class _Tile:
    """Some columns and channels of an image; reads rows of it, zero outside."""

    def __init__(self, shape, block, interpret):
        _, self._height, self._width, channels = shape
        part, group, self.image = map(pl.program_id, range(3))
        self.shape, self._interpret = (COLUMNS, block), interpret
        self._columns = part * COLUMNS + jnp.arange(COLUMNS)[:, None]
        self._channels = group * block + jnp.arange(block)[None]
        exist = jnp.ones((1, block), bool)
        self._exist = exist if channels % block == 0 else self._channels < channels

    def _at(self, row, shift):
        """The index of a row, columns moved by `shift`, and what of it exists."""
        columns = self._columns + shift
        exist = (columns >= 0) & (columns < self._width)
        exist &= (row >= 0) & (row < self._height) & self._exist
        return (self.image, row, columns, self._channels), exist

    def read(self, ref, row, shift=0):
        at, exist = self._at(row, shift)
        return plt.load(ref.at[at], mask=exist, other=0.0).astype(jnp.float32)

    def write(self, ref, row, value):
        at, exist = self._at(row, 0)
        plt.store(ref.at[at], value.astype(ref.dtype), mask=exist)

    def read_filter(self, ref, i, j):
        """The same for every column, so that each thread has what it multiplies by."""
        same = jnp.zeros((COLUMNS, 1), jnp.int32)
        exist = jnp.broadcast_to(self._exist, self.shape)
        at = same + i, same + j, self._channels
        return plt.load(ref.at[at], mask=exist, other=0.0)

    def write_sum(self, ref, at, i, value):
        """Over the columns."""
        at = at, jnp.int32(i), self._channels[0]
        plt.store(ref.at[at], value.sum(0), mask=self._exist[0])

    def fma(self, one, other, summand):
        """By name: XLA has Triton not join a product and a sum."""
        if self._interpret:
            return one * other + summand
        (result,) = plt.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[one, other, summand],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(self.shape, jnp.float32)],
        )
        return result

    def zeros(self, number):
        return (jnp.zeros(self.shape, jnp.float32),) * number


def _forward(x, kernel, bias, y, *, k, block, interpret):
    tile, pad = _Tile(x.shape, block, interpret), k // 2
    bias = tile.read_filter(bias, 0, 0)
    weights = [[tile.read_filter(kernel, i, j) for j in range(k)] for i in range(k)]

    def add_row(row, sums):
        """`sums[i]` is of the output's row that this one is `i - pad` away from."""
        reads, sums = [tile.read(x, row, j - pad) for j in range(k)], list(sums)
        for i in range(k):
            for j in range(k):
                sums[i] = tile.fma(weights[i][j], reads[j], sums[i])
        tile.write(y, row - pad, sums[-1])
        return (bias, *sums[:-1])

    lax.fori_loop(0, x.shape[1] + pad, add_row, (bias,) * k)


def _filter_gradient(x, grad, sums, *, k, block, interpret):
    tile, pad = _Tile(x.shape, block, interpret), k // 2

    def add_row(row, carry):
        """`grads[i]` is the output's row that this one is `i - pad` away from."""
        grads, totals, total = carry
        grads = tile.read(grad, row + pad), *grads
        reads = [tile.read(x, row, j - pad) for j in range(k)]
        totals = [
            tile.fma(grads[i], reads[j], totals[i * k + j])
            for i in range(k)
            for j in range(k)
        ]
        return grads[:-1], tuple(totals), total + grads[pad]

    before = [tile.read(grad, jnp.int32(row)) for row in reversed(range(pad))]
    start = (*before, *tile.zeros(k - 1 - pad)), tile.zeros(k * k), *tile.zeros(1)
    _, totals, total = lax.fori_loop(0, x.shape[1], add_row, start)
    at = pl.program_id(0) + pl.num_programs(0) * tile.image
    for i, value in enumerate([*totals, total]):
        tile.write_sum(sums, at, i, value)
