"""The four selective scans of a map as one TPU kernel each way, by Pallas and Mosaic.

One program has the map of 8 pictures and 128 channels in VMEM, a vector register a
pixel, and walks over it four times: rows and columns are loop orders, backwards is an
index.  Step sizes, B and C are made where they are used, by one product of the matrix
unit for a row of pixels: its columns of ones copy B and C to all 128 lanes.  Only `x`,
the projections `p` and the sum of the four outputs pass through HBM.  The gradient
keeps nothing but these inputs: it walks each direction forwards to have the state at
the start of each row, then backwards row by row.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparx_jax.ops.batch import shard_batch, target_kind
from sparx_jax.ops.scan import softplus_and_sigmoid
from sparx_jax.typing import Array, Float

# Of a vector register: pictures in sublanes, channels in lanes.
SUBLANES, LANES = 8, 128
# MiB of a core by JAX's name of the device; source: jax's Pallas, tpu_info.py.
VMEM = {
    "TPU v4": 16,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v5 lite": 128,
    "TPU v6 lite": 128,
}
# The share of it that the blocks may take: the compiler needs some too.
USABLE = 0.85

# Cycles of a register of pixels in one direction, and those of each line of pixels, by
# which the compiler's schedules for v5e differ at 7, 14, 28 and 56 pixels a line
# (`python -m benchmarks.tpu_kernel`).
CYCLES = {"forward": (15.7, 101.0), "backward": (43.0, 295.0)}


def static_cycles(program: str) -> float:
    """Of the kernels of a compiled program, for which XLA has no estimate.

    Waiting for memory is not in it.
    """
    pattern = r"%four_scans_(\w+?)[.\d]* = \(?\w+\[(\d+),(\d+),(\d+),(\d+)\]"
    total = 0.0
    for kind, *sizes in re.findall(pattern, program):
        height, width, batch, dim = map(int, sizes)
        each, line = CYCLES[kind]
        blocks = -(-batch // SUBLANES) * -(-dim // LANES)
        pixels, lines = 4 * height * width, 2 * (height + width)
        total += blocks * (pixels * each + lines * line)
    return total


def target_vmem() -> int:
    """MiB of VMEM of the devices of `target_kind`; 0 if they are no TPUs."""
    return VMEM.get(target_kind(), 0)


def fits(height: int, width: int, e: int, n: int, dtype: jnp.dtype, vmem: int) -> bool:
    """Whether maps of this size, with e numbers a pixel in `p`, have room."""
    return _buffers((height, width), e, n, dtype, vmem, gradient=True) > 0


def _buffers(size, e, n, dtype, vmem, gradient):
    """How many blocks of an operand fit: 2 to load one while the other is used, or 1.

    0 if not even that.
    """
    pixel = SUBLANES * LANES  # numbers, padded to registers
    area, width, length = size[0] * size[1], jnp.dtype(dtype).itemsize, max(size)
    maps, tokens = area * pixel * width, area * SUBLANES * -(-e // LANES) * LANES
    lines = (20 + 12 * n) * length * pixel * 4
    once = area * pixel * 4 + 2 * maps + lines + (2 * tokens * 4 if gradient else 0)
    each = maps * (2 if gradient else 1) + tokens * width
    free = vmem * 2**20 * USABLE - once
    return int(min(2, max(0, free // each)))


def four_scans(
    x: Float[Array, "b h w d"],
    p: Float[Array, "b h w e"],
    dt_proj: Float[Array, "4 r d"],
    dt_bias: Float[Array, "4 d"],
    a: Float[Array, "4 d n"],
    d: Float[Array, "4 d"],
    *,
    vmem: int,
) -> Float[Array, "b h w d"]:
    """The sum of the scans along rows, columns, and both backwards.

    `p` has for each direction the r inputs of `dt_proj`, then n of B and n of C.  On
    anything but a TPU the kernel is interpreted, which is slow: for tests.

    Raises ValueError if the maps do not fit `vmem` MiB.
    """
    (_, *size, dim), (r, n) = x.shape, (dt_proj.shape[1], a.shape[-1])
    if not fits(*size, p.shape[-1], n, x.dtype, vmem):
        raise ValueError(
            f"the scan method mosaic_tpu needs more than {vmem} MiB of VMEM for maps "
            f"of {size[0]} x {size[1]} in {x.dtype}: use associative."
        )
    # One matrix a direction: from all of p to the step size of every channel.
    rows = np.eye(4)[:, :, None, None] * np.eye(r + 2 * n, r)
    w = jnp.einsum("kjer,krd->kjed", rows.astype(np.float32), dt_proj)
    w = w.reshape(4, -1, dim).astype(x.dtype)

    def part(x, p, *weights):
        # Whole registers of pictures; XLA makes arrays in this layout, it copies none.
        missing = (0, -len(x) % SUBLANES)
        whole = [jnp.pad(t, (missing, *[(0, 0)] * 3)) if missing[1] else t
                 for t in (x, p)]  # fmt: skip
        y = _scans(vmem, *(t.transpose(1, 2, 0, 3) for t in whole), *weights)
        return y.transpose(2, 0, 1, 3)[: len(x)]

    weights = w, *(jnp.float32(t) for t in (dt_bias, jnp.swapaxes(a, 1, 2), d))
    return shard_batch(part, "bb....", "b")(x, p, *weights)


# x, p: height width batch channels; w: 4 e d; bias, d: 4 d; a: 4 n d.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scans(vmem, *operands):
    return _on_tpu_or_interpreted(_forward, vmem, *operands)


def _scans_forward(vmem, *operands):
    return _scans(vmem, *operands), operands


def _scans_backward(vmem, operands, grad):
    grads = _on_tpu_or_interpreted(_backward, vmem, *operands, grad)
    return tuple(g.astype(o.dtype) for g, o in zip(grads, operands, strict=True))


_scans.defvjp(_scans_forward, _scans_backward)


def _on_tpu_or_interpreted(call, vmem, *args):
    call = partial(call, vmem=vmem)
    return lax.platform_dependent(
        *args, tpu=partial(call, interpret=False), default=partial(call, interpret=True)
    )


def _with_copies(w, n):
    """For each 128 channels the columns of `w`, and ones that copy B and C there."""
    w = _filled(w)
    k, e, dim = w.shape
    r = e // 4 - 2 * n
    ones = np.zeros((k, e, 2 * n), np.float32)
    for direction in range(4):
        for state in range(2 * n):
            ones[direction, direction * (e // 4) + r + state, state] = 1
    shape = (k, e, 2 * n, dim)
    ones = jnp.broadcast_to(jnp.asarray(ones, w.dtype)[..., None], shape)
    both = jnp.concatenate([w[:, :, None], ones], 2)
    both = both.reshape(k, e, 1 + 2 * n, dim // LANES, LANES)
    return both.swapaxes(2, 3).reshape(k, e, -1)


def _filled(array):
    """With zeros up to whole registers of channels."""
    pad = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % LANES)]
    return jnp.pad(array, pad)


class _Map:
    """A block of a map in float32, zero beyond the last channel."""

    def __init__(self, ref, dim):
        self.shape, self._ref, self._partial = ref.shape, ref, dim % LANES
        self._channels = dim - LANES * pl.program_id(1)

    def __getitem__(self, at):
        part = self._ref[at].astype(jnp.float32)
        if not self._partial:
            return part
        lane = lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
        return jnp.where(lane < self._channels, part, 0.0)


class _Walk:
    """One of the four directions over the blocks of one program."""

    def __init__(self, k, x, p, w, bias, a, unroll):
        self.k, self.by_column, self.backwards = k, k % 2 == 1, k >= 2
        height, width = x.shape[:2]
        lines = (width, height) if self.by_column else (height, width)
        self.lines, self.length = lines
        self.states, self._unroll = a.shape[1], unroll
        self._x, self._p, self._w, self._bias, self._a = x, p, w, bias, a
        exact = lax.Precision.HIGHEST if p.dtype == jnp.float32 else None
        self._dot = partial(
            lax.dot_general, precision=exact, preferred_element_type=jnp.float32
        )

    def line(self, step):
        """The row or column that is walked as the `step`-th."""
        return self.lines - 1 - step if self.backwards else step

    def pixel(self, step):
        """The same for the pixels of a line."""
        return self.length - 1 - step if self.backwards else step

    def at(self, line, pixel=slice(None)):
        """The index of a map."""
        return (pixel, line) if self.by_column else (line, pixel)

    def read(self, ref, line):
        """A line of a map, pixels and pictures as one axis."""
        part = ref[self.at(line)]
        return part.reshape(-1, part.shape[-1])

    def operands(self, line):
        """All that the steps of a line need: pixels * pictures, 128 channels each."""
        u = self.read(self._x, line)
        p = self.read(self._p, line)
        mixed = self._dot(p, self._w[self.k], (((1,), (0,)), ((), ())))
        columns = [
            mixed[:, i * LANES : (i + 1) * LANES] for i in range(1 + 2 * self.states)
        ]
        delta, sigmoid = softplus_and_sigmoid(columns[0] + self._bias[self.k][None])
        a = [self._a[self.k, n][None] for n in range(self.states)]
        decay = [jnp.exp(delta * a_n) for a_n in a]
        b, c = columns[1 : 1 + self.states], columns[1 + self.states :]
        drive = [delta * u * b_n for b_n in b]
        return u, delta, sigmoid, a, b, c, decay, drive

    def put(self, scratch, arrays):
        """Into scratch of n, pixels, pictures, channels."""
        for n, array in enumerate(arrays):
            scratch[n, : self.length] = array.reshape(self.length, SUBLANES, LANES)

    def get(self, scratch, n):
        return scratch[n, : self.length].reshape(-1, LANES)

    def for_lines(self, function: Callable, carry):
        return lax.fori_loop(0, self.lines, function, carry)

    def for_pixels(self, function: Callable, carry):
        times = max(u for u in range(1, self._unroll + 1) if self.length % u == 0)
        return lax.fori_loop(0, self.length, function, carry, unroll=times)

    def zero_states(self):
        return (jnp.zeros((SUBLANES, LANES), jnp.float32),) * self.states


def _forward_kernel(x, p, w, bias, a, d, y, total, decay, drive, c, *, dim, unroll):
    x, skip = _Map(x, dim), d[...].sum(0)[None]

    def start(line, _):
        total[line] = x[line] * skip

    lax.fori_loop(0, x.shape[0], start, None)
    for k in range(4):
        walk = _Walk(k, x, p, w, bias, a, unroll)

        def walk_line(step, h, walk=walk):
            line = walk.line(step)
            *_, c_n, decay_n, drive_n = walk.operands(line)
            for scratch, arrays in ((decay, decay_n), (drive, drive_n), (c, c_n)):
                walk.put(scratch, arrays)

            def step_pixel(step, h):
                i = walk.pixel(step)
                at, new = walk.at(line, i), []
                out = total[at]
                for n, h_n in enumerate(h):
                    h_n = decay[n, i] * h_n + drive[n, i]
                    out += c[n, i] * h_n
                    new.append(h_n)
                total[at] = out
                return tuple(new)

            return walk.for_pixels(step_pixel, h)

        walk.for_lines(walk_line, walk.zero_states())

    def finish(line, _):
        y[line] = total[line].astype(y.dtype)

    lax.fori_loop(0, x.shape[0], finish, None)


def _backward_kernel(
    x, p, w, bias, a, d, grad,
    grad_x, grad_p, grad_w, sums,
    total, starts, before, later, decay, drive,
    *, dim, unroll,
):  # fmt: skip
    x, grad, skip = _Map(x, dim), _Map(grad, dim), d[...].sum(0)[None]
    height = x.shape[0]
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    grad_w[...] = jnp.zeros(grad_w.shape, jnp.float32)

    def start(line, grad_d):
        total[line] = grad[line] * skip
        return grad_d + (grad[line] * x[line]).sum(0)

    zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
    sums[0, -1] = lax.fori_loop(0, height, start, zero)

    @pl.when(pl.program_id(1) == 0)  # all channels add to the gradient of p
    def _():
        def clear(line, _):
            grad_p[line] = jnp.zeros(grad_p.shape[1:], grad_p.dtype)

        lax.fori_loop(0, height, clear, None)

    for k in range(4):
        walk = _Walk(k, x, p, w, bias, a, unroll)

        def there(step, h, walk=walk):
            *_, decay_n, drive_n = walk.operands(walk.line(step))
            walk.put(decay, decay_n)
            walk.put(drive, drive_n)
            for n, h_n in enumerate(h):
                starts[n, step] = h_n

            def step_pixel(step, h):
                i = walk.pixel(step)
                return tuple(decay[n, i] * h_n + drive[n, i] for n, h_n in enumerate(h))

            return walk.for_pixels(step_pixel, h)

        def back(step, carry, walk=walk, k=k):
            step = walk.lines - 1 - step
            line = walk.line(step)
            u, delta, sigmoid, a_n, b_n, c_n, decay_n, drive_n = walk.operands(line)
            g = walk.read(grad, line)
            walk.put(decay, decay_n)
            walk.put(drive, drive_n)
            walk.put(later, [g * c for c in c_n])

            def step_pixel(step, carry):
                """States one way and, independently, their gradients the other."""
                i, j = walk.pixel(step), walk.pixel(walk.length - 1 - step)
                new, states = [], range(walk.states)
                for n, h in zip(states, carry[0], strict=True):
                    before[n, i] = h
                    new.append(decay[n, i] * h + drive[n, i])
                new_grads = []
                for n, grad_h in zip(states, carry[1], strict=True):
                    grad_h += later[n, j]
                    later[n, j] = grad_h
                    new_grads.append(decay[n, j] * grad_h)
                return tuple(new), tuple(new_grads)

            h = tuple(starts[n, step] for n in range(walk.states))
            _, carry = walk.for_pixels(step_pixel, (h, carry))

            def add(place, array):
                parts = array.reshape(walk.length, SUBLANES, LANES)
                sums[0, place] += parts.sum(0)

            place = k * (1 + walk.states)
            grad_delta, grad_u, grad_b, grad_c = 0.0, 0.0, [], []
            for n in range(walk.states):
                grad_h, h = walk.get(later, n), walk.get(before, n)
                decayed = decay_n[n] * h
                grad_log = grad_h * decayed
                grad_drive = grad_h * b_n[n]
                grad_delta += grad_log * a_n[n] + grad_drive * u
                grad_u += grad_drive * delta
                grad_b.append(grad_h * delta * u)
                grad_c.append(g * (decayed + drive_n[n]))
                add(place + 1 + n, grad_log * delta)
            grad_dt = grad_delta * sigmoid
            add(place, grad_dt)
            at = walk.at(line)
            total[at] += grad_u.reshape(walk.length, SUBLANES, LANES)
            # The transposed product sums the gradients of B and C over the lanes.
            columns = jnp.concatenate([grad_dt, *grad_b, *grad_c], 1).astype(p.dtype)
            part = walk._dot(columns, w[k], (((1,), (1,)), ((), ())))
            grad_p[at] += part.reshape(walk.length, SUBLANES, -1)
            rows = walk.read(p, line)
            grad_w[0, k] += walk._dot(
                rows, grad_dt.astype(p.dtype), (((0,), (0,)), ((), ()))
            )
            return carry

        walk.for_lines(there, walk.zero_states())
        walk.for_lines(back, walk.zero_states())

    def finish(line, _):
        grad_x[line] = total[line].astype(grad_x.dtype)

    lax.fori_loop(0, height, finish, None)


def _call(kernel, vmem, interpret, x, p, w, bias, a, d, *grad, outputs, lines):
    """Runs `kernel` for every 8 pictures and 128 channels.

    Args:
      kernel: of the operands, outputs, scratch of a map, and `lines` for the states of
        a row or column.
      outputs: from the block specs of a map and of `p` to specs and shapes.
    """
    (height, width, batch, dim), e, n = x.shape, p.shape[-1], a.shape[1]
    buffers = _buffers((height, width), e, n, x.dtype, vmem, bool(grad))

    def block(*shape, **options):
        return pl.BlockSpec((height, width, SUBLANES, *shape), **options)

    def maps(**options):
        return block(LANES, index_map=lambda b, c: (0, 0, b, c), **options)

    def tokens(**options):
        return block(e, index_map=lambda b, c: (0, 0, b, 0), **options)

    one = dict(pipeline_mode=pl.Buffered(1)) if buffers == 1 else {}
    specs, shapes = outputs(maps(), tokens())
    return pl.pallas_call(
        # Unrolled, a program takes long to compile where it is interpreted.
        partial(kernel, dim=dim, unroll=1 if interpret else 8),
        grid=(batch // SUBLANES, pl.cdiv(dim, LANES)),
        in_specs=[
            maps(**one),
            tokens(**one),
            pl.BlockSpec((4, e, (1 + 2 * n) * LANES), lambda b, c: (0, 0, c)),
            pl.BlockSpec((4, LANES), lambda b, c: (0, c)),
            pl.BlockSpec((4, n, LANES), lambda b, c: (0, 0, c)),
            pl.BlockSpec((4, LANES), lambda b, c: (0, c)),
            *[maps(**one) for _ in grad],
        ],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((height, width, SUBLANES, LANES), jnp.float32),
            *[pltpu.VMEM((n, max(height, width), SUBLANES, LANES), jnp.float32)]
            * lines,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem * 2**20 * 15 // 16,
        ),
        interpret=interpret,
        name=f"four_scans_{'backward' if grad else 'forward'}",
    )(x, p, _with_copies(w, n), *map(_filled, (bias, a, d)), *grad)


@partial(jax.jit, static_argnames=("vmem", "interpret"))
def _forward(x, *operands, vmem, interpret):
    def outputs(maps, tokens):
        del tokens
        return maps, jax.ShapeDtypeStruct(x.shape, x.dtype)

    return _call(
        _forward_kernel, vmem, interpret, x, *operands, outputs=outputs, lines=3
    )


@partial(jax.jit, static_argnames=("vmem", "interpret"))
def _backward(x, p, w, bias, a, d, grad, *, vmem, interpret):
    (batch, dim), (e, n) = x.shape[2:], (p.shape[-1], a.shape[1])
    parts, rows = batch // SUBLANES, 4 * (1 + n) + 1

    def outputs(maps, tokens):
        f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        each = lambda b, c: (b, 0, 0, c)  # noqa: E731
        return [
            maps,
            tokens,
            pl.BlockSpec((1, 4, e, LANES), each),
            pl.BlockSpec((1, rows, SUBLANES, LANES), each),
        ], [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            f32(p.shape),
            f32((parts, 4, e, dim)),
            f32((parts, rows, SUBLANES, dim)),
        ]

    operands = x, p, w, bias, a, d, grad
    grad_x, grad_p, grad_w, sums = _call(
        _backward_kernel, vmem, interpret, *operands, outputs=outputs, lines=5
    )
    sums = sums.sum((0, 2))
    each = sums[:-1].reshape(4, 1 + n, dim)
    grad_d = jnp.broadcast_to(sums[-1], d.shape)
    return grad_x, grad_p, grad_w.sum(0), each[:, 0], each[:, 1:], grad_d
