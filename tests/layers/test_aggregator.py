"""The fusions of ganglion layers, step by step against NumPy."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers import aggregator
from sparx_jax.layers.aggregator import (
    Aggregator,
    Fusion,
    Reduction,
    channel_attention,
    make_fusion,
    spatial_attention,
)

# float32 against float64: values of about unit size, up to ten layers deep.
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention64(query, key, value, groups):
    """Picture by picture and group by group, with C/g x C/g weights."""
    y = np.zeros(value.shape)
    width = value.shape[-1] // groups
    for picture, g in np.ndindex(len(value), groups):
        channels = slice(g * width, (g + 1) * width)
        q, k, v = (
            t[picture, :, :, channels].reshape(-1, width).astype(np.float64)
            for t in (query, key, value)
        )
        scores = q.T @ k / math.sqrt(len(q))
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        y[picture, :, :, channels] = (v @ weights.T).reshape(*value.shape[1:3], width)
    return y


def spatial64(query, key, value, groups):
    """Picture by picture, group by group and pixel by pixel."""
    y = np.zeros(query.shape)
    width = query.shape[-1] // groups
    for picture, row, column, g in np.ndindex(*query.shape[:3], groups):
        channels = slice(g * width, (g + 1) * width)
        q = query[picture, row, column, channels].astype(np.float64)
        k, v = (t[picture, ..., channels].reshape(-1, width) for t in (key, value))
        weights = np.exp(k @ q / math.sqrt(width))
        y[picture, row, column, channels] = weights @ v / weights.sum()
    return y


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("reduced", [(4, 6), (2, 3), (1, 1)])
def test_attention_weighs_the_channels_of_each_group(groups, reduced):
    query, key = draw(2, *reduced, 8, seed=1), draw(2, *reduced, 8, seed=2)
    value = draw(2, 4, 6, 8, seed=3)
    got = channel_attention(*map(jnp.asarray, (query, key, value)), groups)
    expected = attention64(query, key, value, groups)
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_spatial_attention_weighs_the_reduced_pixels():
    query = draw(2, 4, 3, 8, seed=1)
    key, value = draw(2, 2, 2, 8, seed=2), draw(2, 2, 2, 8, seed=3)
    got = spatial_attention(*map(jnp.asarray, (query, key, value)), 4)
    expected = spatial64(query, key, value, 4)
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_attention_survives_large_scores():
    query = 1e3 * np.abs(draw(1, 2, 2, 4))
    got = channel_attention(*[jnp.asarray(query)] * 2, jnp.ones((1, 2, 2, 4)), 1)
    np.testing.assert_allclose(got, np.ones((1, 2, 2, 4)), rtol=1e-6)


@pytest.mark.parametrize("maps", [2, 3])
def test_shuffle_deals_channel_m_i_plus_g_to_place_g_c_plus_i(maps):
    width = 4
    z = np.arange(maps * width, dtype=np.float32).reshape(1, 1, 1, -1)
    shuffled = np.asarray(aggregator._shuffle(*np.split(z, maps, -1))).ravel()
    for g, i in np.ndindex(maps, width):
        assert shuffled[g * width + i] == maps * i + g


@pytest.mark.parametrize("width", [6, 9])
def test_widen_appends_means_of_equal_parts(width):
    x = draw(2, 3, 4, width)
    widen = aggregator._widen
    np.testing.assert_array_equal(widen(jnp.asarray(x), 0), x)
    one, two = (np.asarray(widen(jnp.asarray(x), n)) for n in (1, 2))
    np.testing.assert_array_equal(one[..., :width], x)
    np.testing.assert_array_equal(two[..., :width], x)
    np.testing.assert_allclose(one[..., width], x.mean(-1), **TOLERANCE)
    half = -(-width // 2)  # the halves of an odd width share their middle channel
    np.testing.assert_allclose(two[..., width], x[..., :half].mean(-1), **TOLERANCE)
    np.testing.assert_allclose(
        two[..., width + 1], x[..., -half:].mean(-1), **TOLERANCE
    )


def build(cls, *args, dtype="float32", **kwargs):
    return cls(*args, **kwargs, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def test_reduction_of_factor_1_is_a_normalised_projection(randomised):
    layer, x = randomised(build(Reduction, 8, 1)), draw(2, 4, 6, 8)
    y = x @ np.asarray(layer.proj.kernel[...], np.float64)
    y = (y - np.asarray(layer.proj_norm.mean[...])) / np.sqrt(
        np.asarray(layer.proj_norm.var[...]) + 1e-5
    )
    y = y * np.asarray(layer.proj_norm.scale[...]) + layer.proj_norm.bias[...]
    np.testing.assert_allclose(layer(jnp.asarray(x)), y, **TOLERANCE)


def gelu(x):
    return x * 0.5 * (1 + jax.scipy.special.erf(x / math.sqrt(2)))


def fusion(kind, context_dim, out_dim, reduction=2):
    make = dict(reduction=reduction, groups=4)
    return build(make_fusion, kind, 8, context_dim, out_dim, **make)


def group_norm(x, norm):
    x = np.asarray(x, np.float64)
    x = x - x.mean((1, 2, 3), keepdims=True)
    x = x / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def project(x, layer):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])


def maps_of(layer, x, context):
    """The projections of an aggregator: context conv, query, key and values."""
    h = layer.context_conv_norm(layer.context_conv(layer.context_norm(context)))
    h = gelu(layer.context_proj(gelu(h)))
    raw = h[..., -8:]
    maps = dict(value=layer.value(raw))
    if layer.attention != "none":
        maps |= dict(query=layer.query(x), key=layer.key(h[..., :8]))
    if layer.attention == "spatial":
        maps |= dict(attended=layer.attended_value(raw))
    return maps, layer(x, context)


@pytest.mark.parametrize(
    "kind, reduction, size, out_dim",
    [
        ("dmca", 1, (3, 5), 24),  # stage 4: the query replaces the map
        ("dmca", 2, (5, 3), 16),  # out_dim % 3 == 1: the mean is appended
        ("dmca", 4, (6, 7), 20),  # out_dim % 3 == 2: the means of two halves
        ("dmca", 8, (1, 1), 24),  # nothing left to reduce: the query replaces the map
        ("dmca_spatial", 1, (3, 5), 16),
        ("dmca_spatial", 2, (5, 3), 24),
        ("dmca_no_attention", 2, (5, 3), 17),  # out_dim % 2 == 1: the mean again
    ],
)
def test_aggregator_fuses_as_the_paper_says(
    randomised, compiled, kind, reduction, size, out_dim
):
    layer = randomised(fusion(kind, 24, out_dim, reduction))
    x, context = (jnp.asarray(draw(2, *size, c, seed=c)) for c in (8, 24))
    maps, got = compiled(layer, x, context, function=maps_of)
    value, query, key = (np.asarray(maps.get(n, x)) for n in ("value", "query", "key"))
    full_resolution = reduction == 1 or size == (1, 1)
    fused = [query if full_resolution else x]
    if kind == "dmca":
        fused.append(attention64(query, key, value, 4))
    if kind == "dmca_spatial":
        fused.append(spatial64(query, key, np.asarray(maps["attended"]), 4))
    z = np.concatenate([*fused, value], -1)
    parts = len(fused) + 1
    z = z[..., np.arange(8 * parts).reshape(8, parts).T.ravel()]
    z = jnp.asarray(z, jnp.float32)
    second_half = lambda layer, z: layer.fuse_proj(gelu(layer.fuse_conv(z)))  # noqa: E731
    y = np.asarray(compiled(layer, z, function=second_half))
    if out_dim % parts == 1:
        y = np.concatenate([y, y.mean(-1, keepdims=True)], -1)
    if out_dim % parts == 2:
        halves = np.split(y, 2, -1)
        y = np.concatenate([y, *(t.mean(-1, keepdims=True) for t in halves)], -1)

    assert got.shape == (2, *size, out_dim)
    np.testing.assert_allclose(got, y, **TOLERANCE)


def test_concat_projects_the_map_beside_the_normalised_context(randomised, compiled):
    layer, x = randomised(fusion("concat", 24, 10)), draw(2, 3, 5, 8)
    context = draw(2, 3, 5, 24, seed=1)
    beside = np.concatenate([x, group_norm(context, layer.context_norm)], -1)
    expected = project(beside, layer.fuse)
    np.testing.assert_allclose(compiled(layer, x, context), expected, **TOLERANCE)


def test_sum_projects_the_map_plus_the_normalised_sum(randomised, compiled):
    layer, x = randomised(fusion("sum", 24, 10)), draw(2, 3, 5, 8)
    first, second, third = (draw(2, 3, 5, 8, seed=seed) for seed in (1, 2, 3))
    total = group_norm(first + second + third, layer.context_norm)
    expected = project(x + total, layer.fuse)
    context = np.concatenate([first, second, third], -1)
    np.testing.assert_allclose(compiled(layer, x, context), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", get_args(Fusion))
def test_fusions_read_the_map_and_every_source(randomised, compiled, kind):
    """Pictures 1 to 4 are picture 0 with one map of another picture in it."""
    layer = randomised(fusion(kind, 24, 24, reduction=1))
    maps, others = (np.repeat(draw(4, 1, 2, 2, 8, seed=s), 5, 1) for s in (0, 1))
    for i in range(4):
        maps[i, 1 + i] = others[i, 0]
    same, *changed = compiled(layer, maps[0], np.concatenate(maps[1:], -1))
    # Rounding alone is a thousand times less.
    assert min(np.abs(got - same).max() for got in changed) > 5e-3


def test_bfloat16_stays_close(randomised, compiled):
    """8 bits of storage through ten layers: 4 % of the largest value."""
    args = dict(reduction=2, groups=4)
    layer = randomised(build(Aggregator, 8, 16, 16, **args))
    low = build(Aggregator, 8, 16, 16, dtype="bfloat16", **args)
    nnx.update(low, nnx.state(layer))
    x, context = (jnp.asarray(draw(2, 6, 6, c, seed=c)) for c in (8, 16))
    expected = compiled(layer, x, context)
    x, context = x.astype(jnp.bfloat16), context.astype(jnp.bfloat16)
    got = compiled(low, x, context)
    assert got.dtype == jnp.bfloat16
    assert np.abs(got - expected).max() < 0.04 * np.abs(expected).max()
