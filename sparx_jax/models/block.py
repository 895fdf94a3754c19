"""One layer of a backbone: position, token mixing with or without context, MLP."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv
from sparx_jax.layers.mlp import Mlp
from sparx_jax.layers.norm import ChannelAffine, make_norm
from sparx_jax.layers.stochastic import DropPath
from sparx_jax.typing import Array, Float


class Block(nnx.Module):
    """`project` feeds `mixer`; in a ganglion layer it also reads the context.

    The mixer knows nothing of the connector and the connector nothing of the mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        project: nnx.Module,
        mixer: nnx.Module,
        mlp_dim: int,
        drop_path: float,
        scaled_residual: bool,
        norm: Literal["group", "layer"] = "group",
        position_conv: bool = True,
        mlp_conv: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.position = (
            DepthwiseConv(dim, 3, residual=True, **make) if position_conv else None
        )
        self.mixer_norm = make_norm(norm, dim)
        self.project = project
        self.mixer = mixer
        self.mlp_norm = make_norm(norm, dim)
        self.mlp = Mlp(dim, mlp_dim, conv=mlp_conv, **make)
        self.mixer_residual = ChannelAffine(dim) if scaled_residual else None
        self.mlp_residual = ChannelAffine(dim) if scaled_residual else None
        self.drop_path = DropPath(drop_path)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: tuple[Float[Array, "b h w c"], ...] = (),
        draws: Float[Array, "2 b"] | tuple[None, None] = (None, None),
    ) -> Float[Array, "b h w c"]:
        """`draws` decide the drop path of the two residual branches."""
        if self.position is not None:
            x = self.position(x)
        h = self.mixer_norm(x)
        if context:
            h = self.project(h, jnp.concatenate(context, -1))
        else:
            h = self.project(h)
        x = _residual(x, self.mixer_residual) + self.drop_path(self.mixer(h), draws[0])
        h = self.mlp(self.mlp_norm(x))
        return _residual(x, self.mlp_residual) + self.drop_path(h, draws[1])


def _residual(x, scale: Callable | None):
    return x if scale is None else scale(x)
