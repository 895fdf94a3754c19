"""The four scans of a map on CPUs: a loop over its lines, with a hand-written gradient.

A line is a row or a column.  The scan along the rows and the one backwards go through
the map at once, from its two ends, each with a line at a time: all that a line's tokens
need is made for them together, then a loop over the tokens has only the recurrence.
Step sizes exist for two lines only.  Kept for the gradient: the inputs, and the state
before each line.  Shapes have l lines of t tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparx_jax.ops.scan import softplus_and_sigmoid
from sparx_jax.typing import Array, Float

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class _Way(NamedTuple):
    """Inputs of the scans along rows, or columns, there (0) and back (1), in float32.

    Line l of `back` is the map's last but l, from its end: both ways walk forwards.
    """

    z: Float[Array, "l 2*b*t 2*(r+1)"]
    """Inputs of the step sizes, and 1 for the bias; the other way's columns are 0."""
    b: Float[Array, "l 2 b t n"]
    c: Float[Array, "l 2 b t n"]
    weights: Float[Array, "2*(r+1) d"]
    """`z @ weights` is the step size before softplus, nothing transposed."""
    a: Float[Array, "2 1 1 n d"]


def forward(x, p, dt_proj, dt_bias, a, d):
    """The sum of the scans in the dtype of `x`, and the states before all lines.

    As of `triton_gpu.four_scans`; states are l 2 b n d, for rows and for columns.
    """
    x32 = x.astype(jnp.float32)
    y, states = x32 * d.astype(jnp.float32).sum(0), []
    for axis in (1, 2):
        way = _prepare(p, dt_proj, dt_bias, a, axis=axis)
        y, kept = _walk(x32, y, way, axis)
        states.append(kept)
    return y.astype(x.dtype), tuple(states)


def backward(x, p, dt_proj, dt_bias, a, d, states, grad):
    """Gradients of all operands, in their dtypes."""
    x32, grad32 = x.astype(jnp.float32), grad.astype(jnp.float32)
    grad_x, others = grad32 * d.astype(jnp.float32).sum(0), []
    for axis, kept in zip((1, 2), states, strict=True):
        prepare = partial(_prepare, axis=axis)
        way, unprepare = jax.vjp(prepare, p, dt_proj, dt_bias, a)
        grad_x, grad_way = _walk_back(x32, grad32, grad_x, way, kept, axis)
        others.append(unprepare(grad_way))
    grad_d = jnp.broadcast_to(_sum(grad32 * x32, 3), d.shape)
    grads = grad_x, *jax.tree.map(jnp.add, *others), grad_d
    operands = x, p, dt_proj, dt_bias, a, d
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))


def _prepare(p, dt_proj, dt_bias, a, *, axis):
    batch, height, width, _ = p.shape
    ways = slice(axis - 1, None, 2)  # rows are 0 and 2, columns 1 and 3
    weights = jnp.concatenate([dt_proj[ways], dt_bias[ways][:, None]], 1)
    p = p.astype(jnp.float32).reshape(batch, height, width, 4, -1)[..., ways, :]
    p = p.transpose(axis, 3, 0, 3 - axis, 4)  # l 2 b t e
    p = jnp.stack([p[:, 0], p[::-1, 1, :, ::-1]], 1)
    r, n = dt_proj.shape[1], a.shape[-1]
    z, b, c = jnp.split(p, (r, r + n), -1)
    z = jnp.concatenate([z, jnp.ones_like(z[..., :1])], -1)
    z = z[..., None, :] * jnp.eye(2)[:, None, None, :, None]
    z = z.reshape(len(z), -1, 2 * (r + 1))
    a = jnp.swapaxes(a[ways], 1, 2)[:, None, None]
    weights = weights.reshape(2 * (r + 1), -1)
    return jax.tree.map(lambda t: t.astype(jnp.float32), _Way(z, b, c, weights, a))


def _at(x, index, axis):
    """One of an axis, which is kept."""
    start = [index if i == axis else 0 for i in range(x.ndim)]
    size = [1 if i == axis else side for i, side in enumerate(x.shape)]
    # XLA:CPU writes in place only what is read at the very same indices: no selects.
    return lax.dynamic_slice(x, start, size, allow_negative_indices=False)


def _put(x, part, index, axis):
    """Overwrites what `_at` reads."""
    start = [index if i == axis else 0 for i in range(x.ndim)]
    return lax.dynamic_update_slice(x, part, start, allow_negative_indices=False)


def _lines(x, index, axis):
    """Lines `index` and last but `index`, this one from its end: 2 b t d."""
    one, other = _at(x, index, axis), _at(x, x.shape[axis] - 1 - index, axis)
    lines = jnp.stack([one, jnp.flip(other, 3 - axis)]).squeeze(1 + axis)
    # A copy, or XLA:CPU reads the counter anew for every element that it makes of it.
    return lax.optimization_barrier(lines)


def _add_lines(total, parts, index, axis):
    """`total` with 2 b t d added to the lines that `_lines` reads."""
    one, other = jnp.expand_dims(parts, 1 + axis)
    for part, i in (
        (one, index),
        (jnp.flip(other, 3 - axis), total.shape[axis] - 1 - index),
    ):
        total = _put(total, part + _at(total, i, axis), i, axis)
    return total


def _tokens(x, way, index, axis):
    """What the steps of two lines need, all tokens at once."""
    x = _lines(x, index, axis)
    z, b, c = (_at(t, index, 0)[0] for t in (way.z, way.b, way.c))
    delta, sigmoid = softplus_and_sigmoid(_matmul(z, way.weights).reshape(x.shape))
    b, c = b[..., None], c[..., None]  # 2 b t n 1
    decay = jnp.exp(delta[..., None, :] * way.a)  # 2 b t n d
    drive = (delta * x)[..., None, :] * b
    return x, z, delta, sigmoid, decay, drive, b, c


def _recur(decay, *inputs):
    """h <- decay h + drive, token by token; for each pair: the last h, all before.

    The first pair walks forwards, the second, the gradient's, backwards: neither needs
    the other, and one loop compiles faster than two.  h: 2 b 1 n d.
    """
    length = decay.shape[2]

    def step(s, carry):
        new = []
        for (h, before), (_, drive), t in zip(
            carry, inputs, (s, length - 1 - s), strict=False
        ):
            before = _put(before, h, t, 2)
            new.append((_at(decay, t, 2) * h + _at(drive, t, 2), before))
        return tuple(new)

    start = tuple((h, jnp.zeros_like(drive)) for h, drive in inputs)
    return lax.fori_loop(0, length, step, start)


@partial(jax.jit, static_argnums=3)  # keeps the trace of a shape
def _walk(x, y, way, axis):
    lines, (_, batch, *_), (_, _, _, n, d) = x.shape[axis], way.b[0].shape, way.a.shape

    def line(index, carry):
        h, y, states = carry
        states = _put(states, h[None, :, :, 0], index, 0)
        _, _, _, _, decay, drive, _, c = _tokens(x, way, index, axis)
        ((h, before),) = _recur(decay, (h, drive))
        out = ((decay * before + drive) * c).sum(3)
        return h, _add_lines(y, out, index, axis), states

    h = jnp.zeros((2, batch, 1, n, d), jnp.float32)
    states = jnp.zeros((lines, 2, batch, n, d), jnp.float32)
    _, y, states = lax.fori_loop(0, lines, line, (h, y, states))
    return y, states


# Sums as products: XLA:CPU gives sums to YNNPACK, which took 3 to 9 times as long, half
# of the whole gradient.


def _channel_sum(x):  # ... d -> ...
    return _matmul(x, jnp.ones(x.shape[-1]))


def _sum(x, axes):
    """Over the first `axes` axes."""
    rows = math.prod(x.shape[:axes])
    return _matmul(jnp.ones(rows), x.reshape(rows, -1)).reshape(x.shape[axes:])


@partial(jax.jit, static_argnums=5)
def _walk_back(x, grad, grad_x, way, states, axis):
    lines = x.shape[axis]

    def line(j, carry):
        grad_h, grad_x, grads = carry
        index = lines - 1 - j
        x_t, z, delta, sigmoid, decay, drive, b, c = _tokens(x, way, index, axis)
        grad_y = _lines(grad, index, axis)[..., None, :]

        g = grad_y * c
        h = _at(states, index, 0)[0][:, :, None]
        (_, before), (grad_h, later) = _recur(decay, (h, drive), (grad_h, g * decay))
        g += later
        grad_log = g * before * decay  # gradient of delta * a
        grad_drive = (g * b).sum(3)  # gradient of delta * x
        grad_z = ((grad_log * way.a).sum(3) + grad_drive * x_t) * sigmoid
        flat = grad_z.reshape(len(z), -1)

        def put(total, part):
            return _put(total, part[None], index, 0)

        a_sums = [_sum(t, 2) for t in grad_log * delta[..., None, :]]
        grads = _Way(
            z=put(grads.z, _matmul(flat, way.weights.T)),
            b=put(grads.b, _channel_sum(g * (delta * x_t)[..., None, :])),
            c=put(grads.c, _channel_sum(grad_y * (decay * before + drive))),
            weights=grads.weights + _matmul(z.T, flat),
            a=grads.a + jnp.stack(a_sums)[:, None, None],
        )
        return grad_h, _add_lines(grad_x, grad_drive * delta, index, axis), grads

    zero = jax.tree.map(jnp.zeros_like, (states[0][:, :, None], way))
    _, grad_x, grads = lax.fori_loop(0, lines, line, (zero[0], grad_x, zero[1]))
    return grad_x, grads
