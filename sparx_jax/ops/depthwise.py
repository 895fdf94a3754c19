"""Depthwise convolution that is fast on CPU as well as on accelerators.

XLA runs a grouped convolution with one channel a group at about 1 GFLOP/s on CPU.
There the sum of shifted products below was 9 to 30 times faster, forward and backward.
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
from sparx_jax.ops.batch import shard_batch
from sparx_jax.ops.mosaic_tpu import target_vmem
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
    return lax.platform_dependent(
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
    grads = lax.platform_dependent(
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
    if k <= triton_depthwise.LARGEST:
        found["cuda"] = getattr(triton_depthwise, name)
    room = mosaic_depthwise.room(x.shape, x.dtype, k)
    if k <= mosaic_depthwise.LARGEST and room <= vmem:
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
    y = y if bias is None else y + bias
    return x + y if residual else y


def _grouped_conv_vjp(x, kernel, grad, **settings):
    bias = jnp.zeros(x.shape[-1], x.dtype)
    return jax.vjp(partial(_grouped_conv, **settings), x, kernel, bias)[1](grad)


# What a loop's body reads at the loop's counter goes through a barrier, a copy: XLA:CPU
# reads the counter anew for every element and then vectorises nothing; 3 x 3 filters
# took three times as long. Nor does it then compute the padding for every shift.
_copy = lax.optimization_barrier


def _shifted_sum(x, kernel, bias=None, *, stride, residual=False):
    k, (_, h, w, c) = kernel.shape[0], x.shape
    height, width, pad = (h - 1) // stride, (w - 1) // stride, k // 2

    def one(image):
        padded = _copy(jnp.pad(image, ((pad, pad), (pad, pad), (0, 0))))
        total = 0
        for i in range(k):
            for j in range(k):
                end = (i + height * stride + 1, j + width * stride + 1, c)
                window = lax.slice(padded, (i, j, 0), end, (stride, stride, 1))
                total += window * kernel[i, j]
        total = total if bias is None else total + bias
        return image + total if residual else total

    # A loop over the pictures, because what leaves a loop is in memory: XLA would copy
    # the k * k products into every operation that reads the result, a dozen of them.
    return lax.map(one, x)


def _shifted_sum_vjp(x, kernel, grad, *, stride, residual=False):
    k, (b, h, w, c) = kernel.shape[0], x.shape
    (_, height, width, _), pad = grad.shape, k // 2

    # Input: scatter the gradient back onto the input's grid, then correlate with the
    # mirrored filter.
    spread = grad
    if stride > 1:
        rest = lambda size, out: size - 1 - (out - 1) * stride  # noqa: E731
        interior = (0, rest(h, height), stride - 1), (0, rest(w, width), stride - 1)
        zero = jnp.zeros((), grad.dtype)
        spread = lax.pad(grad, zero, ((0, 0, 0), *interior, (0, 0, 0)))
    grad_x = _shifted_sum(spread, kernel[::-1, ::-1], stride=1, residual=residual)

    # Filter: one pass over the output rows that keeps the k x k x width x c products in
    # cache; k * k separate reductions would read both maps k * k times.
    padded = _copy(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    span = (width - 1) * stride + 1

    def add_row(index, totals):
        image, row = index // height, index % height
        grad_row = lax.dynamic_slice(grad, (image, row, 0, 0), (1, 1, width, c))[0]
        rows = lax.dynamic_slice(
            padded, (image, row * stride, 0, 0), (1, k, w + 2 * pad, c)
        )[0]
        rows, grad_row = _copy((rows, grad_row.astype(jnp.float32)))
        return tuple(
            total + rows[:, j : j + span : stride] * grad_row
            for j, total in enumerate(totals)
        )

    zeros = jnp.zeros((k, width, c), jnp.float32)
    totals = lax.fori_loop(0, b * height, add_row, (zeros,) * k)
    grad_kernel = jnp.stack(totals, 1).sum(2).astype(kernel.dtype)
    return grad_x, grad_kernel, grad.sum((0, 1, 2))
