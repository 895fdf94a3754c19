"""Depthwise convolution that is fast on CPU as well as on accelerators.

XLA runs a grouped convolution with one channel a group at about 1 GFLOP/s on CPU.
There the sum of shifted products below is 25 to 80 times faster (docs/speed.md).
NVIDIA's GPUs have a kernel for small filters that adds the bias and the input as well.
The best of cuDNN takes as long for the convolution alone, but XLA chooses by short
trials, and once chose 21 of the 91 ms of a training step.  TPUs have one that does the
same where a map has room in their VMEM.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparx_jax.ops import mosaic_depthwise, triton_depthwise
from sparx_jax.ops.batch import by_platform, shard_batch, target_kind
from sparx_jax.ops.mosaic_tpu import target_vmem
from sparx_jax.ops.skew import skewed
from sparx_jax.typing import Array, Float


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    bias: Float[Array, " c"] | None = None,
    *,
    stride: int = 1,
    residual: bool = False,
) -> Float[Array, "b h2 w2 c"]:
    """Convolves every channel with its own k x k filter (k odd), padding k // 2.

    Symmetric padding as in torch; XLA's "SAME" pads strided windows differently.
    Output size: floor((size - 1) / stride) + 1.  Products are summed in the dtype of
    `x` on CPU, in float32 elsewhere.

    Args:
      x: the maps.
      kernel: the filters.
      bias: added.
      stride: between pixels of the output.
      residual: adds `x`.
    """
    if len(kernel) % 2 == 0:  # the backends would pad it differently
        raise ValueError(f"depthwise filters must be odd, not {kernel.shape[:2]}")
    if residual and stride > 1:
        raise ValueError(f"a residual convolution has stride 1, not {stride}")
    bias = None if bias is None else bias.astype(x.dtype)
    return _depthwise(x, kernel.astype(x.dtype), bias, stride, residual)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _depthwise(x, kernel, bias, stride, residual):
    settings = dict(stride=stride, residual=residual)
    return by_platform(
        x,
        kernel,
        bias,
        cpu=shard_batch(partial(_shifted_sum, **settings), "b..", "b"),
        default=partial(_grouped_conv, **settings),
        **_kernels("depthwise", x, kernel, settings, "b..", "b"),
    )


def _forward(x, kernel, bias, stride, residual):
    return _depthwise(x, kernel, bias, stride, residual), (x, kernel, bias)


def _backward(stride, residual, residuals, grad):
    settings = dict(stride=stride, residual=residual)
    *operands, bias = residuals
    grads = by_platform(
        *operands,
        grad,
        cpu=shard_batch(partial(_shifted_sum_vjp, **settings), "b.b", "b++"),
        default=partial(_grouped_conv_vjp, **settings),
        **_kernels("depthwise_vjp", *operands, settings, "b.b", "b++"),
    )
    return *grads[:2], None if bias is None else grads[2]


_depthwise.defvjp(_forward, _backward)


def _kernels(name, x, kernel, settings, *specs):
    """Ours, by platform, for the filters and maps that they are for."""
    k, vmem, found = len(kernel), target_vmem() * 2**20, {}
    if settings["stride"] > 1:
        return found
    if k <= triton_depthwise.LARGEST and target_kind().startswith("NVIDIA"):
        found["cuda"] = getattr(triton_depthwise, name)
    room = partial(mosaic_depthwise.room, x.shape, x.dtype, k)
    if vmem and k <= mosaic_depthwise.LARGEST and room() <= vmem:
        found["tpu"] = getattr(mosaic_depthwise, name)
    options = dict(residual=settings["residual"], interpret=False)
    return {
        platform: shard_batch(partial(function, **options), *specs)
        for platform, function in found.items()
    }


def _grouped_conv(x, kernel, bias=None, *, stride, residual=False):
    pad = kernel.shape[0] // 2
    y = lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    y = y if bias is None else y + lax.broadcast_to_rank(bias, 4)
    return x + y if residual else y


def _grouped_conv_vjp(x, kernel, grad, **settings):
    bias = jnp.zeros(x.shape[-1], x.dtype)
    return jax.vjp(partial(_grouped_conv, **settings), x, kernel, bias)[1](grad)


# XLA:CPU would compute padding anew for every shift: a padded image is memory that
# the loop over the images carries.
def _pad(x, index, padded):
    """Image `index` into the middle of `padded`, whose border stays zero."""
    pad = (len(padded) - x.shape[1]) // 2
    image = lax.dynamic_index_in_dim(
        x, index, keepdims=False, allow_negative_indices=False
    )
    return lax.dynamic_update_slice(padded, image, (pad, pad, 0))


def _padded(x, kernel):
    (_, h, w, _), (k, _, c) = x.shape, kernel.shape
    return jnp.zeros((h + k - 1, w + k - 1, c), x.dtype)


def _middle(padded, k):
    end = (side - k // 2 for side in padded.shape[:2])
    return lax.slice(padded, (k // 2, k // 2, 0), (*end, padded.shape[2]))


def _correlate(padded, kernel, stride=1):
    k, (h, w, c) = len(kernel), padded.shape
    total = 0
    for i in range(k):
        for j in range(k):
            end = (h - k + 1 + i, w - k + 1 + j, c)
            window = lax.slice(padded, (i, j, 0), end, (stride, stride, 1))
            total += window * kernel[i : i + 1, j : j + 1]
    return total


def _write(maps, image, index):
    return lax.dynamic_update_index_in_dim(
        maps, image, index, 0, allow_negative_indices=False
    )


@partial(jax.jit, static_argnames=("stride", "residual"))  # keeps a shape's trace
def _shifted_sum(x, kernel, bias=None, *, stride, residual=False):
    k, (b, h, w, c) = kernel.shape[0], x.shape
    kernel = skewed(kernel)

    def one(index, carry):
        padded, y = carry
        padded = _pad(y if stride == 1 else x, index, padded)
        total = _correlate(padded, kernel, stride)
        total = _middle(padded, k) + total if residual else total
        total = total[..., :c]
        if bias is not None:
            total += lax.broadcast_to_rank(bias, 3)
        return padded, _write(y, total, index)

    # A loop over the images, because what leaves a loop is in memory: XLA would copy
    # the k * k products into every operation that reads the result, a dozen of them.
    # Where they have one shape, the results take the places of the images.
    shape = b, (h - 1) // stride + 1, (w - 1) // stride + 1, c
    y = x if stride == 1 else jnp.zeros(shape, x.dtype)
    return lax.fori_loop(0, b, one, (_padded(x, kernel), y))[1]


@partial(jax.jit, static_argnames=("stride", "residual"))
def _shifted_sum_vjp(x, kernel, grad, *, stride, residual=False):
    k, (b, h, w, c) = kernel.shape[0], x.shape
    _, height, width, _ = grad.shape
    if stride > 1:  # back onto the input's grid
        rest = lambda size, out: size - 1 - (out - 1) * stride  # noqa: E731
        interior = (0, rest(h, height), stride - 1), (0, rest(w, width), stride - 1)
        zero = jnp.zeros((), grad.dtype)
        grad = lax.pad(grad, zero, ((0, 0, 0), *interior, (0, 0, 0)))
    mirrored, pad, span = skewed(kernel[::-1, ::-1]), k // 2, (width - 1) * stride + 1

    def one(index, carry):
        padded, padded_grad, grads, *totals = carry
        padded, padded_grad = _pad(x, index, padded), _pad(grads, index, padded_grad)

        # Filter: one pass over the output rows that keeps the k x k x width x c
        # products in cache; k * k reductions would read both maps k * k times.
        def add_row(row, totals):
            start, size = (pad + row * stride, pad, 0), (1, span, c)
            grad_row = lax.dynamic_slice(
                padded_grad, start, size, allow_negative_indices=False
            )[:, ::stride].astype(jnp.float32)
            start, size = (row * stride, 0, 0), (k, padded.shape[1], c)
            rows = lax.dynamic_slice(padded, start, size, allow_negative_indices=False)
            # Copies: XLA:CPU reads the loop's counter anew for every element, and then
            # vectorises nothing; 3 x 3 filters took three times as long.
            rows, grad_row = lax.optimization_barrier((rows, grad_row))
            taken = (rows[:, j : j + span : stride] for j in range(k))
            *taps, bias = totals
            taps = [
                total + part.astype(jnp.float32) * grad_row
                for total, part in zip(taps, taken, strict=True)
            ]
            return [*taps, bias + grad_row]

        totals = lax.fori_loop(0, height, add_row, totals)
        # Input: its gradient takes the place of the output's.
        total = _correlate(padded_grad, mirrored)
        total = _middle(padded_grad, k) + total if residual else total
        grads = _write(grads, total[..., :c], index)
        return [padded, padded_grad, grads, *totals]

    taps = [jnp.zeros((k, width, c), jnp.float32)] * k
    start = [_padded(x, mirrored), _padded(grad, mirrored), grad, *taps, taps[0][:1]]
    _, _, grad_x, *taps, bias = lax.fori_loop(0, b, one, start)
    grad_kernel = jnp.stack(taps, 1).sum(2).astype(kernel.dtype)
    return grad_x, grad_kernel, bias.sum((0, 1)).astype(grad.dtype)
