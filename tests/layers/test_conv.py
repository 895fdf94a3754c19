"""Convolutions, the stem and the feed-forward network against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.conv import DepthwiseConv, GroupedPointwise, pointwise
from sparx_jax.layers.mlp import Mlp
from sparx_jax.layers.patch import Downsample, Stem, conv3x3

# float32 against float64: sums of at most 100 products of about unit size.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def make():
    return dict(dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def value(variable):
    return np.asarray(variable[...], np.float64)


def convolve(x, kernel, stride):
    """3 x 3, one pixel of zeros on every side."""
    x = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (-(-(n - 2) // stride) for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j, row, column in np.ndindex(3, 3, rows, columns):
        y[:, row, column] += x[:, row * stride + i, column * stride + j] @ kernel[i, j]
    return y


def depthwise(x, conv):
    kernel = value(conv.kernel)
    full = np.einsum("ijc,ce->ijce", kernel, np.eye(kernel.shape[-1]))
    return convolve(x, full, 1) + (0 if conv.bias is None else value(conv.bias))


def batch_norm(x, norm):
    x = (x - value(norm.mean)) / np.sqrt(value(norm.var) + 1e-5)
    return x * value(norm.scale) + value(norm.bias)


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * value(norm.scale) + value(norm.bias)


# SparX's convolutions have no bias before BatchNorm; VMamba's have one and LayerNorm.
NORMS = {"batch": batch_norm, "layer": layer_norm}


def conv_norm(x, conv, norm, kind, stride):
    assert (conv.bias is None) == (kind == "batch")
    y = convolve(x, value(conv.kernel), stride)
    return NORMS[kind](y if conv.bias is None else y + value(conv.bias), norm)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3x3_pads_every_side_by_one(randomised, stride, size):
    """XLA's "SAME" would pad even maps on the far sides only."""
    conv = randomised(conv3x3(3, 4, stride=stride, norm="batch", **make()))
    x = draw(2, *size, 3)
    expected = convolve(x, value(conv.kernel), stride)
    np.testing.assert_allclose(conv(x), expected, **TOLERANCE)


def test_pointwise_is_a_matrix_product(randomised):
    layer, x = randomised(pointwise(6, 9, **make())), draw(2, 3, 4, 6)
    expected = x @ value(layer.kernel) + value(layer.bias)
    np.testing.assert_allclose(layer(x), expected, **TOLERANCE)


def test_grouped_pointwise_is_a_block_diagonal_matrix(compiled, randomised):
    layer, x = randomised(GroupedPointwise(3, 6, 12, **make())), draw(2, 3, 4, 6)
    matrix = np.zeros((6, 12))
    for g, block in enumerate(value(layer.kernel)):
        matrix[2 * g : 2 * g + 2, 4 * g : 4 * g + 4] = block
    expected = x @ matrix + value(layer.bias)
    np.testing.assert_allclose(compiled(layer, x), expected, **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_filters_each_channel(compiled, randomised, bias):
    layer = randomised(DepthwiseConv(4, 3, bias=bias, **make()))
    x = draw(2, 5, 3, 4)
    np.testing.assert_allclose(compiled(layer, x), depthwise(x, layer), **TOLERANCE)


@pytest.mark.parametrize("conv", [True, False])
def test_mlp_adds_its_depthwise_convolution_before_an_exact_gelu(
    compiled, randomised, conv
):
    layer, x = randomised(Mlp(4, 6, conv=conv, **make())), draw(2, 5, 3, 4)
    h = x @ value(layer.expand.kernel) + value(layer.expand.bias)
    h = gelu(h + depthwise(h, layer.conv) if conv else h)
    expected = h @ value(layer.reduce.kernel) + value(layer.reduce.bias)
    np.testing.assert_allclose(compiled(layer, x), expected, **TOLERANCE)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_convs, strides", [(2, (2, 2)), (3, (2, 1, 2))])
def test_stem_alternates_convolution_norm_and_gelu(
    compiled, randomised, num_convs, strides, norm
):
    layer = randomised(Stem(3, 8, num_convs=num_convs, norm=norm, **make()))
    images = draw(2, 10, 7, 3)
    x = images
    for i, stride in enumerate(strides):
        x = gelu(x) if i else x  # none after the last norm
        x = conv_norm(x, layer.convs[i], layer.norms[i], norm, stride)
    assert x.shape == (2, 3, 2, 8)
    np.testing.assert_allclose(compiled(layer, images), x, **TOLERANCE)


@pytest.mark.parametrize("norm", NORMS)
def test_downsample_has_no_activation(compiled, randomised, norm):
    layer, x = randomised(Downsample(4, 6, norm=norm, **make())), draw(2, 5, 4, 4)
    expected = conv_norm(x, layer.conv, layer.norm, norm, 2)
    np.testing.assert_allclose(compiled(layer, x), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "layer",
    [
        lambda **kw: GroupedPointwise(3, 6, 12, **kw),
        lambda **kw: DepthwiseConv(6, 3, **kw),
        lambda **kw: Mlp(6, 12, conv=True, **kw),
    ],
)
def test_compute_dtype_is_bfloat16_and_parameters_stay_float32(compiled, layer):
    layer = layer(dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 2, 2, 6), jnp.bfloat16)
    assert compiled(layer, x).dtype == jnp.bfloat16
    assert {str(v.dtype) for v in jax.tree.leaves(nnx.state(layer))} == {"float32"}
