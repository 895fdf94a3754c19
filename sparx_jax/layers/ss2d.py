"""Two-dimensional selective scan, the token mixer of SparX-Mamba."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparx_jax import ops
from sparx_jax.layers import init
from sparx_jax.layers.conv import DepthwiseConv, pointwise
from sparx_jax.layers.norm import make_norm
from sparx_jax.typing import Array, Float

# Step sizes at initialisation are log-uniform in this range.
DT_MIN, DT_MAX = 1e-3, 1e-1


class SS2D(nnx.Module):
    """Depthwise convolution, SiLU, four selective scans of the map, norm, pointwise.

    The directions are rows, columns, and both backwards; their outputs are summed.
    Takes the map that the block has projected to `input_dim` channels.
    Source: Liu et al., "VMamba", arXiv:2401.10166; Mamba's initialisation.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner_ratio: int,
        state_dim: int,
        scan_method: ops.MapScanMethod,
        conv_size: int = 5,
        conv_init: init.Initializer = init.weights,
        norm: Literal["group", "layer"] = "group",
        bias: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        d, n, k = self.input_dim(dim, inner_ratio), state_dim, 4
        r = math.ceil(dim / 16)
        spread = lambda bound: init.uniform(-bound, bound)  # noqa: E731

        make = dict(bias=bias, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(d, conv_size, kernel_init=conv_init, **make)
        self.x_proj = nnx.Param(spread(d**-0.5)(rngs.params(), (k, d, r + 2 * n)))
        self.dt_proj = nnx.Param(spread(r**-0.5)(rngs.params(), (k, r, d)))
        self.dt_bias = nnx.Param(init.on_host(_step_bias)(rngs.params(), (k, d)))
        log_states = np.log(np.arange(1, n + 1, dtype=np.float32))
        self.a_log = nnx.Param(jax.device_put(np.tile(log_states, (k, d, 1))))
        self.skip = nnx.Param(init.ones((k, d)))
        self.norm = make_norm(norm, d)
        self.out_proj = pointwise(d, dim, **make)
        self.scan_method = scan_method

    @classmethod  # nnx.tabulate would leave a static method broken
    def input_dim(cls, dim: int, inner_ratio: int) -> int:
        """Channels of the projected map."""
        return inner_ratio * dim

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        return self.out_proj(self.norm(self.scan(jax.nn.silu(self.conv(x)))))

    def scan(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The sum of the four directional scans."""
        return ops.ss2d(
            x,
            self.x_proj[...],
            self.dt_proj[...],
            self.dt_bias[...],
            -jnp.exp(self.a_log[...]),
            self.skip[...],
            method=self.scan_method,
        )


def _step_bias(rng, shape):
    """What softplus turns into the step sizes."""
    dt = np.exp(rng.uniform(math.log(DT_MIN), math.log(DT_MAX), shape))
    return np.log(np.expm1(dt))
