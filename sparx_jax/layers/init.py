"""Initialisers that draw on the host.

A network has hundreds of parameters of a hundred shapes.  Drawn by XLA, each shape
costs a compilation: 40 s for the smallest network, 4 s for the constants alone.  NumPy
draws all of them in less than a second, and the same ones on every platform.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparx_jax.typing import Array, Key

Initializer = Callable[..., Array]


def on_host(
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
) -> Initializer:
    """An initialiser from a function of (NumPy generator, shape)."""

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        def sample(data):
            return draw(np.random.default_rng(np.asarray(data)), shape).astype(dtype)

        data = jax.random.key_data(key)
        if isinstance(data, jax.core.Tracer):  # under jax.eval_shape nothing is drawn
            result = jax.ShapeDtypeStruct(shape, dtype)
            return jax.pure_callback(sample, result, data, vmap_method="sequential")
        return jax.device_put(sample(data))

    return init


def normal(stddev: float) -> Initializer:
    """Normal with mean 0."""
    return on_host(
        lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(stddev)
    )


def uniform(low: float, high: float) -> Initializer:
    """Uniform in [low, high)."""
    return on_host(lambda rng, shape: rng.uniform(low, high, shape))


def zeros(shape: int | tuple[int, ...]) -> Array:
    """Zeros."""
    return jax.device_put(np.zeros(shape, np.float32))


def ones(shape: int | tuple[int, ...]) -> Array:
    """Ones."""
    return jax.device_put(np.ones(shape, np.float32))


def biases(key: Key[Array, ""], shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Zeros, as an initialiser of Flax's own layers."""
    del key
    return zeros(shape).astype(dtype)


def _within_fan_in(rng, shape):
    bound = math.prod(shape[:-1]) ** -0.5
    return rng.uniform(-bound, bound, shape)


# Deviation: the authors truncate at +-2, that is at 100 standard deviations.
weights = normal(0.02)
# What PyTorch gives a convolution that nobody initialises: VMamba's and Swin's.
torch_conv = on_host(_within_fan_in)
