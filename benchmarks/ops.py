"""Our operations against XLA's own, at the four stages of SparX-Mamba-T.

    python -m benchmarks.ops --out=ops.json               # 8 images, float32, on CPU
    python -m benchmarks.ops --batch=128 --dtype=bfloat16 --only=scan,ss2d  # on a GPU

Ratios are times of the peer by ours, of the same run; the error is ours, forward, of
one image against the peer in float32.  Peers: the same four scans by
`associative_scan`; a port of the authors' SS2D that keeps four copies of the map; XLA's
grouped convolution.  All are compiled with the options of the training step.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from sparx_jax.ops import depthwise_conv, gelu, ss2d, triton_gpu
from sparx_jax.ops.depthwise import _grouped_conv
from sparx_jax.ops.ss2d import aligned, by_sequences, four_scans
from sparx_jax.training.step import compiler_options

# Of a stage: pixels a side, channels of the mixer, inputs of its step sizes.
STAGES = {1: (56, 192, 6), 2: (28, 384, 12), 3: (14, 640, 20), 4: (7, 1024, 32)}
# Pixels a side, channels, filter: of the mixer and of the MLP, by stage.
FILTERS = [(56, 192, 5), (56, 384, 3), (28, 384, 5), (28, 768, 3)]
FILTERS += [(14, 640, 5), (14, 1280, 3), (7, 1024, 5), (7, 2048, 3)]


def draw(*shape: int, dtype=jnp.float32) -> jax.Array:
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)


def map_operands(stage: int, batch: int, dtype: jnp.dtype) -> tuple:
    size, d, r = STAGES[stage]
    return (
        draw(batch, size, size, d, dtype=dtype),
        draw(4, d, r + 2) * d**-0.5,
        draw(4, r, d) * r**-0.5,
        jnp.log(jnp.expm1(jnp.logspace(-3, -1, 4 * d))).reshape(4, d),
        -jnp.ones((4, d, 1)),
        jnp.ones((4, d)),
    )


def scan_operands(stage: int, batch: int, dtype: jnp.dtype) -> tuple:
    """What is left of them when the first projection is made."""
    x, x_proj, dt_proj, *others = map_operands(stage, batch, dtype)
    x_proj, dt_proj = (w.astype(dtype) for w in (x_proj, dt_proj))
    x_proj, dt_proj = aligned("triton_gpu", x_proj, dt_proj, 1)
    p = jnp.einsum("bhwd,kde->bhwke", x, x_proj)
    return x, p.reshape(*x.shape[:3], -1), dt_proj, *others


def naive_ss2d(x, x_proj, dt_proj, dt_bias, a, skip):
    """As the authors' PyTorch: four copies of the map, all projected, all scanned."""
    batch, height, width, d = x.shape
    rows = x.reshape(batch, -1, d)
    columns = x.swapaxes(1, 2).reshape(batch, -1, d)
    copies = jnp.stack([rows, columns, rows[:, ::-1], columns[:, ::-1]])
    r = dt_proj.shape[1]
    p = jnp.einsum("kbld,kde->kble", copies, x_proj.astype(x.dtype))
    dt = jnp.einsum("kblr,krd->kbld", p[..., :r], dt_proj.astype(x.dtype))
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    delta = jax.nn.softplus(f32(dt) + dt_bias[:, None, None])
    decay = jnp.exp(delta * a[:, None, None, :, 0])
    drive = delta * f32(copies) * f32(p[..., r : r + 1])

    def combine(left, right):
        return right[0] * left[0], right[0] * left[1] + right[1]

    _, h = lax.associative_scan(combine, (decay, drive), axis=2)
    y = h * f32(p[..., r + 1 :]) + f32(copies) * skip[:, None, None]
    by_row, by_column = y[0] + y[2, :, ::-1], y[1] + y[3, :, ::-1]
    by_column = by_column.reshape(batch, width, height, d).swapaxes(1, 2)
    return (by_row.reshape(x.shape) + by_column).astype(x.dtype)


def with_gradient(function):
    """The value and all gradients, for a gradient of the value itself."""

    def both(*args):
        y, vjp = jax.vjp(function, *args)
        return y, *vjp(y)

    return both


def cases(batch: int, dtype: jnp.dtype, only: list[str]):
    """Name, ours, the peer, operands."""
    gpu = jax.default_backend() == "gpu"
    scans = triton_gpu.four_scans if gpu else partial(four_scans, "auto")
    for stage in STAGES:
        if "scan" in only:
            yield (
                f"scans, stage {stage}",
                scans,
                partial(by_sequences, "associative"),
                scan_operands(stage, batch, dtype),
            )
        if "ss2d" in only:
            yield (
                f"SS2D, stage {stage}",
                ss2d,
                naive_ss2d,
                map_operands(stage, batch, dtype),
            )
    for size, channels, k in FILTERS if "depthwise" in only else ():
        args = draw(batch, size, size, channels, dtype=dtype), draw(k, k, channels)
        args = args[0], args[1].astype(dtype)
        name = f"depthwise {k} x {k}, {size} x {size} x {channels}"
        yield name, depthwise_conv, partial(_grouped_conv, stride=1), args
    if "gelu" in only:
        peer = partial(jax.nn.gelu, approximate=False)
        yield (
            "gelu, 56 x 56 x 384",
            gelu,
            peer,
            (draw(batch, 56, 56, 384, dtype=dtype),),
        )


def compare(name, ours, peer, args, rounds):
    """The row of one operation, forward and with its gradient."""
    row = {"name": name}
    for kind, wrap in {"forward": lambda f: f, "gradient": with_gradient}.items():
        both = {"ours": wrap(ours), "peer": wrap(peer)}
        options = compiler_options(jax.default_backend())
        compiled = {k: jax.jit(f, compiler_options=options) for k, f in both.items()}
        calls = {key: partial(f, *args) for key, f in compiled.items()}
        try:
            times = timing.clock(calls, rounds=rounds)
            ratio = times["peer"].median / times["ours"].median
        except jax.errors.JaxRuntimeError as error:  # a peer may need too much memory
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            times, ratio = timing.clock({"ours": calls["ours"]}, rounds=rounds), None
        row[kind] = (
            times
            | {"ratio": ratio}
            | {f"{key} MB": timing.temporaries(f, *args) for key, f in compiled.items()}
        )
    row["error"] = error_of(ours, peer, args)
    return row


def error_of(ours, peer, args):
    """Of one image, against the peer in float32: root mean squares' ratio."""
    first = [t[:1] if t.ndim == 4 else t for t in args]  # weights have 2 or 3 axes
    want = jax.jit(peer)(*(t.astype(jnp.float32) for t in first))
    return float(jnp.linalg.norm(jax.jit(ours)(*first) - want) / jnp.linalg.norm(want))


def show(row):
    """Both kinds, on a line each."""
    for kind in "forward", "gradient":
        found = row[kind]
        ours = found["ours"]
        peer = f"{found['peer'].median:9.2f}" if "peer" in found else "  no room"
        ratio = f"{found['ratio']:7.2f}" if found["ratio"] else "      -"
        print(
            f"{row['name'] if kind == 'forward' else '':32}{kind:9}"
            f"{ours.median:9.2f} ({ours.least:.2f}-{ours.most:.2f}){peer}{ratio} x"
            f"{found['ours MB']:9.0f}{found['peer MB']:9.0f}"
            + (f"{row['error']:10.1e}" if kind == "forward" else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="scan,ss2d,depthwise,gelu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    timing.pin()
    found = timing.conditions() | {"batch": args.batch, "dtype": args.dtype, "rows": []}
    print(", ".join(f"{k} {v}" for k, v in found.items() if k != "rows"))
    heads = f"{'peer':>9}{'ratio':>8}{'MB':>10}{'peer':>9}{'error':>10}"
    print(f"{'':41}{'ms':>9} (least-most){heads}")
    for case in cases(args.batch, jnp.dtype(args.dtype), args.only.split(",")):
        found["rows"].append(compare(*case, args.rounds))
        show(found["rows"][-1])
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
