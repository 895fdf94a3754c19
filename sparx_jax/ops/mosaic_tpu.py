"""The four selective scans of a map as TPU kernels, by Pallas and Mosaic.

One program has the map of 8 images and 128 channels in VMEM, a vector register a
pixel, and walks over it four times: rows and columns are loop orders, backwards is an
index.  These walks go side by side, since each waits for itself.  Step sizes, B and C
are made where they are used, by one product of the matrix unit for some pixels: its
columns of ones copy B and C to all 128 lanes.  Only `x`, the projections `p` and the
sum of the four outputs pass through HBM.  The gradient keeps these inputs and one state
for each piece of a line, with which it walks each direction once, against its order.

Where a map has no room each direction is a call of the same kernel.  Its programs have
a strip of whole lines each and hand their states on in the order of the walk; the sums
over directions pass from call to call through HBM in float32.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, repeat
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparx_jax.ops.batch import by_platform, shard_batch, target_kind
from sparx_jax.ops.scan import softplus_and_sigmoid
from sparx_jax.typing import Array, Float

# Of a vector register: images in sublanes, channels in lanes.
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
# At most as many pixels of a direction are straight code where there is one state: more
# of them hide more of the scan's latency, and take longer to compile.
PIECE = 49


def target_vmem() -> int:
    """MiB of VMEM of the devices of `target_kind`; 0 if they are no TPUs."""
    return VMEM.get(target_kind(), 0)


class Walk(NamedTuple):
    """Directions along lines of the same length."""

    ways: range
    beside: int
    """How many of them are walked side by side."""
    piece: int
    """Pixels of straight code, of one line or of several whole ones."""


def aligned(e: int, n: int, dtype: jnp.dtype) -> int:
    """The least e from this one on that `four_scans` takes.

    A direction's numbers lie in one register of a pixel, or in whole ones, with which
    alone it is multiplied.
    """
    unit = LANES // 2 if e <= LANES // 2 else LANES
    return e if 4 * e <= LANES else e + -e % unit


def _near(e):
    """How many numbers of a pixel lie in the registers of one direction."""
    return 4 * e if 4 * e <= LANES else max(LANES, e)


def _walk(ways, lines, length, states):
    pieces = (
        i
        for i in range(1, max(8, PIECE // states) + 1)
        if length % i == 0 or (i % length == 0 and lines * length % i == 0)
    )
    return Walk(ways, len(ways) if states == 1 else 1, max(pieces))


class Call(NamedTuple):
    """What one call of a kernel walks."""

    walks: tuple[Walk, ...]
    lines: int
    """Rows of a strip or, if the first direction is along columns, columns."""
    buffers: int
    """Of an operand: 2 to load one block while the other is used, or 1."""
    vmem: int
    """MiB of it."""


def calls(
    height: int, width: int, e: int, n: int, dtype: jnp.dtype, vmem: int
) -> tuple[Call, ...]:
    """One for a whole map, with e numbers a pixel and direction in `p`, or one each way
    for strips.

    None at all if not even one line has room.
    """
    f32, own = (SUBLANES * LANES * size for size in (4, jnp.dtype(dtype).itemsize))
    e = aligned(e, n, dtype)
    tokens = -(-4 * e // LANES)
    sizes = (height, width), (width, height)

    def room(*walks):
        """Bytes for the blocks, and those of one pixel: operands, and all others.

        Of the gradient, which needs more than the forward pass.
        """
        pixel = (4 + 8 * n) * walks[0].beside
        temporaries = pixel * max(walk.piece for walk in walks) * f32
        ways = sum(len(walk.ways) for walk in walks)
        weights = ways * _near(e) * ((1 + 2 * n) * own + f32) // SUBLANES
        states = ways * n * f32 / min(walk.piece for walk in walks)
        others = f32 + 2 * (own + tokens * f32 + states)
        free = vmem * 2**20 * USABLE - temporaries - 2 * weights
        return free, (2 + tokens) * own, others

    square = height == width
    ways = (range(4),) if square else (range(0, 4, 2), range(1, 4, 2))
    walks = tuple(_walk(way, *sizes[way.start], n) for way in ways)
    free, operands, others = room(*walks)
    buffers = int(min(2, (free / (height * width) - others) // operands))
    if buffers > 0:
        return (Call(walks, height, buffers, vmem),)
    result = []
    for way in range(4):
        lines, length = sizes[way % 2]
        walk = _walk(range(way, way + 1), 1, length, n)
        free, operands, others = room(walk)
        # All sums are in float32, and those before are operands.
        pixel = 2 * operands + others + 2 * (f32 - own) + 2 * (1 + tokens) * f32
        most = int(free / (length * pixel))
        if most < 1:
            return ()
        strip = pl.cdiv(lines, pl.cdiv(lines, most))
        result.append(Call((walk,), strip, 2, vmem))
    return tuple(result)


def four_scans(
    x: Float[Array, "b h w d"],
    p: Float[Array, "b h w e"],
    dt_proj: Float[Array, "4 r d"],
    dt_bias: Float[Array, "4 d"],
    a: Float[Array, "4 d n"],
    d: Float[Array, "4 d"],
    *,
    vmem: int | None = None,
) -> Float[Array, "b h w d"]:
    """The sum of the scans along rows, columns, and both backwards.

    `p` has for each direction the r inputs of `dt_proj`, then n of B and n of C, as
    many together as `aligned` says.  On anything but a TPU the kernel is interpreted,
    which is slow: for tests.

    Raises ValueError if the maps do not fit `vmem` MiB: that of the devices or, where
    they are no TPUs, of the TPU that has most.
    """
    vmem = vmem or target_vmem() or max(VMEM.values())
    (_, *size, dim), (r, n) = x.shape, (dt_proj.shape[1], a.shape[-1])
    e = r + 2 * n
    plan = calls(*size, e, n, x.dtype, vmem)
    if not plan:
        raise ValueError(
            f"the scan method mosaic_tpu needs more than {vmem} MiB of VMEM for maps "
            f"of {size[0]} x {size[1]} in {x.dtype}: use associative."
        )
    # One matrix a direction: from its registers to the step size of every channel.
    sharing = _near(e) // e  # directions whose numbers lie there
    rows = np.eye(sharing)[np.arange(4) % sharing, :, None, None] * np.eye(e, r)
    w = jnp.einsum("kjer,krd->kjed", rows.astype(np.float32), dt_proj)
    w = w.reshape(4, -1, dim).astype(x.dtype)

    def part(x, p, *weights):
        # Whole registers of images; XLA makes arrays in this layout, it copies none.
        missing = (0, -len(x) % SUBLANES)
        whole = [jnp.pad(t, (missing, *[(0, 0)] * 3)) if missing[1] else t
                 for t in (x, p)]  # fmt: skip
        y = _scans(plan, *(t.transpose(1, 2, 0, 3) for t in whole), *weights)
        return y.transpose(2, 0, 1, 3)[: len(x)]

    weights = w, *(jnp.float32(t) for t in (dt_bias, jnp.swapaxes(a, 1, 2), d))
    return shard_batch(part, "bb....", "b")(x, p, *weights)


# x, p: height width batch channels; w: 4 e d; bias, d: 4 d; a: 4 n d.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scans(plan, *operands):
    return _scans_forward(plan, *operands)[0]


def _scans_forward(plan, *operands):
    y, starts = _on_tpu_or_interpreted(_forward, plan, operands)
    return y, (operands, starts)


def _scans_backward(plan, residuals, grad):
    grads = _on_tpu_or_interpreted(_backward, plan, *residuals, grad)
    return tuple(g.astype(o.dtype) for g, o in zip(grads, residuals[0], strict=True))


_scans.defvjp(_scans_forward, _scans_backward)


def _on_tpu_or_interpreted(function, plan, *args):
    function = partial(function, plan)
    return by_platform(
        *args,
        tpu=partial(function, interpret=False),
        default=partial(function, interpret=True),
    )


def _with_copies(w, e, n):
    """For each 128 channels the columns of `w`, and ones that copy B and C there."""
    w = _filled(w)
    k, near, dim = w.shape
    ones = np.zeros((k, near, 2 * n), np.float32)
    for direction in range(4):
        for state in range(2 * n):
            end = direction * e % near + e
            ones[direction, end - 2 * n + state, state] = 1
    shape = (k, near, 2 * n, dim)
    ones = jnp.broadcast_to(jnp.asarray(ones, w.dtype)[..., None], shape)
    both = jnp.concatenate([w[:, :, None], ones], 2)
    both = both.reshape(k, near, 1 + 2 * n, dim // LANES, LANES)
    return both.swapaxes(2, 3).reshape(k, near, -1)


def _filled(array):
    """With zeros up to whole registers of channels."""
    pad = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % LANES)]
    return jnp.pad(array, pad)


def _softplus_and_sigmoid(z, dtype):
    """As that of scan.py; for bfloat16 in a third of the instructions.

    Then small steps have an absolute error of 1e-7, which of 1e-4 is 1e-3.
    """
    if dtype == jnp.float32:
        return softplus_and_sigmoid(z)
    factor = np.float32(-1 / np.log(2))
    softplus = jnp.maximum(z, 0.0) + jnp.log(1.0 + jnp.exp2(jnp.abs(z) * factor))
    return softplus, 1.0 - jnp.exp2(softplus * factor)


class _Walker:
    """Directions of the same length of lines over one block.

    A line is walked in pieces, each so short that all its steps are straight code,
    which the compiler has run beside the arithmetic of other pixels.
    """

    def __init__(self, walk, first, size, strip, dim, x, p, w, bias, a):
        self._ways, self._beside, self.piece = walk
        self._first, self._weights = first, (w, bias, a)
        self.column, self.states = self._ways.start % 2, a.shape[1]
        self.lines, self.length = x.shape[1::-1] if self.column else x.shape[:2]
        # The last strip may have fewer.
        self.count = jnp.minimum(self.lines, size[self.column] - strip * self.lines)
        self._x, self._p, self._dtype = x, p, p.dtype
        # Here, because the interpreter has no `program_id` in loops.
        self._first_strip, self._block = pl.program_id(1) == 0, pl.program_id(2)
        self._channels, self._partial = dim - LANES * self._block, dim % LANES

    def dot(self, left, right, axes):
        return lax.dot_general(
            left.astype(self._dtype),
            right.astype(self._dtype),
            (axes, ((), ())),
            precision=lax.Precision.HIGHEST if self._dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def for_lines(self, function: Callable):
        """Calls it with the index of every line of the block."""

        def call(line, _):
            function((slice(None), line) if self.column else (line,))

        lax.fori_loop(0, self.count, call, None)

    def for_pieces(self, function: Callable, carry, *, gradient=False):
        """Walks every direction; `carry` has the states of all blocks of channels.

        Args:
          function: of the number of a piece in walking order, and for each of the
            directions side by side its number in this call, the places of the pixels,
            and the states; returns new states for each.
          carry: from one strip to the next.
          gradient: against the walking order.
        """
        steps = lax.div(self.count * self.length, self.piece)
        groups = len(self._ways) // self._beside

        def group(i, _):
            numbers = [i + groups * other for other in range(self._beside)]
            ks = [self._ways.start + j * self._ways.step for j in numbers]

            def step(i, hs):
                i = steps - 1 - i if gradient else i
                places = [self._places(k, i * self.piece) for k in ks]
                ways = [k - self._first for k in ks]
                return function(i, zip(ways, places, hs, strict=True))

            start = tuple(
                jnp.where(self._first_strip, 0.0, carry[self._block, n])
                for n in range(self.states)
            )
            hs = lax.fori_loop(0, steps, step, (start,) * self._beside)
            for n, h in enumerate(hs[0]):  # in strips there is one direction
                carry[self._block, n] = h

        lax.fori_loop(0, groups, group, None)

    def _places(self, k, pixel):
        """Those of the pixels of the piece that begins there in walking order."""
        backwards, column = k >= 2, lax.rem(k, 2) == 1
        line, pixel = lax.div(pixel, self.length), lax.rem(pixel, self.length)
        line = jnp.where(backwards, self.count - 1 - line, line)
        pixel = jnp.where(backwards, self.length - 1 - pixel, pixel)
        row, at = jnp.where(column, pixel, line), jnp.where(column, line, pixel)
        one = jnp.where(backwards, -1, 1)
        down, right = jnp.where(column, one, 0), jnp.where(column, 0, one)
        # By sums alone: the scalar unit is busy.
        steps, places = min(self.piece, self.length) - 1, []
        while len(places) < self.piece:
            rows = accumulate(repeat(down, steps), initial=row)
            columns = accumulate(repeat(right, steps), initial=at)
            places += zip(rows, columns, strict=True)
            row, at = row + right, at + down
        return places

    def numbers(self, k, at):
        """The places of a direction's registers of `p`."""
        e, near = self._p.shape[-1] // 4, self._weights[0].shape[1]
        start = 0
        if near < 4 * e:
            start = pl.multiple_of(lax.div((k + self._first) * e, near) * near, near)
        return [(*i, slice(None), pl.ds(start, near)) for i in at]

    def read(self, ref, at):
        """Pixels of a block in float32, pixels and images as one axis."""
        return jnp.concatenate([ref[i].astype(jnp.float32) for i in at])

    def read_map(self, ref, at):
        """The same, zero beyond the last channel."""
        part = self.read(ref, at)
        if not self._partial:
            return part
        lane = lax.broadcasted_iota(jnp.int32, part.shape, 1)
        return jnp.where(lane < self._channels, part, 0.0)

    def operands(self, k, at):
        """All that the steps of a piece need: pixels * images, 128 channels each."""
        w, bias, a = self._weights
        u, p = self.read_map(self._x, at), self.read(self._p, self.numbers(k, at))
        mixed = self.dot(p, w[k], ((1,), (0,)))
        columns = [
            mixed[:, i * LANES : (i + 1) * LANES] for i in range(1 + 2 * self.states)
        ]
        delta, sigmoid = _softplus_and_sigmoid(columns[0] + bias[k], self._dtype)
        a = [a[k, n][None] for n in range(self.states)]
        decay = [jnp.exp2(delta * (a_n * np.float32(1 / np.log(2)))) for a_n in a]
        b, c = columns[1 : 1 + self.states], columns[1 + self.states :]
        drive = [delta * u * b_n for b_n in b]
        return u, p, delta, sigmoid, a, b, c, decay, drive

    def each(self, array):
        """That of each pixel."""
        return jnp.split(array, self.piece)


def _forward_kernel(walks, first, x, p, w, bias, a, d, *refs):
    *before, y, starts, total, carry = refs
    walks, skip = walks(x, p, w, bias, a), d[...].sum(0)[None]

    def start(line):
        if first:
            total[line] = x[line].astype(jnp.float32) * skip
        else:
            total[line] = before[0][line]

    walks[0].for_lines(start)
    for walk in walks:

        def piece(i, ways, walk=walk):
            places, states, parts = [], [], []
            for k, at, h in ways:
                for n, h_n in enumerate(h):
                    starts[k, i, n] = h_n
                *_, c, decay, drive = walk.operands(k, at)
                parts.append([[walk.each(t) for t in ts] for ts in (c, decay, drive)])
                places.append(at)
                states.append(list(h))
            outs = [[0.0] * walk.piece for _ in places]
            for j in range(walk.piece):
                for h, out, part in zip(states, outs, parts, strict=True):
                    for n, (c, decay, drive) in enumerate(zip(*part, strict=True)):
                        h[n] = decay[j] * h[n] + drive[j]
                        out[j] += c[j] * h[n]
            # Reads before writes: of two places the compiler does not know that they
            # differ.  Those of two directions may be the same.
            for at, out in zip(places, outs, strict=True):
                old = [total[i] for i in at]
                for i, one, other in zip(at, old, out, strict=True):
                    total[i] = one + other
            return tuple(map(tuple, states))

        walk.for_pieces(piece, carry)

    def finish(line):
        y[line] = total[line].astype(y.dtype)

    walks[0].for_lines(finish)


def _backward_kernel(walks, first, x, p, w, bias, a, d, starts, grad, *refs):
    *before, grad_x, grad_p, grad_w, sums, total, carry = refs
    walks, skip = walks(x, p, w, bias, a), d[...].sum(0)[None]
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    grad_w[...] = jnp.zeros(grad_w.shape, jnp.float32)

    def start(line):
        if first:
            g = grad[line].astype(jnp.float32)
            total[line] = g * skip
            sums[0, -1] += (g * x[line].astype(jnp.float32)).sum(0)
        else:
            total[line] = before[0][line]

    walks[0].for_lines(start)

    @pl.when(pl.program_id(2) == 0)  # all channels add to the gradient of p
    def _():
        def start(line):
            if first:
                grad_p[line] = jnp.zeros(grad_p[line].shape, jnp.float32)
            else:
                grad_p[line] = before[1][line]

        walks[0].for_lines(start)

    for walk in walks:

        def one_way(i, k, at, grad_h, walk=walk):
            """The new states at last; yields before, so that directions take turns."""
            u, p, delta, sigmoid, a, b, c, decay, drive = walk.operands(k, at)
            g = walk.read_map(grad, at)
            place, columns = k * (1 + walk.states), []
            grad_delta, grad_u, grad_b, grad_c, carried = 0.0, 0.0, [], [], []

            def add(place, array):
                sums[0, place] += sum(walk.each(array))

            for n in range(walk.states):
                hs, ghs, gh = [starts[k, i, n]], [], grad_h[n]
                later = walk.each(g * c[n])
                decays, drives = walk.each(decay[n]), walk.each(drive[n])
                for j in range(walk.piece):
                    hs.append(decays[j] * hs[j] + drives[j])
                    yield
                for j in reversed(range(walk.piece)):
                    gh += later[j]
                    ghs.append(gh)
                    gh *= decays[j]
                    yield
                carried.append(gh)
                h, after = jnp.concatenate(hs[:-1]), jnp.concatenate(hs[1:])
                # Again, or they would be kept in memory meanwhile.
                u, g = walk.read_map(x, at), walk.read_map(grad, at)
                gh = jnp.concatenate(ghs[::-1])
                grad_log = gh * decay[n] * h
                grad_drive = gh * b[n]
                grad_delta += grad_log * a[n] + grad_drive * u
                grad_u += grad_drive * delta
                grad_b.append(gh * delta * u)
                grad_c.append(g * after)
                add(place + 1 + n, grad_log * delta)
            grad_dt = grad_delta * sigmoid
            yield
            add(place, grad_dt)
            # The transposed product sums the gradients of B and C over the lanes.
            columns = jnp.concatenate([grad_dt, *grad_b, *grad_c], 1)
            part = walk.dot(columns, w[k], ((1,), (1,)))
            numbers = walk.numbers(k, at)
            for array, to, more in ((total, at, grad_u), (grad_p, numbers, part)):
                old = [array[i] for i in to]
                for i, one, other in zip(to, old, walk.each(more), strict=True):
                    array[i] = one + other
            grad_w[0, k] += walk.dot(p, grad_dt, ((0,), (0,)))
            yield tuple(carried)

        def piece(i, ways, one_way=one_way):
            *_, states = zip(*(one_way(i, *way) for way in ways), strict=True)
            return states

        walk.for_pieces(piece, carry, gradient=True)

    def finish(line):
        grad_x[line] = total[line].astype(grad_x.dtype)

    walks[0].for_lines(finish)


def _call(kernel, call, interpret, operands, given=(), before=()):
    """Runs a kernel for every 8 images, strip, and 128 channels.

    Args:
      kernel: of its walks, the operands, given, before, results, and scratch.
      call: what to walk.
      interpret: instead of compiling.
      operands: x, p, and the weights of all directions.
      given: to the gradient: states from the forward pass, and the gradient of y.
      before: the sums of the calls before, to which this one adds.
    """
    x, p, w, bias, a, d = operands
    (*size, batch, dim), near, n = x.shape, w.shape[1], a.shape[1]
    first = call.walks[0].ways.start
    number = sum(len(walk.ways) for walk in call.walks)
    column, last = first % 2, first + number == 4
    shape = (size[0], call.lines) if column else (call.lines, size[1])
    parts, strips = batch // SUBLANES, pl.cdiv(size[column], call.lines)
    blocks = pl.cdiv(dim, LANES)
    pieces = shape[0] * shape[1] // min(walk.piece for walk in call.walks)

    def strip(s):
        return strips - 1 - s if (first >= 2) != bool(given) else s

    def walks(*refs):
        s = strip(pl.program_id(1))
        return [_Walker(walk, first, size, s, dim, *refs) for walk in call.walks]

    def pixels(last, channel, **options):
        def index(b, s, c):
            return *((0, strip(s)) if column else (strip(s), 0)), b, channel(c)

        return pl.BlockSpec((*shape, SUBLANES, last), index, **options)

    maps = partial(pixels, LANES, lambda c: c)
    tokens = partial(pixels, p.shape[-1], lambda c: 0)
    states = pl.BlockSpec(
        (number, pieces, n, SUBLANES, LANES), lambda b, s, c: (0, strip(s), 0, b, c)
    )

    def weights(*shape, lanes=LANES):
        return pl.BlockSpec((*shape, lanes), lambda b, s, c: (*[0 for _ in shape], c))

    def sums(*shape):
        return (
            jax.ShapeDtypeStruct((parts * strips, *shape, dim), jnp.float32),
            pl.BlockSpec((1, *shape, LANES), lambda b, s, c: (b * strips + s, 0, 0, c)),
        )

    total = jax.ShapeDtypeStruct(x.shape, x.dtype if last else jnp.float32), maps()
    if given:
        tokens_total = jax.ShapeDtypeStruct(p.shape, jnp.float32), tokens()
        rows = number * (1 + n) + 1
        results = total, tokens_total, sums(number, near), sums(rows, SUBLANES)
    else:
        shape_of_states = number, strips * pieces, n, batch, blocks * LANES
        results = total, (jax.ShapeDtypeStruct(shape_of_states, jnp.float32), states)
    once = dict(pipeline_mode=pl.Buffered(1)) if call.buffers == 1 else {}
    return pl.pallas_call(
        partial(kernel, walks, not before),
        grid=(parts, strips, blocks),
        in_specs=[
            maps(**once),
            tokens(**once),
            weights(number, near, lanes=(1 + 2 * n) * LANES),
            weights(number, 1),
            weights(number, n),
            weights(4),
            *((states, maps(**once)) if given else ()),
            *[spec for _, spec in results[: len(before)]],
        ],
        out_specs=[spec for _, spec in results],
        out_shape=[shape for shape, _ in results],
        # The sums of this call take the places of those before.
        input_output_aliases={
            6 + len(given) + i: i
            for i, sum_before in enumerate(before)
            if sum_before.dtype == results[i][0].dtype
        },
        scratch_shapes=[
            pltpu.VMEM((*shape, SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((blocks, n, SUBLANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=call.vmem * 2**20 * 15 // 16,
        ),
        interpret=interpret,
        name=f"{'four_scans' if number == 4 else 'one_of_four_scans'}_"
        f"{'backward' if given else 'forward'}",
    )(
        x, p,
        *(t[first : first + number] for t in (w, bias[:, None], a)), d,
        *given, *before,
    )  # fmt: skip


def _whole_registers(operands):
    """Weights for whole registers of channels."""
    x, p, w, bias, a, d = operands
    w = _with_copies(w, p.shape[-1] // 4, a.shape[1])
    return x, p, w, *map(_filled, (bias, a, d))


@partial(jax.jit, static_argnums=0, static_argnames="interpret")
def _forward(plan, operands, *, interpret):
    operands = _whole_registers(operands)
    before, all_starts = (), []
    for call in plan:
        y, starts = _call(_forward_kernel, call, interpret, operands, (), before)
        before = (y,)
        all_starts.append(starts)
    return y, tuple(all_starts)


@partial(jax.jit, static_argnums=0, static_argnames="interpret")
def _backward(plan, operands, all_starts, grad, *, interpret):
    *_, a, d = operands
    operands, n = _whole_registers(operands), a.shape[1]
    before, grads_w, grads_bias, grads_a, grad_d = (), [], [], [], 0.0
    for call, starts in zip(plan, all_starts, strict=True):
        *before, grad_w, sums = _call(
            _backward_kernel, call, interpret, operands, (starts, grad), before
        )
        sums = sums.sum((0, 2))
        each = sums[:-1].reshape(-1, 1 + n, sums.shape[-1])
        grads_w.append(grad_w.sum(0))
        grads_bias.append(each[:, 0])
        grads_a.append(each[:, 1:])
        grad_d += sums[-1]
    grads = map(jnp.concatenate, (grads_w, grads_bias, grads_a))
    return *before, *grads, jnp.broadcast_to(grad_d, d.shape)
