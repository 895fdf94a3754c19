"""Selective scan: the recurrence of a state-space model with input-dependent steps.

For every picture, inner channel and state, walking over the tokens t of one direction:

    delta_t = softplus(dt_t)
    h_t     = exp(delta_t * a) * h_(t-1) + delta_t * x_t * b_t,      h_(-1) = 0
    y_t     = sum over states of c_t * h_t, plus d * x_t

Several directions may read the same sequence; their outputs are summed.  A reversed
direction walks from the last token to the first: it is an index, never a copy.
Source: Gu and Dao, "Mamba", arXiv:2312.00752, section 3.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparx_jax.typing import Array, Float

ScanMethod = Literal["auto", "associative", "loop", "sequential"]
SCAN_METHODS: tuple[str, ...] = get_args(ScanMethod)

# Most steps between stored states.  Memory for the backward pass is length / CHUNK
# states plus a few arrays of CHUNK tokens; 32 is near the optimum for 49 to 3,136.
CHUNK = 32


@jax.named_scope("selective_scan")  # by which sparx_jax.summary knows it
def selective_scan(
    x: Float[Array, "b l d"],
    dt: Float[Array, "k b l d"],
    a: Float[Array, "k d n"],
    b: Float[Array, "k b l n"],
    c: Float[Array, "k b l n"],
    d: Float[Array, "k d"],
    *,
    reverse: tuple[bool, ...] = (False,),
    method: ScanMethod = "auto",
) -> Float[Array, "b l d"]:
    """Sums k selective scans of the sequence `x`.

    `dt` is the step size before softplus, its bias added; `a` must be negative.
    `reverse[i]` walks direction i backwards.  Arithmetic is float32 inside whatever
    the storage dtype of `x`, `dt`, `b`, `c`; the result has the dtype of `x`.

    Methods, equal in value and in every gradient:
      sequential   one plain loop: the oracle of the others
      associative  parallel prefix in log2(l) steps: for accelerators
      loop         one block of tokens after the other, with a hand-written gradient
                   that keeps one state a block: for CPUs, 3 to 7 times faster
                   than associative
      auto         loop on CPU, associative elsewhere, chosen when XLA lowers
    """
    if method not in SCAN_METHODS:
        raise ValueError(f"scan method {method!r} is none of {SCAN_METHODS}")
    if len(reverse) != len(dt):
        raise ValueError(
            f"{len(dt)} directions, {len(reverse)} entries in reverse={reverse}"
        )
    operands = x, dt, a, b, c, d
    if method == "sequential":
        return _sequential(*operands, reverse=reverse)
    return _scan(method, reverse, *operands)


def _sequential(x, dt, a, b, c, d, *, reverse):
    f32 = partial(jnp.asarray, dtype=jnp.float32)

    def one_direction(x, dt, a, b, c, d):  # x, dt: (l, d); a: (d, n); b, c: (l, n)
        def step(h, token):
            x, dt, b, c = token
            delta = jax.nn.softplus(dt)[:, None]
            h = jnp.exp(delta * a) * h + delta * x[:, None] * b
            return h, h @ c + d * x

        return lax.scan(step, jnp.zeros_like(a), (x, dt, b, c))[1]

    total = 0.0
    for k, backwards in enumerate(reverse):
        flip = (lambda t: t[:, ::-1]) if backwards else (lambda t: t)
        tokens = [flip(f32(t)) for t in (x, dt[k], b[k], c[k])]
        scan = jax.vmap(one_direction, in_axes=(0, 0, None, 0, 0, None))
        x_k, dt_k, b_k, c_k = tokens
        total += flip(scan(x_k, dt_k, f32(a[k]), b_k, c_k, f32(d[k])))
    return total.astype(x.dtype)


# The gradient is defined once for all fast methods.  It keeps the inputs and the state
# before each block of tokens, so that either backward pass may follow either forward
# pass and `platform_dependent` never has to keep the residuals of two platforms.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(method, reverse, *operands):
    return _scan_forward(method, reverse, *operands)[0]


def _scan_forward(method, reverse, *operands):
    y, states = _dispatch(
        method,
        partial(_loop, reverse=reverse),
        partial(_associative, reverse=reverse),
        *operands,
    )
    return y, (operands, states)


def _scan_backward(method, reverse, residuals, grad):
    operands, states = residuals
    return _dispatch(
        method,
        partial(_loop_vjp, reverse=reverse),
        partial(_associative_vjp, reverse=reverse),
        operands,
        states,
        grad,
    )


_scan.defvjp(_scan_forward, _scan_backward)


# Tracing both methods takes half a second; jit keeps the trace of a shape.
_traced_once = partial(jax.jit, static_argnames="reverse")


def _dispatch(method, loop, associative, *args):
    if method == "auto":
        return lax.platform_dependent(*args, cpu=loop, default=associative)
    return (loop if method == "loop" else associative)(*args)


# -- parallel prefix ---------------------------------------------------------------


@_traced_once
def _associative(x, dt, a, b, c, d, *, reverse):
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    x32, y, states = f32(x), 0.0, []

    def combine(left, right):
        return right[0] * left[0], right[0] * left[1] + right[1]

    for k, backwards in enumerate(reverse):
        delta = jax.nn.softplus(f32(dt[k]))[..., None]  # b l d 1
        decay = jnp.exp(delta * f32(a[k]))
        drive = delta * x32[..., None] * f32(b[k, :, :, None])
        _, h = lax.associative_scan(combine, (decay, drive), reverse=backwards, axis=1)
        y += (h * f32(c[k, :, :, None])).sum(-1) + f32(d[k]) * x32
        walked = h[:, ::-1] if backwards else h
        before = jnp.pad(walked, ((0, 0), (1, 0), (0, 0), (0, 0)))[
            :, : -1 : _blocks(x.shape[1])[1]
        ]
        states.append(before.transpose(1, 0, 3, 2))  # chunk b n d
    return y.astype(x.dtype), jnp.stack(states, 1)


@_traced_once
def _associative_vjp(operands, states, grad, *, reverse):
    del states
    forward = lambda *operands: _associative(*operands, reverse=reverse)[0]  # noqa: E731
    return jax.vjp(forward, *operands)[1](grad)


# -- in-place loop -----------------------------------------------------------------


# atanh(s) / s in powers of s^2 up to 1/9: minimax, relative error 4e-9.
_ATANH = (1.0000000040, 0.3333315731, 0.2001245577, 0.1398029779, 0.1408916599)


def softplus_and_sigmoid(z):
    """softplus(z), sigmoid(z) from one exponential; relative error below 3e-7.

    log1p(e) = 2 atanh(e / (2 + e)).  The plain log(1 + e) would lose the small step
    sizes (1e-3) that matter most.
    """
    e = jnp.exp(-jnp.abs(z))
    s = e / (2.0 + e)
    s2 = s * s
    *others, series = _ATANH
    for factor in reversed(others):
        series = series * s2 + factor
    sigmoid = jnp.where(z >= 0, 1.0, e) / (1.0 + e)
    return jnp.maximum(z, 0.0) + 2.0 * s * series, sigmoid


def _read(array, *start, shape):
    """The part of this shape, in float32, at `start`; both leave out trailing axes."""
    shape += array.shape[len(shape) :]
    start += (0,) * (array.ndim - len(start))
    part = lax.dynamic_slice(array, start, shape, allow_negative_indices=False)
    return part.astype(jnp.float32)


def _write(array, part, *start):
    """Overwrites what `_read` reads."""
    start += (0,) * (array.ndim - len(start))
    return lax.dynamic_update_slice(array, part, start, allow_negative_indices=False)


def _blocks(length):
    """Number of blocks, and tokens of each: CHUNK or less, and as equal as they can."""
    number = -(-length // CHUNK)
    return number, -(-length // number)


class _Block(NamedTuple):
    """Some steps of one direction, in the order in which they are walked."""

    direction: Array
    index: Array
    """Which block of the direction it is."""
    low: Array
    """The first of its tokens in the order of the sequence."""
    first: Array
    """The token of its first step, counted from `low`."""
    stride: Array
    """Tokens from one step to the next: 1 or -1."""
    steps: Array
    """How many: the last block has fewer steps than tokens if they do not divide."""


def _plan(length, reverse):
    """All blocks as rows of integers.  A table, not arithmetic: less to compile."""
    number, size = _blocks(length)
    rows = []
    for k, backwards in enumerate(reverse):
        for i in range(number):
            begin = i * size
            low = min(begin, length - size)
            first, stride = begin - low, 1
            if backwards:
                low, first, stride = length - size - low, size - 1 - first, -1
            steps = min(size, length - begin)
            rows.append(_Block(k, i, low, first, stride, steps))
    return np.array(rows, np.int32)


def _operands(block, length, x, dt, a, b, c):
    """What the steps of a block need, all tokens at once."""
    batch, size = len(x), _blocks(length)[1]
    k, low = block.direction, block.low
    x = _read(x, 0, low, shape=(batch, size))  # b t d
    dt, b, c = (_read(t, k, 0, low, shape=(1, batch, size))[0] for t in (dt, b, c))
    delta, sigmoid = softplus_and_sigmoid(dt)
    decay = jnp.exp(delta[:, :, None] * _read(a, k, shape=(1,)))  # b t n d
    drive = (delta * x)[:, :, None] * b[..., None]
    # Tokens of the block before are no steps of this one.
    step = (jnp.arange(size) - block.first) * block.stride
    mine = ((step >= 0) & (step < block.steps)).astype(jnp.float32)[:, None]
    return x, delta, sigmoid, decay, drive, b[..., None], c[..., None], mine


def _recur(block, decay, *inputs):
    """h <- decay h + drive at every step; for each (h, drive): the last h, all before.

    The first pair walks as the block does, the second, the gradient's, the other way:
    neither needs the other, and one loop compiles faster than two.  Everything but
    this is done for the whole block at once.
    """
    ways = (0, 1), (block.steps - 1, -1)

    def step(s, carry):
        new = []
        for (h, before), (_, drive), (start, way) in zip(
            carry, inputs, ways, strict=False
        ):
            t = block.first + block.stride * (start + way * s)
            before = _write(before, h, 0, t)
            at = partial(_read, shape=(len(h), 1))
            new.append((at(decay, 0, t) * h + at(drive, 0, t), before))
        return tuple(new)

    start = tuple((h, jnp.zeros_like(drive)) for h, drive in inputs)
    return lax.fori_loop(0, block.steps, step, start)


# Sums as products: XLA:CPU gives sums to YNNPACK, which took 3 to 9 times as long, half
# of the whole gradient.


def _channel_sum(x):  # ... d -> ...
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)


def _token_sum(x):  # b t n d -> n d
    tokens, ones = x.reshape(-1, x[0, 0].size), jnp.ones(len(x) * x.shape[1], x.dtype)
    return jnp.matmul(ones, tokens, precision=lax.Precision.HIGHEST).reshape(
        x.shape[2:]
    )


@_traced_once
def _loop(x, dt, a, b, c, d, *, reverse):
    (batch, length, dim), states_dim = x.shape, a.shape[-1]
    a = jnp.swapaxes(a, 1, 2).astype(jnp.float32)  # k n d: the wide axis last
    plan, (number, size) = _plan(length, reverse), _blocks(length)

    def walk(j, carry):
        h, y, stored = carry
        block = _Block(*jnp.asarray(plan)[j])
        h = jnp.where(block.index == 0, 0.0, h)
        stored = _write(stored, h[None, None, :, 0], block.index, block.direction)
        _, _, _, decay, drive, _, c_t, mine = _operands(block, length, x, dt, a, b, c)

        ((h, before),) = _recur(block, decay, (h, drive))
        states = decay * before + drive
        out = (states * (c_t * mine[..., None])).sum(2)
        out += _read(y, 0, block.low, shape=(batch, size))
        return h, _write(y, out, 0, block.low), stored

    skip = x.astype(jnp.float32) * d.astype(jnp.float32).sum(0)
    zero = jnp.zeros((batch, 1, states_dim, dim), jnp.float32)
    stored = jnp.zeros((number, len(reverse), batch, states_dim, dim), jnp.float32)
    _, y, stored = lax.fori_loop(0, len(plan), walk, (zero, skip, stored))
    return y.astype(x.dtype), stored


@_traced_once
def _loop_vjp(operands, stored, grad, *, reverse):
    x, dt, a, b, c, d = operands
    (batch, length, dim), states_dim = x.shape, a.shape[-1]
    a32 = jnp.swapaxes(a, 1, 2).astype(jnp.float32)
    plan, (number, size) = _plan(length, reverse), _blocks(length)

    def walk(j, carry):
        grad_h, grad_x, grad_dt, grad_b, grad_c, grad_a = carry
        block = _Block(*jnp.asarray(plan)[len(plan) - 1 - j])
        k, low = block.direction, block.low
        x_t, delta, sigmoid, decay, drive, b_t, c_t, mine = _operands(
            block, length, x, dt, a32, b, c
        )
        shape = (1, 1, batch)
        h = _read(stored, block.index, k, shape=shape)[0, 0, :, None]
        grad_y = _read(grad, 0, low, shape=(batch, size))[:, :, None]

        grad_h = jnp.where(block.index == number - 1, 0.0, grad_h)
        g = grad_y * (c_t * mine[..., None])
        (_, before), (grad_h, later) = _recur(
            block, decay, (h, drive), (grad_h, g * decay)
        )
        g += later
        after = decay * before + drive
        grad_log = g * before * decay  # gradient of delta * a
        grad_drive = (g * b_t).sum(2)  # gradient of delta * x
        grad_delta = (grad_log * _read(a32, k, shape=(1,))).sum(2) + grad_drive * x_t

        def add(total, part, *start):
            part = part.reshape((1,) * (total.ndim - part.ndim) + part.shape)
            return _write(total, _read(total, *start, shape=part.shape) + part, *start)

        return (
            grad_h,
            add(grad_x, grad_drive * delta, 0, low),
            add(grad_dt, grad_delta * sigmoid, k, 0, low),
            add(grad_b, _channel_sum(g * (delta * x_t)[:, :, None]), k, 0, low),
            add(grad_c, _channel_sum(grad_y * after) * mine, k, 0, low),
            add(grad_a, _token_sum(grad_log * delta[:, :, None]), k),
        )

    grad32, x32 = grad.astype(jnp.float32), x.astype(jnp.float32)
    carry = (
        jnp.zeros((batch, 1, states_dim, dim), jnp.float32),
        grad32 * d.astype(jnp.float32).sum(0),
        *(jnp.zeros(t.shape, jnp.float32) for t in (dt, b, c, a32)),
    )
    _, *grads = lax.fori_loop(0, len(plan), walk, carry)
    grad_x, grad_dt, grad_b, grad_c, grad_a = grads
    grad_a = jnp.swapaxes(grad_a, 1, 2)
    grad_d = jnp.broadcast_to((grad32 * x32).sum((0, 1)), d.shape)
    grads = grad_x, grad_dt, grad_a, grad_b, grad_c, grad_d
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))
