"""Images a second of whole networks: python -m benchmarks.model

    python -m benchmarks.model --image=224 --batch=2                  # on CPU, one core
    python -m benchmarks.model --batch=128 --dtype=bfloat16           # on a GPU
    python -m benchmarks.model --methods=auto,associative             # ratios of scans
    python -m benchmarks.model --methods=auto,naive                   # and to a port

One device, the real training step: mixup and cutmix, gradient, AdamW, moving average.
Data are random and stay on the device.  `--peer` takes the JSON of peer.py, of the same
machine, and prints the ratios to it.  On a CPU `--peer_python`, an interpreter with
PyTorch, timm and einops, runs the same network round by round in turn with ours: timm's
Swin-T, and the authors' SparX-Mamba-T, where `--peer_folder` is what peer.py takes.

`naive` is the network as a plain port of the authors' would compute it: four copies of
the map scanned by `associative_scan`, XLA's depthwise convolutions, `jax.nn.gelu`,
gradients all derived by JAX, and XLA's options as they are.  `share` is that of the
core's rate in a matrix product, compiled like our steps and measured in turn with them,
which multiply-adds of the network would need (in training three times the forward's).
"""

import argparse
import contextlib
import glob
import json
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.compile import set_up
from benchmarks.ops import naive_ss2d
from sparx_jax import summary
from sparx_jax.ops import norm
from sparx_jax.ops.depthwise import _grouped_conv
from sparx_jax.training.config import default_config
from sparx_jax.training.step import compile_eval_step, compiler_options

PEERS = {  # the options of peer.py for networks of the same name here
    "sparx_mamba_t": {
        "PyTorch, as released": ["--serve=sparx_mamba_t"],
        "PyTorch": ["--serve=sparx_mamba_t", "--product"],
        "PyTorch, NHWC": [
            "--serve=sparx_mamba_t",
            "--product",
            "--layout=channels_last",
        ],
    },
    "swin_t": {"PyTorch": ["--serve=swin_tiny_patch4_window7_224"]},
}


# Of the matrices whose product tells a core's rate. That of 2048 rows 8192 bytes apart
# is half of it: they compete for one place of the cache.
SIDE = 2000


@contextlib.contextmanager
def naive_port():
    """What is traced meanwhile calls what a plain port would."""

    def depthwise(x, kernel, bias=None, *, stride=1, residual=False):
        bias = None if bias is None else bias.astype(x.dtype)
        settings = dict(stride=stride, residual=residual)
        return _grouped_conv(x, kernel.astype(x.dtype), bias, **settings)

    def ss2d(*operands, method):
        return naive_ss2d(*operands)

    gelu = partial(jax.nn.gelu, approximate=False)
    ours = {
        "ops.ss2d": ss2d,
        "ops.depthwise_conv": depthwise,
        "layers.aggregator.gelu": gelu,
        "layers.mlp.gelu": gelu,
        "layers.patch.gelu": gelu,
        "ops.norm._normalize": norm._forward,
        "ops.matmul._matmul": lambda x, w, precision: jnp.matmul(x, w),
        "training.step.compiler_options": lambda platform: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in ours.items():
            stack.enter_context(mock.patch(f"sparx_jax.{name}", function))
        yield


class Network:
    """A network on one device with a batch, and its two steps."""

    def __init__(self, name, method, args):
        naive = method == "naive"
        with naive_port() if naive else contextlib.nullcontext():
            self._make(name, "auto" if naive else method, args)

    def _make(self, name, method, args):
        settings = default_config()
        settings.model.update(
            name=name, dtype=args.dtype, scan_method=method, remat=args.remat
        )
        settings.model.drop_path_rate = 0.2
        settings.data.image_size, settings.batch_size = args.image, args.batch
        settings.mixing.mixup, settings.mixing.cutmix = 0.8, 1.0
        config, network, self.state, train, mesh = set_up(settings)
        # The step reuses the memory of its state.
        self.weights = jax.tree.map(jnp.copy, self.state.weights)
        rng, n = np.random.default_rng(0), args.batch
        self.batch = jax.device_put({
            "image": rng.integers(0, 256, (n, args.image, args.image, 3), np.uint8),
            "label": rng.integers(0, 1000, n, np.int32),
            "weight": np.ones(n, np.float32),
            "index": np.arange(n, dtype=np.int32),
        })  # fmt: skip
        pixels = (args.image, args.image)
        self.macs = args.batch * summary.macs(config.model, pixels)
        evaluate = compile_eval_step(network, config, self.weights, mesh)
        self._seed = jnp.uint32(0)
        self._lowered = {
            "evaluate": evaluate.lower(self.weights, self.batch),
            "train": train.lower(self._seed, self.state, self.batch),
        }

    def compile(self, kind):
        """The step, a function without arguments, and MB of its temporaries."""
        step = self._lowered[kind].compile()

        def train():
            self.state, metrics = step(self._seed, self.state, self.batch)
            return metrics

        evaluate = partial(step, self.weights, self.batch)
        memory = step.memory_analysis().temp_size_in_bytes / 1e6
        return {"evaluate": evaluate, "train": train}[kind], memory


def measure(name, methods, args):
    """The rows of one network: evaluation and training by each scan method."""
    networks = {method: Network(name, method, args) for method in methods}
    peers = start_peers(name, args)
    for kind in "evaluate", "train":
        calls, compiling, memory = {}, {}, {}
        for method, network in networks.items():
            start = time.perf_counter()
            calls[method], memory[method] = network.compile(kind)
            compiling[method] = time.perf_counter() - start
        macs = networks[methods[0]].macs * {"evaluate": 1, "train": 3}[kind]
        if timing.on_cpu():
            options = compiler_options(jax.default_backend())
            matrix = jnp.ones((SIDE, SIDE))
            product = jax.jit(jnp.matmul, compiler_options=options)
            calls["product"] = partial(product, matrix, matrix)
        calls |= {peer: timing.Peer(process, kind) for peer, process in peers.items()}
        times = timing.clock(calls, rounds=args.rounds, seconds=args.seconds)
        product = times.pop("product", None)
        for method, found in times.items():
            row = {"model": name, "kind": kind, "method": method, "ms": found}
            row["images_per_s"] = args.batch / found.median * 1e3
            row["ratio"] = found.median / times[methods[0]].median
            row["compile_s"] = compiling.get(method)
            row["temporaries_mb"] = memory.get(method)
            if product:
                row["share"] = macs / SIDE**3 * product.median / found.median
            if held := jax.devices()[0].memory_stats():
                row["peak_gib"] = held["peak_bytes_in_use"] / 2**30
            if args.kernels:
                row["kernels"] = kernels(calls[method])
            yield row
    for process in peers.values():
        process.close()


def start_peers(name, args):
    """Processes that run the network in PyTorch, on the core of this one."""
    if not args.peer_python:
        return {}
    program = str(Path(__file__).parent / "peer.py")
    batch = "--device=cpu", f"--batch={args.batch}", f"--image={args.image}"
    folder = [str(args.peer_folder)] if name.startswith("sparx") else []
    return {
        peer: timing.Process(args.peer_python, program, *folder, *batch, *options)
        for peer, options in PEERS.get(name, {}).items()
    }


def kernels(call, number=3):
    """Milliseconds of each kernel of an accelerator in one call, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for _ in range(number)])
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(file).planes)
    total = Counter()
    for plane in planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                total[event.name] += event.duration_ns / number / 1e6
    return dict(total.most_common())


def show(row, peer):
    found = row["ms"]
    print(
        f"{row['model']:16}{row['kind']:10}{row['method']:22}"
        f"{row['images_per_s']:9.1f} images/s {found.median:9.2f} ms "
        f"({found.least:.2f}-{found.most:.2f}) {row['ratio']:6.2f} x time"
        + (f", {row['share']:.0%} of the matrix rate" if "share" in row else "")
        + (f", compiled in {row['compile_s']:.0f} s" if row["compile_s"] else "")
        + (f", {row['temporaries_mb']:.0f} MB" if row["temporaries_mb"] else "")
        + (f", {row['peak_gib']:.1f} GiB" if "peak_gib" in row else "")
        + (f", {row['images_per_s'] / peer:.2f} x the peer" if peer else ""),
        flush=True,
    )
    for name, ms in list(row.get("kernels", {}).items())[:20]:
        print(f"{ms:12.3f} ms  {name[:80]}")


def peer_speed(file, kind):
    """The peer's best of all formats that it was measured in."""
    if file is None or not file.exists():
        return None
    word = {"evaluate": "inference", "train": "training"}[kind]
    rows = json.loads(file.read_text())
    speeds = [
        row["images_per_s"]
        for name, row in rows.items()
        if name.startswith(word) and "images_per_s" in row
    ]
    return max(speeds, default=None)  # what failed there has no speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="sparx_mamba_t")
    parser.add_argument("--methods", default="auto", help="scan methods, first is 1 x")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="at least, a round")
    parser.add_argument("--kernels", action="store_true", help="of a GPU, by time")
    parser.add_argument("--peer", type=Path, help="JSON of peer.py on this GPU")
    parser.add_argument("--peer_python", help="on a CPU, an interpreter with PyTorch")
    parser.add_argument("--peer_folder", type=Path, help="the authors' files")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.peer_python and not args.peer_folder and "sparx_mamba_t" in args.models:
        parser.error("PyTorch's SparX-Mamba-T is in --peer_folder, which is missing")
    timing.pin()
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    found = timing.conditions() | settings | {"rows": []}
    print(", ".join(f"{k} {v}" for k, v in found.items() if k != "rows"))
    for name in args.models.split(","):
        for row in measure(name, args.methods.split(","), args):
            show(row, peer_speed(args.peer, row["kind"]))
            found["rows"].append(row)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
