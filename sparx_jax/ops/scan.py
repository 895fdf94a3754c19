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
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from sparx_jax.typing import Array, Float

ScanMethod = Literal["auto", "associative", "loop", "sequential"]
SCAN_METHODS: tuple[str, ...] = get_args(ScanMethod)

# Steps between stored states.  Memory for the backward pass is length / CHUNK states
# plus CHUNK states; 32 is near the optimum for 49 to 3,136 tokens.
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
      loop         in-place loop with a hand-written gradient that keeps only every
                   32nd state: for CPUs, 3 to 7 times faster than associative
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


# The gradient is defined once for all fast methods.  It keeps the inputs and every
# CHUNK-th state, so that either backward pass may follow either forward pass and
# `platform_dependent` never has to keep the residuals of two platforms.


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


def _dispatch(method, loop, associative, *args):
    if method == "auto":
        return lax.platform_dependent(*args, cpu=loop, default=associative)
    return (loop if method == "loop" else associative)(*args)


# -- parallel prefix ---------------------------------------------------------------


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
        before = jnp.pad(walked, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1:CHUNK]
        states.append(before.transpose(1, 0, 3, 2))  # chunk b n d
    return y.astype(x.dtype), jnp.stack(states, 1)


def _associative_vjp(operands, states, grad, *, reverse):
    del states
    forward = lambda *operands: _associative(*operands, reverse=reverse)[0]  # noqa: E731
    return jax.vjp(forward, *operands)[1](grad)


# -- in-place loop -----------------------------------------------------------------


def _softplus_and_sigmoid(z):
    """softplus(z), sigmoid(z) from one exponential; relative error below 3e-7.

    log1p(e) = 2 atanh(e / (2 + e)), of which seven terms are enough for e <= 1.
    The plain log(1 + e) would lose the small step sizes (1e-3) that matter most.
    """
    e = jnp.exp(-jnp.abs(z))
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 13.0
    for odd in (11, 9, 7, 5, 3, 1):
        series = series * s2 + 1.0 / odd
    sigmoid = jnp.where(z >= 0, 1.0, e) / (1.0 + e)
    return jnp.maximum(z, 0.0) + 2.0 * s * series, sigmoid


def _token(array, index, k=None):
    """Token `index` of (b, l, width), or of direction k of (k, b, l, width)."""
    if k is None:
        array, k = array[None], 0
    _, batch, _, width = array.shape
    token = lax.dynamic_slice(array, (k, 0, index, 0), (1, batch, 1, width))
    return token[0, :, 0].astype(jnp.float32)


def _put(array, token, index, k=None):
    """Writes what `_token` reads."""
    token = token[:, None] if k is None else token[None, :, None]
    start = (0, index, 0) if k is None else (k, 0, index, 0)
    return lax.dynamic_update_slice(array, token, start)


def _chunks(length):
    return -(-length // CHUNK)


def _transition(x, dt, a, b, k, index):
    """What one step of direction k needs: token values, step size and decay."""
    x_t = _token(x, index)  # b d
    delta, sigmoid = _softplus_and_sigmoid(_token(dt, index, k))
    b_t = _token(b, index, k)[..., None]  # b n 1
    decay = jnp.exp(delta[:, None] * a[k])  # b n d
    return x_t, delta, sigmoid, b_t, decay


def _loop(x, dt, a, b, c, d, *, reverse):
    (batch, length, dim), states_dim = x.shape, a.shape[-1]
    a = jnp.swapaxes(a, 1, 2).astype(jnp.float32)  # k n d: the wide axis last

    def step(t, carry):
        states, y = carry
        new_states = []
        for k, backwards in enumerate(reverse):
            index = length - 1 - t if backwards else t
            x_t, delta, _, b_t, decay = _transition(x, dt, a, b, k, index)
            h = decay * states[k] + (delta * x_t)[:, None] * b_t
            out = (h * _token(c, index, k)[..., None]).sum(1) + _token(y, index)
            y = _put(y, out, index)
            new_states.append(h)
        return tuple(new_states), y

    def chunk(i, carry):
        states, y, stored = carry
        stored = lax.dynamic_update_index_in_dim(stored, jnp.stack(states), i, 0)
        end = jnp.minimum((i + 1) * CHUNK, length)
        states, y = lax.fori_loop(i * CHUNK, end, step, (states, y))
        return states, y, stored

    skip = x.astype(jnp.float32) * d.astype(jnp.float32).sum(0)
    zero = jnp.zeros((batch, states_dim, dim), jnp.float32)
    stored = jnp.zeros((_chunks(length), len(reverse), *zero.shape), jnp.float32)
    _, y, stored = lax.fori_loop(
        0, _chunks(length), chunk, ((zero,) * len(reverse), skip, stored)
    )
    return y.astype(x.dtype), stored


def _loop_vjp(operands, stored, grad, *, reverse):
    x, dt, a, b, c, d = operands
    (batch, length, dim), states_dim = x.shape, a.shape[-1]
    a32 = jnp.swapaxes(a, 1, 2).astype(jnp.float32)
    directions = range(len(reverse))

    def place(t, k):
        return length - 1 - t if reverse[k] else t

    def chunk(i, carry):
        i = _chunks(length) - 1 - i
        start, end = i * CHUNK, jnp.minimum((i + 1) * CHUNK, length)

        def replay(t, carry):  # the states before each step of this chunk
            states, history = carry
            history = tuple(
                lax.dynamic_update_index_in_dim(history[k], states[k], t - start, 0)
                for k in directions
            )
            new_states = []
            for k in directions:
                x_t, delta, _, b_t, decay = _transition(x, dt, a32, b, k, place(t, k))
                new_states.append(decay * states[k] + (delta * x_t)[:, None] * b_t)
            return tuple(new_states), history

        states = lax.dynamic_index_in_dim(stored, i, 0, keepdims=False)
        empty = jnp.zeros((CHUNK, batch, states_dim, dim), jnp.float32)
        _, history = lax.fori_loop(
            start, end, replay, (tuple(states), (empty,) * len(reverse))
        )

        def step(s, carry):
            t = end - 1 - (s - start)
            grad_h, grad_a, grad_x, grad_dt, grad_b, grad_c = carry
            grad_h, grad_a, grad_x = list(grad_h), list(grad_a), list(grad_x)
            for k in directions:
                index = place(t, k)
                x_t, delta, sigmoid, b_t, decay = lax.optimization_barrier(
                    # Each output below would otherwise recompute the exponentials.
                    _transition(x, dt, a32, b, k, index)
                )
                before = lax.dynamic_index_in_dim(
                    history[k], t - start, 0, keepdims=False
                )
                h = decay * before + (delta * x_t)[:, None] * b_t
                grad_y = _token(grad, index)[:, None]  # b 1 d
                g = lax.optimization_barrier(
                    grad_y * _token(c, index, k)[..., None] + grad_h[k]
                )
                grad_log = g * before * decay  # gradient of delta * a
                grad_drive = (g * b_t).sum(1)  # gradient of delta * x
                grad_delta = (grad_log * a32[k]).sum(1) + grad_drive * x_t
                grad_h[k] = g * decay
                grad_a[k] += (grad_log * delta[:, None]).sum(0)
                grad_x[k] = _put(grad_x[k], grad_drive * delta, index)
                grad_dt = _put(grad_dt, grad_delta * sigmoid, index, k)
                grad_b_t = (g * (delta * x_t)[:, None]).sum(-1)
                grad_b = _put(grad_b, grad_b_t, index, k)
                grad_c = _put(grad_c, (grad_y * h).sum(-1), index, k)
            return tuple(grad_h), tuple(grad_a), tuple(grad_x), grad_dt, grad_b, grad_c

        return lax.fori_loop(start, end, step, carry)

    grad32, x32 = grad.astype(jnp.float32), x.astype(jnp.float32)
    carry = (
        (jnp.zeros((batch, states_dim, dim), jnp.float32),) * len(reverse),
        (jnp.zeros((states_dim, dim), jnp.float32),) * len(reverse),
        (jnp.zeros(x.shape, jnp.float32),) * len(reverse),
        *(jnp.zeros(t.shape, jnp.float32) for t in (dt, b, c)),
    )
    _, grad_a, *grads = lax.fori_loop(0, _chunks(length), chunk, carry)
    grad_x, grad_dt, grad_b, grad_c = grads
    grad_x = sum(grad_x) + grad32 * d.astype(jnp.float32).sum(0)
    grad_a = jnp.swapaxes(jnp.stack(grad_a), 1, 2)
    grad_d = jnp.broadcast_to((grad32 * x32).sum((0, 1)), d.shape)
    grads = grad_x, grad_dt, grad_a, grad_b, grad_c, grad_d
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))
