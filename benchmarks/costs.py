"""Costs that are the same on every machine, against those on record.

    python -m benchmarks.costs            # table; exit code 1 if one has changed
    python -m benchmarks.costs --write    # accept them: benchmarks/costs.json

Of a training step as JAX hands it to XLA: operations, a loop's counted once, and
instructions, those of a function counted once, by which the time to trace grows.
Of single operations with their gradients, compiled for CPU: temporaries.  A test holds
them to 2 % of the record.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import ops, timing
from benchmarks.compile import functions
from sparx_jax.ops import depthwise_conv, gelu, group_norm, layer_norm, ss2d

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 0.02
NETWORKS = "sparx_mamba_nano", "sparx_swin_nano"


def network_costs(name: str) -> dict[str, float]:
    """Of the training step of 2 images of 64 x 64."""
    step, args = functions(name, 64, 2)["step"]
    lowered = step.lower(*args)
    return {
        f"{name}, operations": lowered.cost_analysis()["flops"],
        f"{name}, instructions": lowered.as_text("hlo").count(" = "),
    }


def operation_costs() -> dict[str, float]:
    """Temporaries in MB of 2 images, at stage 2 of SparX-Mamba-T where it matters."""
    x = ops.draw(2, 28, 28, 384)
    scale = jnp.ones(384)
    cases = {
        "ss2d": (ss2d, ops.map_operands(2, 2, jnp.float32)),
        "depthwise 5 x 5": (depthwise_conv, (x, ops.draw(5, 5, 384))),
        "gelu": (gelu, (x,)),
        "group_norm": (lambda *args: group_norm(*args, eps=1e-6), (x, scale, scale)),
        "layer_norm": (lambda *args: layer_norm(*args, eps=1e-6), (x, scale, scale)),
    }
    return {
        f"{name}, temporaries": timing.temporaries(
            jax.jit(ops.with_gradient(function)), *args
        )
        for name, (function, args) in cases.items()
    }


def changed(found: dict[str, float], record: dict[str, float]) -> list[str]:
    """The names of those that are not within the tolerance."""
    return [
        name
        for name, cost in found.items()
        if abs(cost - record.get(name, -1.0)) > TOLERANCE * abs(cost)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = operation_costs()
    for name in NETWORKS:
        found |= network_costs(name)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    different = changed(found, record)
    for name, cost in found.items():
        mark = "  changed" if name in different else ""
        print(f"{name:32}{cost:16,.2f}{record.get(name, float('nan')):16,.2f}{mark}")
    if args.write:
        record = {"jax": jax.__version__} | found
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    elif different:
        sys.exit(1)


if __name__ == "__main__":
    main()
