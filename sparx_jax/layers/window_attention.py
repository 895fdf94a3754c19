"""Attention in shifted windows, the token mixer of Swin and SparX-Swin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparx_jax.layers import init
from sparx_jax.layers.conv import pointwise
from sparx_jax.typing import Array, Float

MASKED = -1e9  # a score of which softmax makes 0


class WindowAttention(nnx.Module):
    """Attention among the pixels of each window, with a relative position bias.

    Takes the map that the block has projected to query, key and value, `3 * dim`
    channels.  A window is no larger than the map; if it is smaller and `shifted`, the
    windows are moved by half their size, and pixels that only the roll has brought
    together do not see each other.

    Deviation: maps that the window does not divide are padded before the roll and no
    pixel attends to the padding; timm pads after it and attends to padded zeros.
    Source: Liu et al., "Swin Transformer", arXiv:2103.14030.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int,
        window: int,
        shifted: bool,
        bias: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.heads = dim // head_dim
        self.window = window
        self.shifted = shifted
        span = 2 * window - 1  # offsets of the query from the key, both ways
        bias_table = init.weights(rngs.params(), (span, span, self.heads))
        self.position_bias = nnx.Param(bias_table)
        self.out_proj = pointwise(dim, dim, bias=bias, dtype=dtype, rngs=rngs)

    @classmethod  # nnx.tabulate would leave a static method broken
    def input_dim(cls, dim: int) -> int:
        """Channels of the projected map."""
        return 3 * dim

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        size = x.shape[1:3]
        rows, columns = (_Axis.of(n, self.window, self.shifted) for n in size)
        padding = ((0, rows.padding), (0, columns.padding))
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        x = jnp.roll(x, (-rows.shift, -columns.shift), (1, 2))
        tokens = _to_windows(x, rows, columns)
        tokens = self._attend(tokens, rows, columns)
        x = _from_windows(tokens, rows, columns)
        x = jnp.roll(x, (rows.shift, columns.shift), (1, 2))
        return self.out_proj(x[:, : size[0], : size[1]])

    def _attend(self, tokens, rows, columns):
        b, windows, n, _ = tokens.shape
        shape = b, windows, n, self.heads, -1
        query, key, value = (x.reshape(shape) for x in jnp.split(tokens, 3, -1))
        query = query * query.shape[-1] ** -0.5
        scores = jnp.einsum(
            "bwqhc,bwkhc->bwhqk", query, key, preferred_element_type=jnp.float32
        )
        scores += self._bias(rows, columns)[None, None]
        if rows.has_barrier or columns.has_barrier:
            apart = _are_apart(rows, columns)
            scores = jnp.where(apart[None, :, None], MASKED, scores)
        weights = jax.nn.softmax(scores, -1).astype(value.dtype)
        out = jnp.einsum("bwhqk,bwkhc->bwqhc", weights, value)
        return out.reshape(b, windows, n, -1)

    def _bias(self, rows, columns) -> Float[Array, "heads n n"]:
        """The bias of each pair; a smaller window uses the middle of the table."""
        dy, dx = (_offsets(axis.window) + self.window - 1 for axis in (rows, columns))
        pairs = self.position_bias[...][dy[:, None, :, None], dx[None, :, None, :]]
        n = rows.window * columns.window
        return pairs.reshape(n, n, -1).transpose(2, 0, 1)


class _Axis(NamedTuple):
    """How one axis of the map is cut into windows."""

    size: int
    window: int
    shift: int
    padding: int

    @classmethod
    def of(cls, size, window, shifted):
        window = min(window, size)
        shift = window // 2 if shifted and window < size else 0
        return cls(size, window, shift, -size % window)

    @property
    def windows(self):
        return (self.size + self.padding) // self.window

    @property
    def has_barrier(self):
        return self.shift > 0 or self.padding > 0

    def regions(self):
        """A number for each rolled position: who may see each other; -1: padding."""
        places = (np.arange(self.windows * self.window) + self.shift) % (
            self.windows * self.window
        )
        wrapped = (places < self.shift).astype(int)
        return np.where(places < self.size, wrapped, -1)


def _offsets(window):
    return np.arange(window)[:, None] - np.arange(window)


def _to_windows(x, rows, columns):
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, rows.windows, rows.window, columns.windows, columns.window, c)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows.windows * columns.windows, -1, c)


def _from_windows(tokens, rows, columns):
    b, c = tokens.shape[0], tokens.shape[-1]
    grid = b, rows.windows, columns.windows, rows.window, columns.window, c
    x = tokens.reshape(grid).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows.windows * rows.window, columns.windows * columns.window, c)


def _are_apart(rows, columns):
    """bool (windows, n, n): a query must not see this key; padding sees padding."""
    vertical, horizontal = np.meshgrid(rows.regions(), columns.regions(), indexing="ij")
    padding = (vertical < 0) | (horizontal < 0)
    regions = np.where(padding, -1, 2 * vertical + horizontal)
    (regions,) = _to_windows(regions[None, ..., None], rows, columns)
    query, key = regions.reshape(-1, regions.shape[1], 1), regions.swapaxes(1, 2)
    return jnp.asarray(query != key)
