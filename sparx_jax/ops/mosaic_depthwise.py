"""Depthwise convolution as TPU kernels, by Pallas and Mosaic.

One program has the map of 8 images and 128 channels in VMEM, a vector register a
pixel as in `mosaic_tpu`, and copies it in float32 with a border of zeros.  The filter
and the sums of some pixels of a row stay in registers.  The gradient of the input is
the same with the filter mirrored; that of the filter has its k * k sums in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparx_jax.ops.mosaic_tpu import LANES, SUBLANES, USABLE
from sparx_jax.typing import Array, Float

LARGEST = 5  # filter: of 64 registers k * k are the filter's
PIXELS = 8  # at most, whose sums are in registers


def room(shape: tuple[int, ...], dtype: jnp.dtype, k: int) -> int:
    """Bytes of VMEM for what the gradient of maps of (b, h, w, c) needs."""
    _, height, width, _ = shape
    border = 4 * (height + k - 1) * (width + k - 1)
    # Each map is loaded or stored while another one is used.
    maps = 3 * 2 * jnp.dtype(dtype).itemsize * height * width
    filters = 4 * 4 * (k * k + 1)
    return int((border + maps + filters) * SUBLANES * LANES / USABLE)


def depthwise(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    bias: Float[Array, " c"] | None = None,
    *,
    residual: bool,
    interpret: bool,
) -> Float[Array, "b h w c"]:
    """As `ops.depthwise_conv` with stride 1, k <= LARGEST, and maps that fit."""
    k, (b, *_, c) = len(kernel), x.shape
    bias = jnp.zeros(c) if bias is None else bias
    vmem, x = room(x.shape, x.dtype, k), _pixels_first(x)
    y = pl.pallas_call(
        partial(_forward, k=k),
        grid=_grid(x),
        in_specs=[_map(x), _filter(k * k), _filter(1)],
        out_specs=_map(x),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[_bordered(x, k)],
        compiler_params=_params(vmem),
        interpret=interpret,
        name=f"depthwise{k}_forward",
    )(x, _weights(kernel, residual), _registers(bias[None]))
    return y.transpose(2, 0, 1, 3)[:b]


def depthwise_vjp(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    grad: Float[Array, "b h w c"],
    *,
    residual: bool,
    interpret: bool,
) -> tuple[Float[Array, "b h w c"], Float[Array, "k k c"], Float[Array, " c"]]:
    """Gradients of `x`, `kernel` and the bias."""
    k, (b, *_, c) = len(kernel), x.shape
    vmem = room(x.shape, x.dtype, k)
    x, grad = map(_pixels_first, (x, grad))
    grad_x, sums = pl.pallas_call(
        partial(_backward, k=k),
        grid=_grid(x),
        in_specs=[_map(x), _map(x), _filter(k * k)],
        out_specs=[
            _map(x),
            pl.BlockSpec((1, k * k + 1, LANES), lambda b, c: (b, 0, c)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((_grid(x)[0], k * k + 1, c), jnp.float32),
        ],
        scratch_shapes=[_bordered(x, k)],
        compiler_params=_params(vmem),
        interpret=interpret,
        name=f"depthwise{k}_backward",
    )(x, grad, _weights(kernel[::-1, ::-1], residual))
    sums = sums.sum(0).astype(kernel.dtype)
    grad_x = grad_x.transpose(2, 0, 1, 3)[:b]
    return grad_x, sums[:-1].reshape(kernel.shape), sums[-1]


def _params(vmem):
    semantics = "parallel", "parallel"
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem)


def _pixels_first(x):
    """Whole registers of images; XLA keeps most maps of a network in this layout."""
    x = jnp.pad(x, ((0, -len(x) % SUBLANES), *[(0, 0)] * 3))
    return x.transpose(1, 2, 0, 3)


def _grid(x):
    return x.shape[2] // SUBLANES, pl.cdiv(x.shape[3], LANES)


def _map(x):
    return pl.BlockSpec((*x.shape[:2], SUBLANES, LANES), lambda b, c: (0, 0, b, c))


def _filter(number):
    return pl.BlockSpec((number, SUBLANES, LANES), lambda b, c: (0, 0, c))


def _bordered(x, k):
    height, width = (size + k - 1 for size in x.shape[:2])
    return pltpu.VMEM((height, width, SUBLANES, LANES), jnp.float32)


def _weights(kernel, residual):
    k, kernel = len(kernel), kernel.astype(jnp.float32)
    if residual:
        kernel = kernel.at[k // 2, k // 2].add(1.0)
    return _registers(kernel.reshape(k * k, -1))


def _registers(rows):
    """Each row for all images of a register."""
    shape = (len(rows), SUBLANES, rows.shape[-1])
    return jnp.broadcast_to(rows.astype(jnp.float32)[:, None], shape)


def _add_border(x, bordered, k):
    (height, width, *register), pad = x.shape, k // 2
    sides = jnp.zeros((pad, *register), jnp.float32)
    line = jnp.zeros((width + 2 * pad, *register), jnp.float32)
    for i in range(pad):
        bordered[i] = bordered[height + pad + i] = line

    def copy(row, _):
        at = row + pad
        if pad:
            bordered[at, :pad] = bordered[at, width + pad :] = sides
        bordered[at, pad : width + pad] = x[row].astype(jnp.float32)

    lax.fori_loop(0, height, copy, None)


def _for_pixels(shape, function, carry=None):
    """Calls it for some pixels after others: `(row, column, count, carry) -> carry`."""
    height, width, *_ = shape
    pieces = pl.cdiv(width, PIXELS)
    count = width // pieces

    def row(row, carry):
        def piece(i, carry):
            return function(row, i * count, count, carry)

        carry = lax.fori_loop(0, pieces, piece, carry)
        if rest := width - pieces * count:
            carry = function(row, pieces * count, rest, carry)
        return carry

    return lax.fori_loop(0, height, row, carry)


def _convolve(bordered, filters, bias, y, k):
    weights = [filters[i] for i in range(k * k)]

    def pixels(row, column, count, _):
        sums = [bias] * count
        for i in range(k):
            reads = [bordered[row + i, column + j] for j in range(count + k - 1)]
            for j in range(k):
                for c in range(count):
                    sums[c] += weights[i * k + j] * reads[c + j]
        for c in range(count):
            y[row, column + c] = sums[c].astype(y.dtype)

    _for_pixels(y.shape, pixels)


def _forward(x, filters, bias, y, bordered, *, k):
    _add_border(x, bordered, k)
    _convolve(bordered, filters, bias[0], y, k)


def _backward(x, grad, filters, grad_x, sums, bordered, *, k):
    _add_border(grad, bordered, k)
    _convolve(bordered, filters, jnp.zeros(filters.shape[1:]), grad_x, k)

    def pixels(row, column, count, totals):
        *totals, total = totals
        values = [x[row, column + c].astype(jnp.float32) for c in range(count)]
        for i in range(k):
            at = row + k - 1 - i
            reads = [bordered[at, column + j] for j in range(count + k - 1)]
            for j in range(k):
                for c in range(count):
                    totals[i * k + j] += values[c] * reads[c + k - 1 - j]
            if i == k // 2:
                total += sum(reads[k // 2 : k // 2 + count])
        return (*totals, total)

    zeros = (jnp.zeros(filters.shape[1:]),) * (k * k + 1)
    for i, total in enumerate(_for_pixels(x.shape, pixels, zeros)):
        sums[0, i] = total.sum(0)
