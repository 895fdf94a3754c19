"""Static cycles of SS2D on a TPU that is not there: python -m benchmarks.tpu_kernel

Compiles the kernels of the four scans for each stage of SparX-Mamba-T at 224 pixels and
counts the instruction bundles of the compiler's final schedule, those of a loop as
often as it runs.  They are given for one direction and one register of 8 pictures and
128 channels.  Waiting for memory is not in them.

Needs libtpu: `make libtpu`, then PYTHONPATH=.cache/libtpu.
"""

import argparse
import json
import os
import re
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

STAGES = [(192, 6), (384, 12), (640, 20), (1024, 32)]


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


def kernel_cycles(folder, kind, size, plan):
    """Of all strips and directions of 8 pictures and 128 channels.

    In a program there are loops over lines and one over directions, in which is one
    over pieces, the largest; for one direction the compiler may drop the outer one.
    """
    files = Path(folder).glob(f"*four_scans_{kind}*final_bundles.txt")
    texts = [f.read_text() for f in files if "schedule" not in f.name]
    assert len(texts) == len(plan), f"{len(texts)} kernels for {len(plan)} calls"
    total = 0
    for text in texts:
        call = plan[0]  # of a square map all are alike
        ways = sum(map(len, call.ways))
        (_, program), *inner = loops(text)
        pieces = max(count for _, count in inner)
        total += -(-size // call.lines) * program
        for (depth, count), (following, _) in pairwise([*inner, (0, 0)]):
            if count == pieces:
                times = ways * size * size // call.pieces[0]
            else:
                times = ways if following > depth else size
            total += times * count
    return total


def main():
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=128, help="pictures a chip")
    parser.add_argument("--image", type=int, default=224, help="pixels a side")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Before JAX is imported.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        rows = measure(args.topology, args.batch, args.image, folder)
    if args.out:
        Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1))


def measure(topology, batch, image, folder):
    """A row for each stage."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparx_jax import chips
    from sparx_jax.ops import mosaic_tpu

    devices, _ = chips.find_devices(topology)
    given = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0]))
    vmem = mosaic_tpu.VMEM[devices[0].device_kind]

    @jax.jit
    def gradient(grad, *operands):
        y, vjp = jax.vjp(partial(mosaic_tpu.four_scans, vmem=vmem), *operands)
        return y, vjp(grad)

    rows = []
    print(
        "| stage of T | strips | forward | backward | compiled in |\n"
        + "|---" * 5
        + "|"
    )
    for stage, (dim, rank) in enumerate(STAGES):
        size = image // 4 // 2**stage
        e = 4 * (rank + 2)
        plan = mosaic_tpu.calls(size, size, e, 1, jnp.dtype("bfloat16"), vmem)
        x, p = (given((batch, size, size, c), jnp.bfloat16) for c in (dim, e))
        shapes = (4, rank, dim), (4, dim), (4, dim, 1), (4, dim)
        weights = [given(shape, jnp.float32) for shape in shapes]
        for file in Path(folder).iterdir():
            file.unlink()
        start = time.perf_counter()
        gradient.lower(x, x, p, *weights).compile()
        row = {
            "stage": f"{size} x {size} x {dim}",
            "strips": -(-size // plan[0].lines),
            "seconds": time.perf_counter() - start,
        }
        for kind in ("forward", "backward"):
            cycles = kernel_cycles(folder, kind, size, plan)
            row[kind] = cycles / (4 * size * size)
        line = (
            "| {stage} | {strips} | {forward:.1f} | {backward:.1f} | {seconds:.0f} s |"
        )
        print(line.format(**row), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
