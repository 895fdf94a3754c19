"""Attention in shifted windows, pixel by pixel against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.window_attention import WindowAttention

TOLERANCE = {
    # float32 against float64: sums of at most 9 products of about unit size.
    "exact": dict(rtol=1e-5, atol=1e-5),
    # 8 bits of storage through three products, relative to the largest value.
    "bfloat16": 0.02,
}

DIM, HEADS, WINDOW = 8, 2, 3
SIZES = {
    "divisible": (6, 9),
    "not divisible": (4, 5),
    "one window wide": (7, 3),
    "rows fewer than the window": (2, 7),
    "columns fewer than the window": (8, 1),
    "smaller than the window": (2, 1),
}


@pytest.fixture(scope="module", params=[False, True], ids=["unshifted", "shifted"])
def layer(request, randomised):
    return randomised(mixer(request.param))


def mixer(shifted, dtype="float32"):
    return WindowAttention(
        DIM,
        head_dim=DIM // HEADS,
        window=WINDOW,
        shifted=shifted,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
    )


def draw(*size, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, *size, 3 * DIM))
    return x.astype(np.float32)


def window_of(pixel, size, shifted):
    """Windows tile the plane from the shift on, to both sides; nothing is rolled."""
    return tuple(
        (place - (WINDOW // 2 if shifted and n > WINDOW else 0)) // min(WINDOW, n)
        for place, n in zip(pixel, size, strict=True)
    )


def pairs(size, shifted):
    """Every query with the pixels of the map that it sees: padding does not exist."""
    pixels = list(np.ndindex(size))
    home = {pixel: window_of(pixel, size, shifted) for pixel in pixels}
    for query in pixels:
        yield query, [key for key in pixels if home[key] == home[query]]


def offset(query, key):
    """Place in the table of biases, whose middle is the pixel itself."""
    return tuple(q - k + WINDOW - 1 for q, k in zip(query, key, strict=True))


def attention64(layer, x):
    """Before the output projection."""
    table = np.asarray(layer.position_bias[...], np.float64)
    qkv = x.astype(np.float64).reshape(*x.shape[:3], 3, HEADS, -1)
    y = np.zeros((*x.shape[:3], HEADS, DIM // HEADS))
    for query, keys in pairs(x.shape[1:3], layer.shifted):
        q = qkv[:, *query, 0] / np.sqrt(DIM // HEADS)
        k, v = (np.stack([qkv[:, *key, i] for key in keys]) for i in (1, 2))
        bias = np.stack([table[offset(query, key)] for key in keys])
        weights = np.exp((q * k).sum(-1) + bias[:, None])
        weights /= weights.sum(0)
        y[:, *query] = (weights[..., None] * v).sum(0)
    return y.reshape(*x.shape[:3], DIM)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_pixels_attend_to_the_pixels_of_their_window(compiled, layer, size):
    """Neither to padding nor to what the roll has brought from the other side."""
    x, out = draw(*size), layer.out_proj
    expected = attention64(layer, x) @ np.asarray(out.kernel[...], np.float64)
    expected += np.asarray(out.bias[...])
    np.testing.assert_allclose(compiled(layer, x), expected, **TOLERANCE["exact"])


def test_moving_the_map_by_windows_moves_the_output(compiled, randomised):
    layer, x = randomised(mixer(shifted=False)), draw(6, 9)
    move = lambda x: np.roll(x, (WINDOW, 2 * WINDOW), (1, 2))  # noqa: E731
    expected = move(compiled(layer, x))
    got = compiled(layer, move(x))
    np.testing.assert_allclose(got, expected, **TOLERANCE["exact"])


def gradients(layer, x):
    """Of a sum with weights: an equal one would leave no gradient to the softmax."""

    graphdef, state = nnx.split(layer)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    state, x = jax.grad(loss, (0, 1))(state, x)
    return state["position_bias"][...], x


@pytest.mark.parametrize("size", [(4, 5), (2, 7)])
def test_gradient_reaches_the_biases_of_all_pairs_and_no_others(
    compiled, randomised, size
):
    """And is finite, also of the padding, which no pixel sees."""
    layer = randomised(mixer(shifted=True))
    seen = {offset(query, key) for query, keys in pairs(size, True) for key in keys}
    table, x = map(np.asarray, compiled(layer, draw(*size), function=gradients))
    assert set(map(tuple, np.argwhere(table.any(-1)).tolist())) == seen
    assert np.isfinite(table).all() and np.isfinite(x).all()
    assert (x[..., 2 * DIM :] != 0).all()  # every pixel is somebody's value


def test_bfloat16_stays_close(compiled, layer):
    low = mixer(layer.shifted, "bfloat16")
    nnx.update(low, nnx.state(layer))
    x = jnp.asarray(draw(4, 5))
    expected = compiled(layer, x)
    got = compiled(low, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE["bfloat16"]
