"""Matrix product of every pixel's channels, whose gradient copies no map on CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from sparx_jax.ops.batch import by_platform
from sparx_jax.ops.skew import skewed
from sparx_jax.typing import Array, Float


def matmul(
    x: Float[Array, "*pixels c"], kernel: Float[Array, "c d"]
) -> Float[Array, "*pixels d"]:
    """`x @ kernel`, with the precision that JAX is set to.

    Its gradient of `kernel` sums over all pixels as one axis.  JAX's sums over several,
    and XLA:CPU then writes the maps anew, transposed, which for one map took 15 times
    as long as the product itself.  On TPUs to join the axes may be a copy instead.
    """
    return _matmul(x, kernel, jax.config.jax_default_matmul_precision)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, precision):
    return jnp.matmul(x, kernel, precision=precision)


def _forward(x, kernel, precision):
    return _matmul(x, kernel, precision), (x, kernel)


def _backward(precision, operands, grad):
    x, kernel = operands
    grad_x = jnp.matmul(grad, kernel.T, precision=precision)

    def over_axes(x, grad):
        axes = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, grad, (axes, axes), precision=precision)

    def over_pixels(x, grad):
        return over_axes(*(t.reshape(-1, t.shape[-1]) for t in (x, grad)))

    def on_cpu(x, grad):
        return over_pixels(x, skewed(grad))[:, : grad.shape[-1]]

    grad_kernel = by_platform(x, grad, cpu=on_cpu, tpu=over_axes, default=over_pixels)
    return grad_x, grad_kernel.astype(kernel.dtype)


_matmul.defvjp(_forward, _backward)
