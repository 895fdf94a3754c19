"""Stem and downsampling of patches, as Swin's, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.patch import Downsample, PatchMerging, PatchStem, Stem

# float32 against float64: sums of at most 48 products of about unit size.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def make():
    return dict(dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def value(variable):
    return np.asarray(variable[...], np.float64)


def layer_norm(x, norm):
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return x * value(norm.scale) + value(norm.bias)


def patches(x, side):
    """(rows, columns, pictures, side, side, channels), zeros beyond the map."""
    b, *size, c = x.shape
    rows, columns = (-(-n // side) for n in size)
    y = np.zeros((rows, columns, b, side, side, c))
    for picture, i, j in np.ndindex(b, *size):
        y[i // side, j // side, picture, i % side, j % side] = x[picture, i, j]
    return y


@pytest.mark.parametrize("size", [(8, 12), (5, 11)])
def test_stem_projects_and_normalises_patches_of_4_by_4(compiled, randomised, size):
    layer, images = randomised(PatchStem(3, 6, **make())), draw(2, *size, 3)
    cut = patches(images, 4)
    expected = np.zeros((2, *cut.shape[:2], 6))
    for i, j, picture in np.ndindex(*cut.shape[:3]):
        y = np.einsum("ijc,ijce->e", cut[i, j, picture], value(layer.proj.kernel))
        y = layer_norm(y + value(layer.proj.bias), layer.norm)
        expected[picture, i, j] = y
    np.testing.assert_allclose(compiled(layer, images), expected, **TOLERANCE)


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1)])
def test_merging_normalises_and_projects_four_pixels(compiled, randomised, size):
    """Upper left, lower left, upper right, lower right; odd maps end in zeros."""
    layer, x = randomised(PatchMerging(3, 5, **make())), draw(2, *size, 3)
    cut = patches(x, 2)
    expected = np.zeros((2, *cut.shape[:2], 5))
    for i, j, picture in np.ndindex(*cut.shape[:3]):
        four = cut[i, j, picture]
        y = np.concatenate([four[0, 0], four[1, 0], four[0, 1], four[1, 1]])
        y = layer_norm(y, layer.norm) @ value(layer.proj.kernel)
        expected[picture, i, j] = y
    np.testing.assert_allclose(compiled(layer, x), expected, **TOLERANCE)
    assert layer.proj.bias is None


@pytest.mark.parametrize(
    "conv",
    [
        lambda **kw: PatchStem(3, 64, **kw).proj,
        lambda **kw: Stem(3, 64, num_convs=2, norm="layer", **kw).convs[1],
        lambda **kw: Downsample(32, 64, norm="layer", **kw).conv,
    ],
)
def test_convolutions_of_others_start_uniform_over_their_fan_in(conv):
    """As torch leaves them, with biases of zero; SparX's have deviation 0.02."""
    conv = conv(**make())
    kernel = value(conv.kernel)
    bound = np.prod(kernel.shape[:-1]) ** -0.5
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() * np.sqrt(3) / bound - 1) < 0.05
    np.testing.assert_array_equal(conv.bias[...], np.zeros(64))
