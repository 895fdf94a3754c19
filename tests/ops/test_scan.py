"""Laws of the selective scan; `sequential` is the oracle of the other method."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparx_jax.ops import scan, selective_scan

# Largest difference over the largest magnitude of the oracle's array.  float32: the
# methods multiply the same decays in another order, over at most 97 tokens.  bfloat16:
# arithmetic is float32, so what remains is rounding the result (2^-8) and adding the
# directions' rounded gradients of `x`.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}
# Central differences of a float64 loop against float32 gradients.
DERIVATIVE_TOLERANCE = 1e-5

METHODS = ("sequential", "associative")
NAMES = "x dt a b c d".split()
BATCH, DIM = 2, 3

# Length, states, reverse, storage.
CASES = [
    (1, 1, (False,), "float32"),
    (1, 3, (True, False), "bfloat16"),
    (31, 1, (True,), "float32"),
    (32, 3, (False, True), "float32"),
    (33, 1, (False, True), "float32"),
    (33, 16, (False,), "bfloat16"),
    (65, 1, (False, True), "bfloat16"),
    (65, 16, (True, False, True), "float32"),
]


def operands(length, states=1, directions=1, dtype="float32", seed=0):
    """Random operands; step sizes between 1e-3 and 3, decays from 0 to 1."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    k, b, n, d = directions, BATCH, states, DIM
    stored = dict(
        x=draw(b, length, d),
        dt=3 * draw(k, b, length, d) - 2,
        b=draw(k, b, length, n),
        c=draw(k, b, length, n),
    )
    stored = {name: jnp.asarray(v, dtype) for name, v in stored.items()}
    a = jnp.asarray(-np.exp(draw(k, d, n)))
    skip = jnp.asarray(draw(k, d))
    return tuple({**stored, "a": a, "d": skip}[name] for name in NAMES)


@cache
def value_and_grads(method, reverse):
    """Compiled (operands, cotangent) -> (value, gradient of each operand)."""

    @jax.jit
    def run(args, cotangent):
        y, vjp = jax.vjp(partial(selective_scan, reverse=reverse, method=method), *args)
        return y, vjp(cotangent.astype(y.dtype))

    return run


def loop64(x, dt, a, b, c, d, *, reverse=(False,)):
    """The docstring of the module, one scalar at a time, in float64."""
    x, dt, a, b, c, d = (np.asarray(t, np.float64) for t in (x, dt, a, b, c, d))
    y = np.zeros_like(x)
    for k, backwards in enumerate(reverse):
        for i, channel in np.ndindex(x.shape[0], x.shape[2]):
            h = np.zeros(a.shape[-1])
            tokens = range(x.shape[1])
            for t in reversed(tokens) if backwards else tokens:
                delta = np.logaddexp(0, dt[k, i, t, channel])
                x_t = x[i, t, channel]
                h = np.exp(delta * a[k, channel]) * h + delta * x_t * b[k, i, t]
                y[i, t, channel] += c[k, i, t] @ h + d[k, channel] * x_t
    return y


def assert_close(actual, expected, tolerance, what=""):
    actual, expected = (np.asarray(t, np.float64) for t in (actual, expected))
    assert actual.shape == expected.shape
    scale = np.abs(expected).max() + 1e-30
    error = np.abs(actual - expected).max() / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("length, states, reverse, dtype", CASES)
def test_sequential_equals_a_float64_loop(length, states, reverse, dtype):
    args = operands(length, states, len(reverse), dtype)
    y, _ = value_and_grads("sequential", reverse)(args, jnp.zeros_like(args[0]))
    assert y.dtype == dtype
    assert_close(y, loop64(*args, reverse=reverse), TOLERANCE[dtype])


@pytest.mark.parametrize("length, states, reverse, dtype", CASES)
def test_methods_agree_in_value_and_gradient(length, states, reverse, dtype):
    args = operands(length, states, len(reverse), dtype)
    cotangent = operands(length, seed=1)[0]
    y, grads = value_and_grads("associative", reverse)(args, cotangent)
    oracle, oracle_grads = value_and_grads("sequential", reverse)(args, cotangent)
    assert y.dtype == dtype
    assert_close(y, oracle, TOLERANCE[dtype], "y")
    for name, arg, grad, expected in zip(NAMES, args, grads, oracle_grads, strict=True):
        assert grad.dtype == arg.dtype
        assert_close(grad, expected, TOLERANCE[dtype], f"gradient of {name}")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_derivatives_of_the_float64_loop(method):
    reverse = (True, False, True)
    args = operands(65, 16, len(reverse))
    cotangent = np.asarray(operands(65, seed=1)[0], np.float64)
    _, grads = value_and_grads(method, reverse)(args, jnp.float32(cotangent))
    rng = np.random.default_rng(2)
    for index, name in enumerate(NAMES):
        direction = rng.standard_normal(args[index].shape)

        def along(step, index=index, direction=direction):
            moved = [np.asarray(t, np.float64) for t in args]
            moved[index] = moved[index] + step * direction
            return (loop64(*moved, reverse=reverse) * cotangent).sum()

        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        grad = np.asarray(grads[index], np.float64)
        # In units of the sum's natural size, lest the terms cancel by chance.
        scale = np.linalg.norm(grad) * np.sqrt(direction.size)
        error = abs((grad * direction).sum() - difference) / scale
        assert error < DERIVATIVE_TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_scan_is_causal(method, backwards):
    """An output's gradient is zero at all later tokens, and not at earlier ones."""
    args = operands(65)
    run = value_and_grads(method, (backwards,))
    token = 33
    cotangent = jnp.zeros_like(args[0]).at[:, token].set(1.0)
    _, (x, dt, _, b, c, _) = run(args, cotangent)
    for name, grad in dict(x=x, dt=dt[0], b=b[0], c=c[0]).items():
        per_token = np.abs(grad).max((0, 2))
        later = per_token[:token] if backwards else per_token[token + 1 :]
        neighbour = per_token[token + 1 if backwards else token - 1]
        assert not later.any(), f"{name} of a later token matters"
        assert per_token[token] > 0
        # c only reads out its own token; all else reaches forward through the state.
        assert (neighbour > 0) == (name != "c")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_impulse_decays_geometrically_along_the_tokens(method, backwards):
    """With constant steps, y_t = c b delta exp(delta a)^t: a closed form."""
    length, delta, a = 65, 0.02, -1.5
    first, last = (length - 1, 0) if backwards else (0, length - 1)
    like = operands(length)
    x = jnp.zeros_like(like[0]).at[:, first].set(1.0)
    constants = np.log(np.expm1(delta)), a, 2.0, 3.0, 0.0
    args = x, *map(jnp.full_like, like[1:], constants)
    y, grads = value_and_grads(method, (backwards,))(
        args, jnp.zeros_like(x).at[:, last].set(1.0)
    )
    response = 2 * 3 * delta * np.exp(delta * a * np.arange(length))
    if backwards:
        response = response[::-1]
    assert_close(y, np.broadcast_to(response[:, None], x.shape), TOLERANCE["float32"])
    # How the last token depends on each one is the same curve, read from its end.
    expected = np.broadcast_to(response[::-1, None], x.shape)
    assert_close(grads[0], expected, TOLERANCE["float32"])


def test_extreme_steps_stay_finite_and_agree():
    """Steps from 0 over 1e-4 to 100: memory without end, and none at all."""
    reverse = (True, False, True)
    x, dt, a, b, c, d = operands(65, 16, 3)
    extremes = np.array([-120.0, np.log(np.expm1(1e-4)), 0.0, 12.0, 100.0])
    picks = np.random.default_rng(3).integers(len(extremes), size=dt.shape)
    args = x, jnp.asarray(extremes[picks], jnp.float32), a * 10, b, c, d
    y, grads = value_and_grads("associative", reverse)(args, x)
    oracle, oracle_grads = value_and_grads("sequential", reverse)(args, x)
    for name, got, expected in zip(
        ["y", *NAMES], [y, *grads], [oracle, *oracle_grads], strict=True
    ):
        assert np.isfinite(got).all(), name
        assert_close(got, expected, TOLERANCE["float32"], name)
    assert_close(oracle, loop64(*args, reverse=reverse), TOLERANCE["float32"])


def test_step_size_and_slope_are_accurate_at_both_ends():
    z = np.linspace(-12, 20, 100_001, dtype=np.float32)
    got = jax.jit(scan.softplus_and_sigmoid)(z)
    z64 = z.astype(np.float64)
    for actual, expected in zip(
        got, (np.log1p(np.exp(z64)), 1 / (1 + np.exp(-z64))), strict=True
    ):
        assert np.abs(np.asarray(actual) / expected - 1).max() < 3e-7


def test_reverse_has_one_entry_a_direction():
    with pytest.raises(ValueError, match="2 directions, 1 entries"):
        selective_scan(*operands(3, 1, 2), reverse=(True,))


def test_unknown_methods_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="'loop' is none of sequential, associative"):
        selective_scan(*operands(3, 1, 1), method="loop")
