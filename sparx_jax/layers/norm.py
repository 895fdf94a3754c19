"""Normalisation and per-channel affine layers with the constants of torch."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from sparx_jax import ops
from sparx_jax.layers import init
from sparx_jax.typing import Array, Float

# torch's defaults, on which the released weights depend.
EPS = 1e-5
STAGE_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch; Flax counts the other way round


class GroupNorm(nnx.Module):
    """GroupNorm with one group: statistics over rows, columns and channels."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(init.ones(dim))
        self.bias = nnx.Param(init.zeros(dim))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return ops.group_norm(x, self.scale[...], self.bias[...], eps=EPS)


class LayerNorm(nnx.Module):
    """LayerNorm over the channels of each pixel."""

    def __init__(self, dim: int, *, eps: float = EPS):
        self.scale = nnx.Param(init.ones(dim))
        self.bias = nnx.Param(init.zeros(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class BatchNorm(nnx.Module):
    """BatchNorm over batch, rows and columns, as torch's BatchNorm2d.

    Flax's own keeps the biased variance in its running average; torch keeps the
    unbiased one.  Under jit over a mesh the batch is the global one, which equals the
    authors' synchronised BatchNorm.
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(init.ones(dim))
        self.bias = nnx.Param(init.zeros(dim))
        self.mean = nnx.BatchStat(init.zeros(dim))
        self.var = nnx.BatchStat(init.ones(dim))
        self.use_running_average = True  # the name that nnx's train() and eval() set

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            inverse = lax.rsqrt(self.var[...] + EPS) * scale
            channels = self.mean[...], inverse, bias
            mean, inverse, bias = (lax.broadcast_to_rank(c, x.ndim) for c in channels)
            y = (x.astype(jnp.float32) - mean) * inverse + bias
            return y.astype(x.dtype)
        y, mean, var = ops.batch_norm(x, scale, bias, eps=EPS)
        count = x.size // x.shape[-1]
        unbiased = var * (count / max(count - 1, 1))
        for average, new in ((self.mean, mean), (self.var, unbiased)):
            step = BATCH_NORM_MOMENTUM * (new - average[...])
            average.set_value(average[...] + step)
        return y


def make_norm(kind: Literal["group", "layer"], dim: int) -> GroupNorm | LayerNorm:
    """The norm of a family: over the whole map (SparX) or per pixel (the others)."""
    return GroupNorm(dim) if kind == "group" else LayerNorm(dim)


class ChannelAffine(nnx.Module):
    """Scale and bias per channel: the learnable residual path of stages 3 and 4."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(init.ones(dim))
        self.bias = nnx.Param(init.zeros(dim))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale, bias = (
            lax.broadcast_to_rank(p[...].astype(x.dtype), x.ndim)
            for p in (self.scale, self.bias)
        )
        return x * scale + bias
