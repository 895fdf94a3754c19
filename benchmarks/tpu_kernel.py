"""Static cycles of SS2D on a TPU that is not there: python -m benchmarks.tpu_kernel

Compiles the four scans of each stage of SparX-Mamba-T at 224 pixels, forward and
gradient, by the kernel and by the parallel prefix.  Cycles are the compiler's: of XLA's
operations its estimates, of the kernel the instruction bundles of its final schedule,
those of a loop as often as it runs.  Neither knows of waiting for memory.

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
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        rows = measure(args.topology, args.batch, folder)
    print(
        "| stage | | kernel, Mcycles | a register | prefix, Mcycles | prefix / kernel |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = row["prefix"] / row["kernel"]
        print(
            f"| {row['stage']} | {row['what']} | {row['kernel'] / 1e6:.2f} | "
            f"{row['register']:.1f} | {row['prefix'] / 1e6:.2f} | {ratio:.1f} |"
        )
    if args.out:
        Path(args.out).write_text(json.dumps(vars(args) | {"rows": rows}, indent=1))


def measure(topology, batch, folder):
    """A row for each stage, forward and gradient."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparx_jax import chips
    from sparx_jax.ops import ss2d

    devices, _ = chips.find_devices(topology)
    place = SingleDeviceSharding(devices[0])

    def gradient(method, *operands):
        y, vjp = jax.vjp(partial(ss2d, method=method), *operands[:-1])
        return y, vjp(operands[-1])

    def estimated(method, what, operands):
        function = gradient if what == "gradient" else lambda m, *o: ss2d(*o, method=m)
        used = operands if what == "gradient" else operands[:-1]
        text = jax.jit(partial(function, method)).lower(*used).compile().as_text()
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))

    rows = []
    for size, dim, rank in STAGES:
        given = partial(jax.ShapeDtypeStruct, sharding=place)
        x = given((batch, size, size, dim), jnp.bfloat16)
        shapes = (4, dim, rank + 2), (4, rank, dim), (4, dim), (4, dim, 1), (4, dim)
        operands = x, *(given(shape, jnp.float32) for shape in shapes), x
        registers = -(-batch // 8) * -(-dim // 128)
        total = 0.0
        for what, kind in (("forward", "forward"), ("gradient", "backward")):
            around = estimated("mosaic_tpu", what, operands)
            cycles = kernel_cycles(folder, kind, size)
            total += registers * cycles
            rows.append(
                {
                    "stage": f"{size} x {size} x {dim}",
                    "what": what,
                    "kernel": total + around,
                    "register": cycles / (4 * size * size),
                    "prefix": estimated("associative", what, operands),
                }
            )
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
