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
from functools import partial
from pathlib import Path

STAGES = [(56, 192, 6), (28, 384, 12), (14, 640, 20), (7, 1024, 32)]


def bundles(folder, kind):
    """Instruction bundles of a kernel by the depth of their loop."""
    files = Path(folder).glob(f"*four_scans_{kind}*final_bundles.txt")
    newest = max((f for f in files if "schedule" not in f.name), key=os.path.getmtime)
    depths = re.findall(
        r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}:)?\s*:?\s*(>*)\s*\{",
        newest.read_text(),
        re.M,
    )
    return [sum(len(d) == depth for d in depths) for depth in range(4)]


def kernel_cycles(folder, kind, size):
    """Of one program: a loop over programs, in it over lines, in it over pixels."""
    _, program, line, pixel = bundles(folder, kind)
    unroll = max(u for u in range(1, 9) if size % u == 0)
    return program + size * line + size * (size // unroll) * pixel


def main():
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=128, help="pictures a chip")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Before JAX is imported.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        rows = measure(args.topology, args.batch, folder)
    if args.out:
        Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1))


def measure(topology, batch, folder):
    """A row for each stage."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparx_jax import chips
    from sparx_jax.ops import ss2d

    devices, _ = chips.find_devices(topology)
    given = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0]))

    @jax.jit
    def gradient(grad, *operands):
        y, vjp = jax.vjp(partial(ss2d, method="mosaic_tpu"), *operands)
        return y, vjp(grad)

    rows = []
    print("| stage of T | forward | backward |\n|---|---|---|")
    for size, dim, rank in STAGES:
        x = given((batch, size, size, dim), jnp.bfloat16)
        shapes = (4, dim, rank + 2), (4, rank, dim), (4, dim), (4, dim, 1), (4, dim)
        weights = (given(shape, jnp.float32) for shape in shapes)
        gradient.lower(x, x, *weights).compile()
        row = {"stage": f"{size} x {size} x {dim}"}
        for kind in ("forward", "backward"):
            row[kind] = kernel_cycles(folder, kind, size) / (4 * size * size)
        print("| {stage} | {forward:.1f} | {backward:.1f} |".format(**row), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
