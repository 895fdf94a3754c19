"""The selective scan and its directions on bare arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers.ss2d import SS2D
from sparx_jax.ops import selective_scan
from sparx_jax.ops.ss2d import four_scans
from tests.parity import generate
from tests.parity.reference import arrays, distance, facts

DIRECTIONS = 4
OPERANDS = ("u", "delta", "A", "B", "C", "D", "bias")
METHODS = ("sequential", "associative", "loop")


def golden(case):
    prefix = case + "/"
    return {
        key.removeprefix(prefix): array
        for key, array in arrays("unit_scan").items()
        if key.startswith(prefix)
    }


@functools.partial(jax.jit, static_argnums=0)
def scan_and_gradients(method, operands, grad):
    """One direction; operands are b l d, b l d, d n, b l n, b l n, d, d."""

    def scan(u, delta, a, b, c, d, bias):
        if method == "loop":
            return first_of_four(u, delta, a, b, c, d, bias)
        one = delta[None] + bias, a[None], b[None], c[None], d[None]
        return selective_scan(u, *one, method=method)

    y, pull = jax.vjp(scan, *operands)
    return y, pull(grad)


def first_of_four(u, delta, a, b, c, d, bias):
    """The sequences as maps of one row, of which three directions are not read."""
    p = jnp.concatenate([delta, b, c], -1)
    p = jnp.concatenate([p, *[jnp.zeros_like(p)] * 3], -1)[:, None]
    eye = jnp.eye(delta.shape[-1])

    def one(t):
        return jnp.stack([t, *[jnp.zeros_like(t)] * 3])

    weights = one(eye), one(bias), jnp.stack([a] * 4), one(d)
    return four_scans("loop", u[:, None], p, *weights)[:, 0]


def direction(arrays, k):
    """Operand or gradient arrays of direction k in our layout.

    The reference has sequences last and all directions in one axis of channels, each
    with an input of its own, already in the order of its walk.
    """
    channels = len(arrays["D"]) // DIRECTIONS
    mine = slice(k * channels, (k + 1) * channels)
    return {
        name: array[mine]  # d n or d
        if name.removeprefix("d") in ("A", "D", "bias")
        else np.swapaxes(array[:, k] if array.ndim == 4 else array[:, mine], 1, 2)
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["N1", "N16", "extreme"])
def test_scan_and_its_gradients_equal_the_authors_in_float64(case, method, check):
    errors = {}
    for k in range(DIRECTIONS):
        this = direction(golden(case), k)
        operands = [this[name] for name in OPERANDS]
        y, grads = scan_and_gradients(method, operands, this["dout"])
        found = {"y": y} | {"d" + n: g for n, g in zip(OPERANDS, grads, strict=True)}
        for name, array in found.items():
            errors[f"{method} {name} {k}"] = distance(array, this[name])
    limit = "scan extreme" if case == "extreme" else "scan"
    check(f"unit_scan {case}", limit, errors)


@pytest.mark.parametrize("method", METHODS)
def test_long_scan_equals_the_authors(method, check):
    batch, k, d, n, length = facts("unit_scan")["long"]["shape_BKdNL"]
    shapes = {
        "u": (batch, k * d, length),
        "delta": (batch, k * d, length),
        "B": (batch, k, n, length),
        "C": (batch, k, n, length),
        "D": (k * d,),
    }
    values = {n: generate.normal(f"scan/long/{n}", s) for n, s in shapes.items()}
    values["bias"] = generate.tensor("scan/long.dt_projs_bias", (k * d,))
    errors = {}
    for i in range(k):
        this = direction(values | golden("long"), i)
        operands = [this[name] for name in OPERANDS]
        y, _ = scan_and_gradients(method, operands, jnp.zeros_like(this["y"]))
        errors[f"{method} {i}"] = distance(y, this["y"])
    check("unit_scan long", "scan", errors)


def walks():
    """For every direction the pixels in the order of its walk.

    The reference scanned a map that counts its pixels.
    """
    x, sequences = golden("cross")["x"], golden("cross")["xs"]
    first = x[0, 0].ravel()
    np.testing.assert_array_equal(first, np.arange(first.size))
    return sequences[0, :, 0].astype(int)


def test_walks_of_the_reference_explain_its_cross_scan_and_merge():
    cross, merged = golden("cross"), 0
    batch, channels = cross["x"].shape[:2]
    flat = cross["x"].reshape(batch, channels, -1)
    for k, walk in enumerate(walks()):
        np.testing.assert_array_equal(cross["xs"][:, k], flat[..., walk])
        outputs = cross["ys"][:, k].reshape(batch, channels, -1)
        merged = merged + outputs[..., np.argsort(walk)]
    np.testing.assert_allclose(cross["merged"], merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", range(DIRECTIONS))
def test_each_direction_accumulates_along_the_walk_of_the_reference(k, check):
    """Without decay, with unit steps and c = 0 elsewhere, the scan is a running sum."""
    x = np.moveaxis(golden("cross")["x"], 1, -1)
    x = np.concatenate([x, np.ones_like(x[..., :1])], -1)  # the last channel makes b, c
    found = scan2d(accumulator(x.shape[-1], k), x)
    errors = [distance(found, running_sum(x, walk)) for walk in walks()]
    check("unit_scan cross", "scan", {f"direction {k}": errors.pop(k)})
    assert min(errors) > 1, "another walk gives the same sums"


def running_sum(x, walk):
    sums = x.reshape(len(x), -1, x.shape[-1])[:, walk].cumsum(1)
    return sums[:, np.argsort(walk)].reshape(x.shape)


@functools.cache
def ss2d(dim):
    dtype = jnp.dtype("float32")
    make = dict(inner_ratio=1, state_dim=1, scan_method="auto", dtype=dtype)
    return SS2D(dim, **make, rngs=nnx.Rngs(0))


@jax.jit
def scan2d(state, x):
    return nnx.merge(nnx.graphdef(ss2d(x.shape[-1])), state).scan(x)


def accumulator(dim, k):
    """Mixer weights under which direction k sums its inputs and the others are mute."""
    module = nnx.merge(*nnx.split(ss2d(dim)))
    rank = module.dt_proj.shape[1]
    x_proj = np.zeros(module.x_proj.shape, np.float32)
    x_proj[:, -1, rank] = 1  # b
    x_proj[k, -1, rank + 1] = 1  # c
    module.x_proj.set_value(jnp.asarray(x_proj))
    module.dt_bias.set_value(jnp.full(module.dt_bias.shape, np.log(np.e - 1)))
    module.a_log.set_value(jnp.full(module.a_log.shape, -30.0))
    module.skip.set_value(jnp.zeros(module.skip.shape))
    return nnx.state(module)
