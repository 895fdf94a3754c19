"""Static cycles of our kernels on a TPU that is not there: benchmarks.tpu_kernel

Compiles the kernels of the four scans and of the depthwise convolutions for each stage
of SparX-Mamba-T and counts the instruction bundles of the compiler's final schedule,
those of a loop as often as it runs, beside XLA's estimate of what they replace: the
scans by `lax.associative_scan`, and its own convolution.  All are given for a register
of 8 images and 128 channels, those of scans for one direction; where a chip has two
cores they share the registers.  Waiting for memory is in none of them.

Needs libtpu: `make libtpu`, then PYTHONPATH=.cache/libtpu.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

# Of SparX-Mamba-T at 224 pixels: a side, channels and rank of the scans, channels and
# filters of the convolutions.
SCANS = [(56, 192, 6), (28, 384, 12), (14, 640, 20), (7, 1024, 32)]
CONVOLUTIONS = [
    *[(size, dim, 5) for size, dim, _ in SCANS],
    *[(56, 384, 3), (28, 768, 3), (14, 1280, 3), (7, 2048, 3)],
]


def loops(text):
    """Depth and instruction bundles of each loop of a schedule, without inner ones.

    The first is the loop over programs.
    """
    found, last = [], {}
    pattern = r"^\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2}):)?\s*:?\s*(>+)\s*\{"
    for label, arrows in re.findall(pattern, text, re.M):
        depth = len(arrows)
        if label == "LB":
            last[depth] = len(found)
            found.append([depth, 0])
        found[last[depth]][1] += 1
    return found


def schedules(folder, kernel):
    """The loops of each kernel of that name that was compiled last."""
    files = Path(folder).glob(f"*{kernel}*final_bundles.txt")
    found = [loops(f.read_text()) for f in files if "schedule" not in f.name]
    for file in Path(folder).iterdir():
        file.unlink()
    return found


def scan_cycles(found, size, plan):
    """Of all strips and directions of 8 images and 128 channels.

    In a program there are loops over lines and one over groups of directions side by
    side, in which is one over pieces, the largest; for one group the compiler may drop
    the outer one.
    """
    assert len(found) == len(plan), f"{len(found)} kernels for {len(plan)} calls"
    total = 0
    for (_, program), *inner in found:
        call = plan[0]  # of a square map all are alike
        (walk,) = call.walks
        groups = len(walk.ways) // walk.beside
        pieces = max(count for _, count in inner)
        total += -(-size // call.lines) * program
        for (depth, count), (following, _) in pairwise([*inner, (0, 0)]):
            if count == pieces:
                times = groups * size * size // walk.piece
            else:
                times = groups if following > depth else size
            total += times * count
    return total / (4 * size * size)


def convolution_cycles(found, size):
    """Loops over lines, in some of which is one over pieces of 8 or 7 pixels."""
    (((_, total), *inner),) = found
    for depth, count in inner:
        total += count * size * (1 if depth == 2 else -(-size // 8))
    return total / size**2


def main():
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=32, help="images a chip")
    parser.add_argument("--image", type=int, default=224, help="pixels a side")
    parser.add_argument("--no_xla", action="store_true", help="ours alone, in a minute")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--side", help="what a child of this program is to compile")
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(args, folder):
                print(json.dumps(line), flush=True)
        return
    # Schedules are written for everything that a process compiles, which takes long.
    sides = ["ours"] if args.no_xla else ["ours", "xla"]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tpu_kernel", *sys.argv[1:], "--side", s],
            stdout=subprocess.PIPE,
            text=True,
        )
        for s in sides
    ]
    rows = []
    print("| operation | | " + " | ".join([*sides, "ratio"]) + " |")
    print("|---" * (3 + len(sides)) + "|")
    for lines in zip(*(child.stdout for child in children), strict=False):
        (name, kind, ours), *theirs = map(json.loads, lines)
        rows.append({"operation": name, "kind": kind, "ours": ours})
        cells = [f"{ours:.1f}", "", ""]
        if theirs and (cycles := theirs[0][2]) is not None:
            rows[-1]["xla"] = cycles
            cells[1:] = f"{cycles:.1f}", f"{cycles / ours:.1f}"
        print(f"| {name} | {kind} | " + " | ".join(cells) + " |", flush=True)
    if any(child.wait() for child in children):
        sys.exit(1)  # the child has said why
    if args.out:
        Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1))


def measure(args, folder):
    """(operation, direction, cycles of a register) by kernels, or as XLA estimates."""
    # Before JAX is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.side == "ours":
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparx_jax import chips
    from sparx_jax.ops import depthwise, mosaic_depthwise, mosaic_tpu
    from sparx_jax.ops.ss2d import four_scans
    from sparx_jax.ops.tpu_cycles import CORES

    devices, _ = chips.find_devices(args.topology)
    kind, batch = devices[0].device_kind, args.batch
    given = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0]))
    vmem = mosaic_tpu.VMEM[kind]

    def estimate(function, *operands):
        """Maps are laid out as in the network, the pixels' axes first."""

        def swap(t, *axes):
            return t.transpose(axes) if t.ndim == 4 else t

        def inside(*operands):
            results = function(*(swap(t, 2, 0, 1, 3) for t in operands))
            return jax.tree.map(lambda t: swap(t, 1, 2, 0, 3), results)

        operands = jax.eval_shape(
            lambda *ts: [swap(t, 1, 2, 0, 3) for t in ts], *operands
        )
        operands = [given(t.shape, t.dtype) for t in operands]
        try:
            text = jax.jit(inside).lower(*operands).compile().as_text()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))

    def gradient(function):
        return lambda grad, *operands: jax.vjp(function, *operands)[1](grad)

    def cycles(size, dim, kernel, count, ours, theirs, *operands, ways=1):
        """XLA's are those of a chip; a core has its part of the registers."""
        if args.side == "ours":
            estimate(ours, *operands)
            return count(schedules(folder, kernel)) / CORES.get(kind, 1)
        total = estimate(theirs, *operands)
        registers = ways * size * size * -(-batch // 8) * -(-dim // 128)
        return None if total is None else total / registers

    for size, dim, rank in SCANS:
        size = size * args.image // 224
        plan = mosaic_tpu.calls(size, size, rank + 2, 1, jnp.dtype("bfloat16"), vmem)
        strips = -(-size // plan[0].lines)
        name = f"scan {size} x {size} x {dim}"
        name += f", {strips} strips" if strips > 1 else ""
        if args.side == "ours":
            rank = mosaic_tpu.aligned(rank + 2, 1, jnp.dtype("bfloat16")) - 2
        e = 4 * (rank + 2)
        maps = [given((batch, size, size, c), jnp.bfloat16) for c in (dim, e)]
        shapes = (4, rank, dim), (4, dim), (4, dim, 1), (4, dim)
        operands = *maps, *(given(shape, jnp.float32) for shape in shapes)
        ours = partial(mosaic_tpu.four_scans, vmem=vmem)
        theirs = partial(four_scans, "associative")
        count = partial(scan_cycles, size=size, plan=plan)
        common = size, dim, "four_scans_forward", count
        yield name, "forward", cycles(*common, ours, theirs, *operands, ways=4)
        common = size, dim, "four_scans_backward", count
        both = gradient(ours), gradient(theirs)
        yield name, "backward", cycles(*common, *both, operands[0], *operands, ways=4)
    for size, dim, k in CONVOLUTIONS:
        size = size * args.image // 224
        x = given((batch, size, size, dim), jnp.bfloat16)
        if mosaic_depthwise.room(x.shape, x.dtype, k) > vmem * 2**20:
            continue
        name = f"{k} x {k}, {size} x {size} x {dim}"
        kernel, bias = (given(t, jnp.bfloat16) for t in ((k, k, dim), (dim,)))
        on_tpu = dict(residual=True, interpret=False)
        on_any = dict(residual=True, stride=1)
        for direction, ours, theirs, last in (
            ("forward", "depthwise", "_grouped_conv", bias),
            ("backward", "depthwise_vjp", "_grouped_conv_vjp", x),
        ):
            ours = partial(getattr(mosaic_depthwise, ours), **on_tpu)
            theirs = partial(getattr(depthwise, theirs), **on_any)
            count = partial(convolution_cycles, size=size)
            common = size, dim, f"depthwise{k}_{direction}", count
            yield name, direction, cycles(*common, ours, theirs, x, kernel, last)


if __name__ == "__main__":
    main()
