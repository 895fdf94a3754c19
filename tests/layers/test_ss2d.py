"""The four directions of the two-dimensional scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.ss2d import SS2D

# float32 against float64, values of about unit size, 15 tokens.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)

DIRECTIONS = "x_proj dt_proj dt_bias a_log skip".split()
HEIGHT, WIDTH = 3, 5

# Symmetries of the grid: how they move the map, and which direction of the moved map
# each direction (rows, columns, rows backwards, columns backwards) has become.
SYMMETRIES = {
    "transposed": (lambda x: x.swapaxes(1, 2), (1, 0, 3, 2)),
    "rotated": (lambda x: x[:, ::-1, ::-1], (2, 3, 0, 1)),
    "both": (lambda x: x.swapaxes(1, 2)[:, ::-1, ::-1], (3, 2, 1, 0)),
}


@pytest.fixture(scope="module")
def layer(randomised):
    return randomised(mixer())


def mixer(dtype="float32", **family):
    return SS2D(
        16,
        inner_ratio=2,
        state_dim=3,
        scan_method="auto",
        **family,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
    )


@pytest.fixture(scope="module")
def features():
    shape = (2, HEIGHT, WIDTH, 32)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def scan(layer, x, order=(0, 1, 2, 3)):
    """`layer.scan` with the parameters of direction i taken from order[i]."""
    graphdef, state = nnx.split(layer)
    return reordered_scan(graphdef, state, x, np.array(order))


@partial(jax.jit, static_argnums=0)
def reordered_scan(graphdef, state, x, order):
    layer = nnx.merge(graphdef, state)
    for name in DIRECTIONS:
        variable = getattr(layer, name)
        variable.set_value(variable[order])
    return layer.scan(x)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_moving_the_map_permutes_the_directions(layer, features, symmetry):
    move, order = SYMMETRIES[symmetry]
    expected = move(scan(layer, features))
    np.testing.assert_allclose(
        scan(layer, move(features), order), expected, **TOLERANCE
    )
    # The directions have weights of their own, so the map cannot move for nothing.
    assert np.abs(scan(layer, move(features)) - expected).max() > 0.01


def walks():
    """Pixels in the order of each direction."""
    rows = [(i, j) for i in range(HEIGHT) for j in range(WIDTH)]
    columns = [(i, j) for j in range(WIDTH) for i in range(HEIGHT)]
    return rows, columns, rows[::-1], columns[::-1]


def naive_scan(layer, x):
    """Walks the map pixel by pixel, in float64, once a direction."""
    p = {name: np.asarray(getattr(layer, name)[...], float) for name in DIRECTIONS}
    r, n = p["dt_proj"].shape[1], p["a_log"].shape[-1]
    y = np.zeros(x.shape)
    for k, walk in enumerate(walks()):
        h = np.zeros((len(x), x.shape[-1], n))
        for i, j in walk:
            x_t = x[:, i, j].astype(np.float64)
            dt, b, c = np.split(x_t @ p["x_proj"][k], (r, r + n), -1)
            delta = np.logaddexp(0, dt @ p["dt_proj"][k] + p["dt_bias"][k])[..., None]
            drive = delta * x_t[..., None] * b[:, None]
            h = np.exp(-delta * np.exp(p["a_log"][k])) * h + drive
            y[:, i, j] += (h * c[:, None]).sum(-1) + p["skip"][k] * x_t
    return y


def test_scan_equals_four_walks_over_the_map(layer, features):
    np.testing.assert_allclose(
        scan(layer, features), naive_scan(layer, features), **TOLERANCE
    )


@pytest.mark.parametrize(
    "family, axes",
    [
        (dict(), (1, 2, 3)),  # SparX: the norm is over the whole map
        (dict(norm="layer", conv_size=3, bias=False), 3),  # VMamba
    ],
)
def test_mixer_is_convolution_silu_scan_norm_projection(
    compiled, randomised, features, family, axes
):
    """No gate and no second branch."""
    layer = randomised(mixer(**family))

    def parts(layer, x):
        y = layer.conv(x)
        return layer.scan(y * jax.nn.sigmoid(y)), layer(x)

    y, got = compiled(layer, features, function=parts)
    y = np.asarray(y, np.float64)
    y = y - y.mean(axes, keepdims=True)
    y = y / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
    y = y * np.asarray(layer.norm.scale[...]) + np.asarray(layer.norm.bias[...])
    y = y @ np.asarray(layer.out_proj.kernel[...])
    if family.get("bias", True):
        y = y + np.asarray(layer.out_proj.bias[...])
    np.testing.assert_allclose(got, y, **TOLERANCE)
    biases = (layer.conv.bias, layer.out_proj.bias)
    assert [bias is None for bias in biases] == [not family.get("bias", True)] * 2
    assert len(layer.conv.kernel) == family.get("conv_size", 5)


def test_one_pixel_is_its_own_past_in_all_directions(layer):
    x = np.random.default_rng(2).standard_normal((2, 1, 1, 32)).astype(np.float32)
    transposed = scan(layer, x, (1, 0, 3, 2))
    np.testing.assert_allclose(scan(layer, x), transposed, **TOLERANCE)


def test_bfloat16_stays_close(compiled, layer, features):
    """8 bits of storage, float32 inside: 2 % of the largest value."""
    low = mixer("bfloat16")
    nnx.update(low, nnx.state(layer))
    x = jnp.asarray(features)
    expected = compiled(layer, x)
    got = compiled(low, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
