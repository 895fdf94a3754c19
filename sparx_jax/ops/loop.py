"""The four scans of a map on CPUs: a loop over its lines, with a hand-written gradient.

A line is a row or a column, or an equal part of one.  The scan along the rows and the
one backwards go through the map at once, from its two ends, each with a line at a time:
all that a line's tokens need is made for them together, then a loop over the tokens has
only the recurrence.  Step sizes exist for two lines only.  Kept for the gradient: the
inputs, and the state before each line.  Shapes have l lines of t tokens.

XLA:CPU would fuse all this anew wherever it is used, into code without vector
instructions.  So it is written into memory that the loop over the lines carries, one
way after the other: an update in place ends a fusion, and takes no part of the next.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparx_jax.ops.scan import softplus_and_sigmoid
from sparx_jax.ops.skew import skewed
from sparx_jax.typing import Array, Float

LINE_BYTES = 128 * 1024  # of an array of two lines, at most

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# XLA:CPU writes in place only what is read at the very same indices: no selects.
_read = partial(lax.dynamic_slice, allow_negative_indices=False)
_write = partial(lax.dynamic_update_slice, allow_negative_indices=False)
_at = partial(lax.dynamic_index_in_dim, allow_negative_indices=False)
_put = partial(lax.dynamic_update_index_in_dim, allow_negative_indices=False)


class _Way(NamedTuple):
    """Inputs of the scans along rows, or columns, there (0) and back (1), in float32.

    Line l of `back` is the map's last but l, from its end: both ways walk forwards.
    """

    z: Float[Array, "l 2 b*t r+1"]
    """Inputs of the step sizes, and 1 for the bias."""
    bc: Float[Array, "l 2 b t 2 n"]
    weights: Float[Array, "2 r+1 d2"]
    """`z @ weights` is the step size before softplus; skewed."""
    a: Float[Array, "2 1 1 n d"]


@jax.jit  # keeps the trace of a shape
def forward(x, p, dt_proj, dt_bias, a, d):
    """The sum of the scans in the dtype of `x`, and the states before all lines.

    As of `triton_gpu.four_scans`; states are l 2 b n d, for rows and for columns.
    """
    x32 = x.astype(jnp.float32)
    y, states, memory = x32 * _skip(d), [], None
    for axis in (1, 2):
        way = _prepare(p, dt_proj, dt_bias, a, axis=axis)
        y, kept, memory = _walk(x32, y, way, _memory(way, memory), axis)
        states.append(kept)
    return y.astype(x.dtype), tuple(states)


@jax.jit
def backward(x, p, dt_proj, dt_bias, a, d, states, grad):
    """Gradients of all operands, in their dtypes."""
    x32, grad32 = x.astype(jnp.float32), grad.astype(jnp.float32)
    grad_x, others, memory = grad32 * _skip(d), [], None
    for axis, kept in zip((1, 2), states, strict=True):
        prepare = partial(_prepare, axis=axis)
        way, unprepare = jax.vjp(prepare, p, dt_proj, dt_bias, a)
        memory = _more_memory(_memory(way, memory))
        grad_x, grad_way, memory = _walk_back(
            x32, grad32, grad_x, way, kept, memory, axis
        )
        others.append(unprepare(grad_way))
    grad_d = jnp.broadcast_to(_sum((grad32 * x32).reshape(-1, d.shape[1])), d.shape)
    grads = grad_x, *jax.tree.map(jnp.add, *others), grad_d
    operands = x, p, dt_proj, dt_bias, a, d
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))


def _prepare(p, dt_proj, dt_bias, a, *, axis):
    batch, height, width, _ = p.shape
    ways = slice(axis - 1, None, 2)  # rows are 0 and 2, columns 1 and 3
    weights = dt_proj[ways].astype(jnp.float32), dt_bias[ways][:, None]
    weights = skewed(jnp.concatenate(weights, 1))
    p = p.astype(jnp.float32).reshape(batch, height, width, 4, -1)[..., ways, :]
    tokens = _tokens(p.shape[3 - axis], batch * a[0].size)
    p = jnp.moveaxis(p, axis, 1).reshape(batch, -1, tokens, 2, p.shape[-1])
    p = p.transpose(1, 3, 0, 2, 4)  # l 2 b t e
    p = jnp.stack([p[:, 0], p[::-1, 1, :, ::-1]], 1)
    r, n = dt_proj.shape[1], a.shape[-1]
    z = jnp.concatenate([p[..., :r], jnp.ones_like(p[..., :1])], -1)
    z = z.reshape(len(z), 2, -1, r + 1)
    bc = p[..., r:].reshape(*p.shape[:-1], 2, n)
    a = jnp.swapaxes(a[ways], 1, 2)[:, None, None]
    return jax.tree.map(lambda t: t.astype(jnp.float32), _Way(z, bc, weights, a))


def _tokens(side, size):
    """Tokens of a line: an equal part of a row or column of `side` tokens.

    `size` numbers belong to a token, those of all images together.

    Some ten arrays of two lines are in use at once and should stay in a core's cache.
    Fewer than 7 tokens cost more in calls than they save.
    """
    if not isinstance(size, int):  # in an export, whose batch is a symbol
        return side
    divisors = [t for t in range(min(7, side), side + 1) if side % t == 0]
    short = [t for t in divisors if 2 * 4 * t * size <= LINE_BYTES]
    return max(short, default=divisors[0])


def _places(x, index, tokens, axis):
    """Starts of the lines `index` and last but `index` of a map, and their shape."""
    parts = index.dtype.type(x.shape[3 - axis] // tokens)
    last, starts, size = x.shape[axis] * parts - 1, [], [*x.shape]
    size[axis], size[3 - axis] = 1, tokens
    for i in (index, last - index):
        line, token = lax.div(i, parts), lax.rem(i, parts) * tokens
        starts.append([0, line, token, 0] if axis == 1 else [0, token, line, 0])
    return starts, size


def _lines(x, index, tokens, axis):
    """Lines `index` and last but `index`, this one from its end: each b t d."""
    starts, size = _places(x, index, tokens, axis)
    one, other = (_read(x, start, size).squeeze(axis) for start in starts)
    return one, jnp.flip(other, 1)


def _fill(memory, parts, skip=0):
    """`memory` with its two ways overwritten, from token `skip` on."""
    for i, part in enumerate(parts):
        start = (i, 0, skip) + (0,) * (part.ndim - 2)
        memory = lax.dynamic_update_slice(memory, part[None], start)
    return memory


def _add_lines(total, parts, index, axis):
    """`total` with 2 b t d added to the lines that `_lines` reads."""
    starts, size = _places(total, index, parts.shape[2], axis)
    one, other = jnp.expand_dims(parts, 1 + axis)
    lines = one, jnp.flip(other, 3 - axis)
    for line, start in zip(lines, starts, strict=True):
        total = _write(total, line + _read(total, start, size), start)
    return total


def _steps(way, index, delta, bc):
    """Of two lines z @ weights, the step sizes, decays, B and C, by token."""
    z = _matmul(_at(way.z, index, 0)[0], way.weights)
    z = z.reshape(*delta.shape[:-1], -1)[..., : delta.shape[-1]]
    delta = _fill(delta, [softplus_and_sigmoid(one)[0] for one in z])
    decay = jnp.exp(delta[..., None, :] * way.a)  # 2 b t n d
    return z, delta, decay, _fill(bc, _at(way.bc, index, 0)[0])


def _recur(h, decay, walk):
    """h <- decay h + drive, token by token: the last, and all in `walk`.

    2 b t+1 n d, which has the drives after any state.  Written is what was read there,
    or XLA:CPU would copy all of it.
    """

    def step(t, carry):
        h, walk = carry
        h = _at(decay, t, 2) * h + _at(walk, t + 1, 2)
        return h, _put(walk, h, t + 1, 2)

    return lax.fori_loop(0, decay.shape[2], step, (h, walk))


def _memory(way, old):
    """For step sizes, for B and C, and for `_recur`: the old again, of a square map."""
    (_, _, b, t, _, n), d = way.bc.shape, way.a.shape[-1]
    if old and old[0].shape == (2, b, t, d):
        return old
    shapes = (b, t, d), (b, t, 2, n), (b, t + 1, n, d)
    return [jnp.zeros((2, *shape), jnp.float32) for shape in shapes]


def _state(way):
    return jnp.zeros((2, way.bc.shape[2], 1, *way.a.shape[-2:]), jnp.float32)


def _walk(x, y, way, memory, axis):
    tokens = way.bc.shape[3]

    def line(index, carry):
        y, states, h, (delta, bc, walk) = carry
        states = _put(states, h[None, :, :, 0], index, 0)
        _, delta, decay, bc = _steps(way, index, delta, bc)
        b, c = bc[..., 0, :, None], bc[..., 1, :, None]  # 2 b t n 1
        ways = zip(delta, _lines(x, index, tokens, axis), b, strict=True)
        walk = _fill(walk, [(delta * x)[..., None, :] * b for delta, x, b in ways], 1)
        h, walk = _recur(h, decay, walk)
        y = _add_lines(y, (walk[:, :, 1:] * c).sum(3), index, axis)
        return y, states, h, [delta, bc, walk]

    h = _state(way)
    states = jnp.zeros((len(way.z), *h.squeeze(2).shape), jnp.float32)
    carry = y, states, h, memory
    y, states, _, memory = lax.fori_loop(0, len(states), line, carry)
    return y, states, memory


def _sum(x):
    """Over the first of two axes, as a product: XLA:CPU's sums took 3 to 9 times."""
    return _matmul(jnp.ones(len(x), x.dtype), x)


def _skip(d):
    """The sum of the directions' skips, with the axes of a map."""
    return lax.broadcast_to_rank(_sum(d.astype(jnp.float32)), 4)


def _more_memory(memory):
    """For lines, their gradient, products with the step sizes.

    And for the gradients of z, skewed, and of h.
    """
    if len(memory) > 3:
        return memory
    delta, _, walk = memory
    grad_y, grad_h = walk[:, :, :, 0], walk[:, :, 1:]
    return [*memory, delta, grad_y, delta, skewed(delta), grad_h]


def _walk_back(x, grad, grad_x, way, states, memory, axis):
    tokens = way.bc.shape[3]

    def line(j, carry):
        grad_x, grads, grad_h, (delta, bc, walk, x_t, grad_y, u, rows, g) = carry
        index = len(states) - 1 - j
        z, delta, decay, bc = _steps(way, index, delta, bc)
        b, c = bc[..., 0, :, None], bc[..., 1, :, None]
        x_t = _fill(x_t, _lines(x, index, tokens, axis))
        # 0 before, as in `walk` h
        grad_y = _fill(grad_y, _lines(grad, index, tokens, axis), 1)
        u = _fill(u, [delta[i] * x_t[i] for i in (0, 1)])

        h = _at(states, index, 0)[0][:, :, None]
        drives = [u[i][..., None, :] * b[i] for i in (0, 1)]
        _, walk = _recur(h, decay, _fill(_put(walk, h, 0, 2), drives, 1))

        g = _fill(g, [grad_y[i, :, 1:, None] * c[i] for i in (0, 1)])
        last = grad_y[:, :, tokens:, None] * c[:, :, tokens - 1 :] + grad_h

        def step(i, carry):  # as in `_recur`, backwards
            t, (later, g) = tokens - 2 - i, carry
            now = _at(g, t, 2) + _at(decay, t + 1, 2) * later
            return now, _put(g, now, t, 2)

        g = _put(g, last, tokens - 1, 2)
        first, g = lax.fori_loop(0, tokens - 1, step, (last, g))

        grad_log = g * decay * walk[:, :, :-1]  # gradient of delta * a
        grad_u = (g * b).sum(3)
        grad_z = (grad_log * way.a).sum(3) + grad_u * x_t
        grad_z *= softplus_and_sigmoid(z)[1]
        rows = _put(rows, grad_z, 0, 0)
        flat = rows.reshape(2, -1, rows.shape[-1])
        grad_b = _matmul(g, u[..., None])
        grad_c = _matmul(walk, grad_y[..., None])[:, :, 1:]

        def put(total, part):
            return _put(total, part[None], index, 0)

        z_in = _at(way.z, index, 0)[0]
        grads = _Way(
            z=put(grads.z, _matmul(flat, way.weights.swapaxes(1, 2))),
            bc=put(grads.bc, jnp.stack([grad_b, grad_c], 3)[..., 0]),
            weights=grads.weights + _matmul(z_in.swapaxes(1, 2), flat),
            a=grads.a + grad_log * delta[..., None, :],
        )
        grad_x = _add_lines(grad_x, grad_u * delta, index, axis)
        grad_h = first * _at(decay, 0, 2)
        return grad_x, grads, grad_h, [delta, bc, walk, x_t, grad_y, u, rows, g]

    grads = jax.tree.map(jnp.zeros_like, way._replace(a=memory[-1]))
    carry = grad_x, grads, _state(way), memory
    grad_x, grads, _, memory = lax.fori_loop(0, len(states), line, carry)
    a = grads.a.sum((1, 2), keepdims=True)
    return grad_x, grads._replace(a=a), memory
