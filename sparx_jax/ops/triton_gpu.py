"""The four selective scans of a map as one GPU kernel each way.

These are by Pallas and Triton; where it can, `cuda.py` does the forward scans.

A program walks one direction over some channels of one image, the state in registers:
a pixel's channels lie side by side in memory, so rows and columns, forwards and
backwards, are read equally well and no copy of the map is made.  Step sizes are made
from the r inputs of a pixel where they are used.  The directions run side by side and
share what they read in the cache; their outputs are summed by XLA, which does it where
they are read.  The gradient keeps the inputs and the state before every few pixels.
"""

from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sparx_jax.ops import cuda
from sparx_jax.ops.batch import by_platform, shard_batch, target_kind
from sparx_jax.typing import Array, Float

# Pixels that a program reads before it walks over them, and whose states the gradient
# computes again: more would not fit the registers.
STEPS = 8
# Most channels of a program, which is one warp: each thread has a few, independent.
CHANNELS = {"forward": 128, "backward": 64}
# log1p(e) / e in powers of e, 0 <= e <= 1: minimax, relative error 3e-8.
_LOG1P = (
    0.9999999699, -0.4999949314, 0.3331909681, -0.2484298222, 0.1910600677,
    -0.1366324581, 0.0782259521, -0.0295052389, 0.0052326943,
)  # fmt: skip


def four_scans(
    x: Float[Array, "b h w d"],
    p: Float[Array, "b h w e"],
    dt_proj: Float[Array, "4 r d"],
    dt_bias: Float[Array, "4 d"],
    a: Float[Array, "4 d n"],
    d: Float[Array, "4 d"],
) -> Float[Array, "b h w d"]:
    """The sum of the scans along rows, columns, and both backwards.

    `p` has for each direction the r inputs of `dt_proj`, then n of B and n of C.  On
    anything but a GPU the kernel is interpreted, which is slow: for tests.
    """
    weights = dt_proj, *(jnp.float32(t) for t in (dt_bias, jnp.swapaxes(a, 1, 2), d))
    return shard_batch(_scans, "bb....", "b")(x, p, *weights)


def aligned(e: int, n: int, dtype: jnp.dtype) -> int:
    """The least e, of a pixel and direction, from this one on that suits the kernels.

    For the CUDA kernel it is a multiple of 8.
    """
    return e if n > 1 or dtype != jnp.bfloat16 else e + -e % 8


# x: b h w d; p: b h w e; w: 4 r d; bias, d: 4 d; a: 4 n d.
@jax.custom_vjp
def _scans(*operands):
    return _on_gpu_or_interpreted(_forward, *operands)[0]


def _scans_forward(*operands):
    y, states = _on_gpu_or_interpreted(partial(_forward, keep=True), *operands)
    return y, (operands, states)


def _scans_backward(saved, grad):
    operands, states = saved
    grads = _on_gpu_or_interpreted(_backward, *operands, grad, states)
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))


_scans.defvjp(_scans_forward, _scans_backward)


def _on_gpu_or_interpreted(call, *args):
    return by_platform(
        *args,
        cuda=partial(call, interpret=False),
        default=partial(call, interpret=True),
    )


class _Walk:
    """One of the four directions over some channels of an image."""

    def __init__(self, plan, x, p, w, bias, a, *, width, steps, block, interpret):
        self.block, self._interpret = block, interpret
        self._plan, self._width = plan, width
        self.chunks, self.steps = plan.shape[1], steps
        self.direction, self.part, self.image = map(pl.program_id, range(3))
        dim, (_, self.r, _), (_, self.n, _) = x.shape[-1], w.shape, a.shape
        self.channels = pl.ds(self.part * block, block)
        inside = self.part * block + jnp.arange(block) < dim
        self._mask = None if dim % block == 0 else inside
        self._x, self._p = x, p
        k = self.direction
        self._w = [self.read(w, k, i) for i in range(self.r)]
        self._bias = self.read(bias, k)
        self.a = [self.read(a, k, i) * cuda.LOG2_E for i in range(self.n)]

    def read(self, ref, *at):
        """The channels of this program, in float32, zero beyond the last."""
        other = None if self._mask is None else 0.0
        part = plt.load(
            ref.at[*_indices(at), self.channels], mask=self._mask, other=other
        )
        return part.astype(jnp.float32)

    def write(self, ref, value, *at):
        plt.store(
            ref.at[*_indices(at), self.channels],
            value.astype(ref.dtype),
            mask=self._mask,
        )

    def pixels(self, chunk):
        """Of a chunk in the order in which they are walked, as indices of the map."""
        by_column, backwards = lax.rem(self.direction, 2), lax.div(self.direction, 2)
        stride = (1 + by_column * (self._width - 1)) * (1 - 2 * backwards)
        first = plt.load(self._plan.at[self.direction, chunk])
        return [first + stride * step for step in range(self.steps)]

    def load(self, pixel):
        """What a step reads: the channels and the direction's numbers of a pixel."""
        e = self.r + 2 * self.n
        at = self.image, pixel
        numbers = [
            plt.load(self._p.at[*at, self.direction * e + i]).astype(jnp.float32)
            for i in range(e)
        ]
        return self.read(self._x, *at), numbers

    def operands(self, u, numbers):
        """What a step computes of it: step size, its slope, decay, drive, B and C."""
        dt, b, c = numbers[: self.r], numbers[self.r :][: self.n], numbers[-self.n :]
        z = self._bias
        for number, w in zip(dt, self._w, strict=True):
            z = self.fma(number, w, z)
        e = self._exp2(jnp.abs(z) * -cuda.LOG2_E)
        *others, series = _LOG1P
        for factor in reversed(others):
            series = self.fma(series, e, factor)
        delta = self.fma(series, e, jnp.maximum(z, 0.0))
        sigmoid = jnp.where(z >= 0, 1.0, e) * self._reciprocal(1.0 + e)
        decay = [self._exp2(delta * a) for a in self.a]
        drive = [delta * u * b_n for b_n in b]
        return delta, sigmoid, decay, drive, b, c

    # Instructions by name: XLA has Triton neither join a product and a sum nor take the
    # fast exponential, and would need twice as many.

    def fma(self, one, other, summand):
        return self._instruction(
            "fma.rn", lambda a, b, c: a * b + c, one, other, summand
        )

    def _exp2(self, x):
        return self._instruction("ex2.approx.ftz", jnp.exp2, x)

    def _reciprocal(self, x):
        return self._instruction("rcp.approx.ftz", lambda x: 1.0 / x, x)

    def _instruction(self, name, plain, *args):
        if self._interpret:
            return plain(*args)
        places = ", ".join(f"${i}" for i in range(1 + len(args)))
        (result,) = plt.elementwise_inline_asm(
            f"{name}.f32 {places};",
            args=[jnp.broadcast_to(jnp.float32(x), self.block) for x in args],
            constraints=",".join(["=f", *["f"] * len(args)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct((self.block,), jnp.float32)],
        )
        return result

    def zeros(self, number):
        return (jnp.zeros(self.block, jnp.float32),) * number


def _plan(height, width, steps):
    """For each direction the first pixel of each chunk.

    A table, not arithmetic, which LLVM would do anew for each number that is read.
    """
    rows = np.arange(height * width, dtype=np.int32).reshape(height, width)
    ways = np.stack([rows.ravel(), rows.T.ravel()])
    return jnp.asarray(np.concatenate([ways, ways[:, ::-1]])[:, ::steps])


def _indices(at):
    """The interpreter takes arrays alone."""
    return [jnp.int32(i) for i in at]


def _forward_kernel(plan, x, p, w, bias, a, y, *states, **options):
    walk = _Walk(plan, x, p, w, bias, a, **options)
    k, image = walk.direction, walk.image

    def walk_chunk(chunk, h):
        for ref in states:
            for n, h_n in enumerate(h):
                walk.write(ref, h_n, k, image, chunk, n)
        pixels, outs = walk.pixels(chunk), []
        # All reads first, all writes last: neither is moved past the other.  (To read
        # a chunk ahead took 1.4 times as long on an H100.)
        for read in [walk.load(pixel) for pixel in pixels]:
            _, _, decay, drive, _, c = walk.operands(*read)
            h = tuple(map(walk.fma, decay, h, drive))
            out = c[0] * h[0]
            for c_n, h_n in zip(c[1:], h[1:], strict=True):
                out = walk.fma(c_n, h_n, out)
            outs.append(out)
        for pixel, out in zip(pixels, outs, strict=True):
            walk.write(y, out, k, image, pixel)
        return h

    lax.fori_loop(0, walk.chunks, walk_chunk, walk.zeros(walk.n))


def _backward_kernel(
    plan, x, p, w, bias, a, grad, states, grad_x, grad_z, grad_bc, sums, **options
):
    walk = _Walk(plan, x, p, w, bias, a, **options)
    k, image, every = walk.direction, walk.image, range(walk.n)

    def walk_chunk(index, carry):
        grad_h, total_a, total_z, total_d = list(carry[0]), list(carry[1]), *carry[2:]
        chunk = walk.chunks - 1 - index
        pixels = walk.pixels(chunk)
        reads = [(*walk.load(i), walk.read(grad, image, i)) for i in pixels]
        h = [walk.read(states, k, image, chunk, n) for n in every]
        steps = []
        for u, numbers, g in reads:
            delta, sigmoid, decay, drive, b, c = walk.operands(u, numbers)
            decayed = [decay[n] * h[n] for n in every]
            h = [decayed[n] + drive[n] for n in every]
            steps.append((u, g, delta, sigmoid, decay, b, c, decayed, h))

        for pixel, step in reversed(list(zip(pixels, steps, strict=True))):
            u, g, delta, sigmoid, decay, b, c, decayed, h = step
            grad_delta, grad_rate = walk.zeros(2)  # of delta; of delta * x
            for n in every:
                grad_h[n] = walk.fma(g, c[n], grad_h[n])
                grad_log = grad_h[n] * decayed[n]  # of delta * a
                grad_delta = walk.fma(grad_log, walk.a[n], grad_delta)
                grad_rate = walk.fma(grad_h[n], b[n], grad_rate)
                total_a[n] = walk.fma(grad_log, delta, total_a[n])
                at = walk.part, k, image, pixel
                plt.store(
                    grad_bc.at[*_indices((*at, n))], (grad_h[n] * delta * u).sum()
                )
                plt.store(grad_bc.at[*_indices((*at, walk.n + n))], (g * h[n]).sum())
                grad_h[n] *= decay[n]
            # Of a, which is scaled, the logarithm of two is still missing.
            grad_delta = walk.fma(grad_rate, u, grad_delta * cuda.LN_2)
            walk.write(grad_x, grad_rate * delta, k, image, pixel)
            grad_delta *= sigmoid
            total_z += grad_delta
            total_d = walk.fma(g, u, total_d)
            walk.write(grad_z, grad_delta, k, image, pixel)
        return tuple(grad_h), tuple(total_a), total_z, total_d

    zeros = walk.zeros(walk.n)
    carry = zeros, zeros, *walk.zeros(2)
    _, total_a, *others = lax.fori_loop(0, walk.chunks, walk_chunk, carry)
    for i, total in enumerate([*total_a, *others]):
        walk.write(sums, total, image, k, i)


def _call(kernel, x, p, w, bias, a, *more, steps, outputs, interpret):
    """Runs `kernel` for every direction, some channels, and every image.

    Args:
      steps: pixels of a chunk.
      outputs: from the number of parts of the channels to shapes.
    """
    batch, *size, dim = x.shape
    kind = kernel.__name__.strip("_").removesuffix("_kernel")
    # A power of two, and one that divides the channels if that is a whole warp.
    block = min(CHANNELS[kind], dim & -dim)
    block = block if block >= 32 else min(64, pl.next_power_of_2(dim))
    parts = pl.cdiv(dim, block)
    # A conversion of p here saves one a channel and number there.
    flat = [t.reshape(batch, -1, t.shape[-1]) for t in (x, p.astype(jnp.float32))]
    return pl.pallas_call(
        partial(kernel, width=size[1], steps=steps, block=block, interpret=interpret),
        grid=(4, parts, batch),
        out_shape=outputs(parts),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=f"four_scans_{kind}",
    )(_plan(*size, steps), *flat, w.astype(jnp.float32), bias, a, *more)


@partial(jax.jit, static_argnames=("keep", "interpret"))
def _forward(x, p, w, bias, a, d, *, keep=False, interpret):
    batch, height, width, dim = x.shape
    n, tokens = a.shape[1], height * width
    program = cuda.program(x, p, n, keep=keep, kind=target_kind())
    if program and not interpret:
        return cuda.forward(program, x, p, w, bias, a, d)
    most = STEPS if n == 1 else 2
    steps = max(s for s in range(1, most + 1) if gcd(height, width) % s == 0)
    if program and keep:  # one gradient for both
        steps = program.steps
    y = jax.ShapeDtypeStruct((4, batch, tokens, dim), x.dtype)
    states = jax.ShapeDtypeStruct((4, batch, tokens // steps, n, dim), jnp.float32)
    y, *states = _call(
        _forward_kernel, x, p, w, bias, a,
        steps=steps, outputs=lambda _: [y, states][: 1 + keep], interpret=interpret,
    )  # fmt: skip
    skip = x.astype(jnp.float32) * d.sum(0)[None, None, None]
    y = y.astype(jnp.float32).sum(0).reshape(x.shape) + skip
    # Or else XLA keeps the sum in float32 for those who read it.
    return lax.optimization_barrier(y.astype(x.dtype)), *states


@partial(jax.jit, static_argnames="interpret")
def _backward(x, p, w, bias, a, d, grad, states, *, interpret):
    batch, height, width, dim = x.shape
    (_, r, _), (_, n, _), tokens = w.shape, a.shape, height * width

    def outputs(parts):
        each = jax.ShapeDtypeStruct((4, batch, tokens, dim), x.dtype)
        f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        bc = f32((parts, 4, batch, tokens, 2 * n))
        return [each, each, bc, f32((batch, 4, n + 2, dim))]

    flat = grad.reshape(batch, tokens, dim)
    grad_x, grad_z, grad_bc, sums = _call(
        _backward_kernel, x, p, w, bias, a, flat, states,
        steps=tokens // states.shape[2], outputs=outputs, interpret=interpret,
    )  # fmt: skip
    total = grad_x.astype(jnp.float32).sum(0).reshape(x.shape)
    total += grad.astype(jnp.float32) * d.sum(0)[None, None, None]

    # With places for B and C, which nothing needs: the r inputs alone would have to be
    # copied out of p.
    padded = jnp.pad(w.astype(grad_z.dtype), ((0, 0), (0, 2 * n), (0, 0)))
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    grad_dt = dot("kbld,ked->blke", grad_z, padded)
    grad_w = dot("blke,kbld->ked", p.reshape(batch, tokens, 4, -1), grad_z)[:, :r]
    sums = sums.sum(0)
    grad_bc = jnp.pad(grad_bc.sum(0).transpose(1, 2, 0, 3), ((0, 0),) * 3 + ((r, 0),))
    grad_p = (grad_dt + grad_bc).reshape(p.shape)
    return total, grad_p, grad_w, sums[:, n], sums[:, :n], sums[:, n + 1]
