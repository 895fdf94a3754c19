"""What bounds SparX-Mamba on a TPU, stage by stage: python -m benchmarks.roofline

    python -m benchmarks.roofline --chip=v5e --predicted t.json,s.json,b.json

For every stage: operations of the matrix units, cycles of the vector units in our
kernels, and the bytes that must move if each product, convolution and scan reads its
operands and writes its results once and all else is free.  An operation takes as long
as the slowest of the three, and the sum is a ceiling that no compiler reaches.  The
gradient has twice the operations of products, the cycles of the backward kernels, and
twice the bytes.  Maps that have no room in VMEM (v4's first stage) count as if they
had.  `--predicted` takes what sparx_jax.compile wrote for the same chip.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparx_jax import models, summary
from sparx_jax.chips import CHIPS
from sparx_jax.ops.tpu_cycles import static_cycles

PARTS = "stem", "stage 1", "stage 2", "stage 3", "stage 4"


class Operation(NamedTuple):
    """Of one batch, forward."""

    kind: str
    """four_scans, depthwise, convolution (of all channels), or dot_general."""
    shape: tuple[int, ...]
    """Of the result."""
    macs: int
    """Of matrix units."""
    moved: int
    """Bytes."""
    kernel: str
    """Its name without the direction, if it is one."""


def operations(config: models.ModelConfig, batch: int, side: int) -> list[Operation]:
    """All products, convolutions and scans of a forward pass, in order."""
    config = config.replace(scan_method="loop", dtype="bfloat16")
    model = nnx.eval_shape(lambda: models.build(config, seed=0))
    graphdef, arrays = nnx.split(model)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    forward = lambda arrays, images: nnx.merge(graphdef, arrays)(images)  # noqa: E731
    found = []
    _collect(jax.make_jaxpr(forward)(arrays, images).jaxpr, "", found)
    return found


def _collect(jaxpr, scopes, found):
    for eqn in jaxpr.eqns:
        inside = f"{scopes}/{eqn.source_info.name_stack}"
        kind, kernel, macs = eqn.primitive.name, "", 0
        if "four_scans" in inside:
            kind = kernel = "four_scans"
            x, _, steps = (v.aval for v in eqn.invars[:3])
            macs = 4 * x.size * steps.shape[1]  # the step sizes, in the kernel
        elif kind == "dot_general":
            macs = summary.PRODUCTS[kind](eqn)
        elif kind == "conv_general_dilated":
            size, groups = eqn.invars[1].aval.shape, eqn.params["feature_group_count"]
            taps = size[eqn.params["dimension_numbers"].rhs_spec[2]]
            strided = max(eqn.params["window_strides"]) > 1
            kind = "depthwise" if groups > 1 else "convolution"
            if groups > 1 and taps in (3, 5) and not strided:
                kernel = f"depthwise{taps}"
            else:
                macs = summary.PRODUCTS["conv_general_dilated"](eqn)
        else:
            for jaxpr in summary.inner_jaxprs(eqn.params):
                _collect(jaxpr, inside, found)
            continue
        avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        moved = sum(a.size * min(a.dtype.itemsize, 2) for a in avals)
        found.append(Operation(kind, eqn.outvars[0].aval.shape, macs, moved, kernel))


def by_part(found: list[Operation], side: int) -> dict[str, list[Operation]]:
    """By stem and stages, which begin with a convolution of all channels.

    The head is with the last stage.
    """
    parts, part = defaultdict(list), 0
    sides = [side // 8, side // 16, side // 32]
    for operation in found:
        if part == 0 and operation.kernel:
            part = 1
        if operation.kind == "convolution" and operation.shape[1] in sides:
            part = 2 + sides.index(operation.shape[1])
        parts[PARTS[part]].append(operation)
    return parts


def bounds(operation: Operation, chip, kind: str) -> tuple[float, float, float]:
    """Seconds of the matrix units, the vector units in our kernels, and the memory."""
    times = 1 if kind == "inference" else 3
    cycles = 0.0
    if operation.kernel:
        b, h, w, c = operation.shape
        for direction in ("forward", "backward")[: 1 + (times > 1)]:
            name = f"{operation.kernel}_{direction}"
            cycles += static_cycles(f"%{name} = bf16[{h},{w},{b},{c}]", chip.kind)
    return (
        times * 2 * operation.macs / chip.flops,
        cycles / chip.clock,
        times * operation.moved / chip.bandwidth,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5e", choices=("v4", "v5e", "v5p"))
    parser.add_argument("--models", default="sparx_mamba_t,sparx_mamba_s,sparx_mamba_b")
    parser.add_argument("--batch", type=int, default=128, help="images a chip")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--predicted", default="", help="files of sparx_jax.compile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chip, rows = CHIPS[args.chip], []
    print("| model, part | GMACs | vector Mcycles | GB | bound, ms | by |")
    print("|---" * 6 + "|")
    for name in args.models.split(","):
        found = operations(models.model_config(name), args.batch, args.image)
        parts = by_part(found, args.image)
        for kind in "inference", "training":
            total = 0.0
            for part, inside in parts.items():
                each = [bounds(operation, chip, kind) for operation in inside]
                sums = [1e3 * sum(column) for column in zip(*each, strict=True)]
                bound = 1e3 * sum(map(max, each))
                total += bound
                row = {
                    "model": name, "kind": kind, "part": part,
                    "gmacs": sums[0] * chip.flops / 2e12,
                    "mcycles": sums[1] * chip.clock / 1e9,
                    "gb": sums[2] * chip.bandwidth / 1e12,
                    "ms": bound,
                    "by": ("matrix", "vector", "memory")[sums.index(max(sums))],
                }  # fmt: skip
                rows.append(row)
                print("| {model}, {kind}, {part} | {gmacs:,.0f} | {mcycles:.1f} | "
                      "{gb:.1f} | {ms:.1f} | {by} |".format(**row))  # fmt: skip
            print(f"| **{name}, {kind}** | | | | **{total:.1f}** | "
                  f"**{1e3 * args.batch / total:,.0f} images/s a chip** |")  # fmt: skip
            rows.append({"model": name, "kind": kind, "part": "all", "ms": total})
    for file in filter(None, args.predicted.split(",")):
        show_predicted(json.loads(Path(file).read_text()), rows)
    if args.out:
        args.out.write_text(json.dumps(vars(args) | {"rows": rows}, default=str))


def show_predicted(compiled, rows):
    """The compiled program's predicted time beside the ceiling."""
    for steps in compiled["steps"].values():
        for name, step in steps.items():
            kind = {"train": "training", "eval": "inference"}.get(name)
            ceiling = [
                row["ms"]
                for row in rows
                if (row["model"], row["kind"]) == (compiled["model"], kind)
                and row["part"] == "all"
            ]
            if kind and ceiling and "predicted_s" in step:
                ms = 1e3 * step["predicted_s"]["schedule"]
                print(
                    f"{compiled['model']}, {kind}: {ms:.0f} ms predicted of the "
                    f"compiled step, {ceiling[0] / ms:.0%} of it the bound"
                )


if __name__ == "__main__":
    main()
