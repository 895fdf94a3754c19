"""How a ganglion layer reads earlier ones: the paper's aggregator, and simpler ones.

All take the layer's own normalised map and the concatenation of the maps that it reads,
and replace the input projection of the mixer.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv, GroupedPointwise, pointwise
from sparx_jax.layers.norm import BatchNorm, GroupNorm
from sparx_jax.ops import gelu
from sparx_jax.typing import Array, Float

Fusion = Literal["dmca", "dmca_spatial", "dmca_no_attention", "concat", "sum"]


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
            x = gelu(self.conv_norm(self.conv(x)))
        return self.proj_norm(self.proj(x))


def make_fusion(
    kind: Fusion,
    dim: int,
    context_dim: int,
    out_dim: int,
    *,
    reduction: int,
    groups: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """The module that fuses a map of `dim` channels with `context_dim` of others.

    dmca               the paper's: channel attention
    dmca_spatial       the same with attention between pixels, keys and values reduced
    dmca_no_attention  the same without attention, query and key
    concat             pointwise projection of the map beside the normalised context
    sum                pointwise projection of the map plus the normalised sum
    """
    make = dict(dtype=dtype, rngs=rngs)
    if kind == "concat":
        return ConcatFusion(dim, context_dim, out_dim, **make)
    if kind == "sum":
        return SumFusion(dim, out_dim, **make)
    attention = dict(dmca="channel", dmca_spatial="spatial", dmca_no_attention="none")
    make |= dict(attention=attention[kind], reduction=reduction, groups=groups)
    return Aggregator(dim, context_dim, out_dim, **make)


class ConcatFusion(nnx.Module):
    """What DenseNet does: concatenation and a pointwise projection."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        out_dim: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.context_norm = GroupNorm(context_dim)
        self.fuse = pointwise(dim + context_dim, out_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b h w mc"]
    ) -> Float[Array, "b h w d"]:
        return self.fuse(jnp.concatenate([x, self.context_norm(context)], -1))


class SumFusion(nnx.Module):
    """What residual networks do: addition, then a pointwise projection."""

    def __init__(self, dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.context_norm = GroupNorm(dim)
        self.fuse = pointwise(dim, out_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b h w mc"]
    ) -> Float[Array, "b h w d"]:
        total = context.reshape(*x.shape[:-1], -1, x.shape[-1]).sum(-2)
        return self.fuse(x + self.context_norm(total))


class Aggregator(nnx.Module):
    """Dynamic multi-layer channel aggregator (DMCA), with a choice of `attention`.

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
        attention: Literal["channel", "spatial", "none"] = "channel",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        # Current map, attended map, context value: also the groups of the projection.
        parts = 2 if attention == "none" else 3
        self.context_norm = GroupNorm(context_dim)
        self.context_conv = DepthwiseConv(context_dim, 3, bias=False, **make)
        self.context_conv_norm = BatchNorm(context_dim)
        self.context_proj = pointwise(context_dim, (parts - 1) * dim, **make)
        if attention != "none":
            query_reduction = reduction if attention == "channel" else 1
            self.query = Reduction(dim, query_reduction, **make)
            self.key = Reduction(dim, reduction, **make)
        self.value = Reduction(dim, 1, **make)
        if attention == "spatial":
            self.attended_value = Reduction(dim, reduction, **make)
        self.fuse_conv = DepthwiseConv(parts * dim, 3, **make)
        fused_dim = out_dim // parts * parts
        self.fuse_proj = GroupedPointwise(parts, parts * dim, fused_dim, **make)
        self.groups = groups
        self.attention = attention
        self.missing = out_dim - fused_dim

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b h w mc"]
    ) -> Float[Array, "b h w d"]:
        context = self.context_conv_norm(self.context_conv(self.context_norm(context)))
        context = self.context_proj(gelu(context))
        fused = _shuffle(*self._maps(x, gelu(context)))
        fused = self.fuse_proj(gelu(self.fuse_conv(fused)))
        return _widen(fused, self.missing)

    def _maps(self, x, context):
        if self.attention == "none":
            return x, self.value(context)
        key, raw = jnp.split(context, 2, -1)
        query, key, value = self.query(x), self.key(key), self.value(raw)
        if self.attention == "channel":
            attended = channel_attention(query, key, value, self.groups)
        else:
            values = self.attended_value(raw)
            attended = spatial_attention(query, key, values, self.groups)
        if key.shape == x.shape:  # nothing was reduced: the query is the finer map
            x = query
        return x, attended, value


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


def spatial_attention(
    query: Float[Array, "b h w c"],
    key: Float[Array, "b h2 w2 c"],
    value: Float[Array, "b h2 w2 c"],
    heads: int,
) -> Float[Array, "b h w c"]:
    """Attention of every pixel to those of the reduced maps, in float32."""
    shape = query.shape
    query, key, value = (
        t.reshape(t.shape[0], -1, heads, t.shape[-1] // heads)
        for t in (query, key, value)
    )
    return jax.nn.dot_product_attention(query, key, value).reshape(shape)


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
