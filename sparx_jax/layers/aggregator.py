"""Dynamic multi-layer channel aggregator (DMCA): how a ganglion layer reads others."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv, GroupedPointwise, pointwise
from sparx_jax.layers.norm import BatchNorm, GroupNorm
from sparx_jax.typing import Array, Float

FUSED = 3  # current map, attended map, context value: also the groups of the projection


class Reduction(nnx.Module):
    """Query or key: optional spatial reduction, then a normalised projection."""

    def __init__(self, dim: int, factor: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shrink = dict(stride=factor, bias=False, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(dim, factor + 1, **shrink) if factor > 1 else None
        self.conv_norm = BatchNorm(dim) if factor > 1 else None
        self.proj = pointwise(dim, dim, bias=False, dtype=dtype, rngs=rngs)
        self.proj_norm = BatchNorm(dim)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.conv is not None:
            x = jax.nn.gelu(self.conv_norm(self.conv(x)), approximate=False)
        return self.proj_norm(self.proj(x))


class Aggregator(nnx.Module):
    """Fuses a map with the concatenated outputs of earlier layers.

    The result replaces the mixer's input projection: `out_dim` channels.
    Source: Lou, Fu and Yu, arXiv:2409.09649, section 3.2, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        out_dim: int,
        *,
        reduction: int,
        groups: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.context_norm = GroupNorm(context_dim)
        self.context_conv = DepthwiseConv(context_dim, 3, bias=False, **make)
        self.context_conv_norm = BatchNorm(context_dim)
        self.context_proj = pointwise(context_dim, 2 * dim, **make)
        self.query = Reduction(dim, reduction, **make)
        self.key = Reduction(dim, reduction, **make)
        self.value = Reduction(dim, 1, **make)
        self.fuse_conv = DepthwiseConv(FUSED * dim, 3, **make)
        fused_dim = out_dim // FUSED * FUSED
        self.fuse_proj = GroupedPointwise(FUSED, FUSED * dim, fused_dim, **make)
        self.groups = groups
        self.missing = out_dim - fused_dim

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b h w mc"]
    ) -> Float[Array, "b h w d"]:
        context = self.context_conv_norm(self.context_conv(self.context_norm(context)))
        context = self.context_proj(jax.nn.gelu(context, approximate=False))
        key, value = jnp.split(jax.nn.gelu(context, approximate=False), 2, -1)
        query, key, value = self.query(x), self.key(key), self.value(value)
        attended = channel_attention(query, key, value, self.groups)
        if query.shape == x.shape:  # nothing was reduced: the query is the finer map
            x = query
        fused = _shuffle(x, attended, value)
        fused = self.fuse_proj(jax.nn.gelu(self.fuse_conv(fused), approximate=False))
        return _widen(fused, self.missing)


def channel_attention(
    query: Float[Array, "b h2 w2 c"],
    key: Float[Array, "b h2 w2 c"],
    value: Float[Array, "b h w c"],
    groups: int,
) -> Float[Array, "b h w c"]:
    """Attention between the channels of each group, over all pixels, in float32."""
    shape = value.shape
    query, key, value = (
        t.reshape(t.shape[0], -1, groups, t.shape[-1] // groups)
        for t in (query, key, value)
    )
    scores = jnp.einsum(
        "btgc,btge->bgce", query, key, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores * query.shape[1] ** -0.5, -1).astype(value.dtype)
    return jnp.einsum("bgce,btge->btgc", weights, value).reshape(shape)


def _shuffle(*maps):
    """Concatenates m maps and deals their channels out: channel g*c+i <- m*i+g.

    Each of the m groups that follow sees every map.
    """
    z = jnp.concatenate(maps, -1)
    dealt = z.reshape(*z.shape[:-1], -1, len(maps)).swapaxes(-1, -2)
    return dealt.reshape(z.shape)


def _widen(x, missing):
    """Appends means of equal parts of the channels: none, all of them, or two halves.

    The groups of the projection need a multiple of three channels; the mixer may not.
    Parts overlap by one channel where the width is odd, as torch's adaptive pooling.
    """
    if missing == 0:
        return x
    dim = x.shape[-1]
    bounds = [
        (i * dim // missing, -(-(i + 1) * dim // missing)) for i in range(missing)
    ]
    means = [x[..., low:high].mean(-1, keepdims=True) for low, high in bounds]
    return jnp.concatenate([x, *means], -1)
