"""How a token mixer's cost grows with the image, at stage 1 of SparX-Mamba-T.

    python -m benchmarks.scaling --out=scaling.json       # one CPU core, six minutes
    python -m benchmarks.scaling --quick                  # two sizes, measured once

The map has a quarter of the image's edge.  SS2D is the operation alone on 192
channels; both attentions are of Swin's 96 channels and 3 heads, with the projections to
query, key and value and of the output.  1.00 a pixel: the cost is linear in pixels.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from benchmarks.ops import draw, map_operands, with_gradient
from sparx_jax.layers.window_attention import WindowAttention
from sparx_jax.ops import ss2d
from sparx_jax.training.step import compiler_options

SIZES = (224, 384, 512, 768, 1024)
BATCHES = (1, 2, 4, 8)
DIM, HEADS, WINDOW = 96, 3, 7
ROOM = 2 * 2**30  # bytes, of the scores of all heads
KINDS = {"forward": lambda f: f, "gradient": with_gradient}


def scan_mixer(side: int, batch: int = 1):
    """SS2D and its operands."""
    weights = map_operands(1, 1, jnp.dtype("float32"))[1:]
    return ss2d, (draw(batch, side, side, 2 * DIM), *weights)


def window_mixer(side: int):
    """Swin's attention.

    Shifted, so that it has a mask at every size: elsewhere only padding asks for one.
    """
    module = WindowAttention(
        DIM,
        head_dim=DIM // HEADS,
        window=WINDOW,
        shifted=True,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graph, weights = nnx.split(module)

    def attend(x, qkv, weights):
        return nnx.merge(graph, weights)(x @ qkv)

    return attend, (draw(1, side, side, DIM), draw(DIM, 3 * DIM) * DIM**-0.5, weights)


def plain_mixer(side: int):
    """Attention of every pixel to every other; None where the scores need too much."""
    tokens = side * side
    if HEADS * tokens**2 * 4 > ROOM:
        return None

    def attend(x, qkv, out):
        q, k, v = (t.reshape(1, tokens, HEADS, -1) for t in jnp.split(x @ qkv, 3, -1))
        return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ out

    weights = draw(DIM, 3 * DIM) * DIM**-0.5, draw(DIM, DIM) * DIM**-0.5
    return attend, (draw(1, tokens, DIM), *weights)


MIXERS = {
    "SS2D": scan_mixer,
    "window attention": window_mixer,
    "plain attention": plain_mixer,
}


def measure(cases: dict, rounds: int) -> dict:
    """Milliseconds and MB of each case, forward and with the gradient.

    All cases take turns, so that a slower minute of the machine bends no curve.
    """
    options = compiler_options(jax.default_backend())
    wrapped = {
        (name, kind): (jax.jit(wrap(function), compiler_options=options), args)
        for name, (function, args) in cases.items()
        for kind, wrap in KINDS.items()
    }
    calls = {key: partial(f, *args) for key, (f, args) in wrapped.items()}
    times = timing.clock(calls, rounds=rounds)
    found = {name: {} for name in cases}
    for (name, kind), (f, args) in wrapped.items():
        memory = timing.temporaries(f, *args)
        found[name][kind] = {"ms": times[name, kind], "MB": memory}
    return found


def add_growth(row: dict, first: dict, count: str) -> None:
    """Adds the cost for each of `count`, pixels or images, relative to `first`."""
    more = row[count] / first[count]
    for kind in KINDS:
        now, then = row[kind], first[kind]
        now["ms growth"] = now["ms"].median / then["ms"].median / more
        now["MB growth"] = now["MB"] / then["MB"] / more


def size_rows(sizes, rounds: int):
    """A row for each mixer and size of the image, without costs where no room."""
    for mixer, make in MIXERS.items():
        cases = {image: case for image in sizes if (case := make(image // 4))}
        costs = measure(cases, rounds)
        rows = [
            {"mixer": mixer, "image": image, "pixels": image**2} | costs.get(image, {})
            for image in sizes
        ]
        for row in rows:
            if row["image"] in costs:
                add_growth(row, rows[0], "pixels")
            yield row


def batch_rows(rounds: int):
    """A row for each batch of SS2D at 224 pixels."""
    costs = measure({batch: scan_mixer(56, batch) for batch in BATCHES}, rounds)
    rows = [{"batch": batch} | costs[batch] for batch in BATCHES]
    for row in rows:
        add_growth(row, rows[0], "batch")
        for kind in KINDS:
            found = row[kind]
            found["ms an image"] = found["ms"].median / row["batch"]
            found["MB an image"] = found["MB"] / row["batch"]
        yield row


def show(name: str, row: dict) -> None:
    """Both kinds, on a line each."""
    if "forward" not in row:
        print(f"{name:24}no room", flush=True)
        return
    for kind in KINDS:
        found = row[kind]
        ms = found["ms"]
        spread = f"({ms.least:.1f}-{ms.most:.1f})"
        costs = (ms.median, found["MB"])
        if "batch" in row:
            costs = (found["ms an image"], found["MB an image"])
        print(
            f"{name if kind == 'forward' else '':24}{kind:9}{costs[0]:9.1f} {spread:18}"
            f"{found['ms growth']:5.2f}{costs[1]:9.1f}{found['MB growth']:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    timing.pin()
    sizes, rounds = (SIZES[:2], 1) if args.quick else (SIZES, 5)
    found = timing.conditions() | {"dtype": "float32", "rows": [], "batches": []}
    print(", ".join(f"{k} {v}" for k, v in found.items() if isinstance(v, str)))

    def add(part, name, row):
        show(name, row)
        found[part].append(row)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))

    heading = f"{'ms':>9} {'(least-most)':18}{'x':>5}{'MB':>9}{'x':>7}"
    print(f"x: of one pixel, relative to 224 pixels a side\n{'':33}{heading}")
    for row in size_rows(sizes, rounds):
        add("rows", f"{row['mixer']}, {row['image']}", row)
    print("\nSS2D at 224, of one image; least and most of the batch; x: to batch 1")
    for row in batch_rows(rounds):
        add("batches", f"batch {row['batch']}", row)


if __name__ == "__main__":
    main()
