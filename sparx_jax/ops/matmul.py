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

    On CPU the rows of kernel, result and their gradients are `skewed`: a product with
    512, 1536 or 3072 channels takes 0.5 to 0.8 of the time then.
    """
    return _matmul(x, kernel, jax.config.jax_default_matmul_precision)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, precision):
    product = partial(jnp.matmul, precision=precision)

    def on_cpu(x, kernel):
        return product(x, skewed(kernel))[..., : kernel.shape[-1]]

    return by_platform(x, kernel, cpu=on_cpu, default=product)


def _forward(x, kernel, precision):
    return _matmul(x, kernel, precision), (x, kernel)


def _backward(precision, operands, grad):
    def over_axes(x, kernel, grad):
        axes = tuple(range(x.ndim - 1))
        grad_kernel = jnp.tensordot(x, grad, (axes, axes), precision=precision)
        return jnp.matmul(grad, kernel.T, precision=precision), grad_kernel

    def over_pixels(x, kernel, grad):
        flat_x, flat_grad = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
        grad_x, grad_kernel = over_axes(flat_x, kernel, flat_grad)
        return grad_x.reshape(x.shape[:-1] + grad_x.shape[1:]), grad_kernel

    def on_cpu(x, kernel, grad):
        wide = skewed(skewed(kernel.astype(grad.dtype)).T).T
        grad_x, grad_kernel = over_pixels(x, wide, skewed(grad))
        return grad_x[..., : x.shape[-1]], grad_kernel[:, : grad.shape[-1]]

    x, kernel = operands
    branches = dict(cpu=on_cpu, tpu=over_axes, default=over_pixels)
    grad_x, grad_kernel = by_platform(x, kernel, grad, **branches)
    return grad_x, grad_kernel.astype(kernel.dtype)


_matmul.defvjp(_forward, _backward)
