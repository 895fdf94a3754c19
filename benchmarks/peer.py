"""Times the authors' SparX-Mamba-T in PyTorch, or a network of timm; no JAX here.

    python benchmarks/peer.py FOLDER                    # on a GPU
    python benchmarks/peer.py FOLDER --device=cpu --serve=sparx_mamba_t

FOLDER holds the authors' sparx_mamba.py and csm_triton.py, and, where the module
selective_scan_cuda_oflex is not installed, a peer_extension.py whose load_extension()
returns it and a word on where it came from. On the CPU scan.cpp takes the place of the
CUDA scan (needs g++), in float32. `--serve` is what benchmarks.model talks to: it runs
as many steps as a line such as "training 3" says and answers "done".
"""

import argparse
import ctypes
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

DROP_PATH = 0.2  # of the authors' scripts/train_sparx_mamba_t.sh
SCAN_NAMES = "u delta A B C D bias".split()
STAGES = {192: 4, 384: 8, 640: 16, 1024: 32}  # d_inner of T: stride of its map
FORMATS = dict(default=torch.contiguous_format, channels_last=torch.channels_last)


def reference_scan(u, delta, a, b, c, d, bias) -> Tensor:
    """The recurrence, step by step, in the precision of a.

    u, delta (batch, K * D, L); a (K * D, N); b, c (batch, K, N, L); d, bias (K * D).
    """
    u, delta, b, c = (t.to(a.dtype) for t in (u, delta, b, c))
    b, c = (t.repeat_interleave(len(a) // t.shape[1], 1) for t in (b, c))
    dt = F.softplus(delta + bias[:, None])
    state = torch.zeros_like(a).expand(len(u), *a.shape)
    outputs = []
    for dt_t, dtu_t, b_t, c_t in zip(
        dt.unbind(-1), (dt * u).unbind(-1), b.unbind(-1), c.unbind(-1), strict=True
    ):
        state = (dt_t[..., None] * a).exp() * state + dtu_t[..., None] * b_t
        outputs.append((state * c_t).sum(-1))
    return torch.stack(outputs, -1) + d[:, None] * u


def compiled_extension() -> SimpleNamespace:
    """What the CUDA extension offers, for float32 on CPU and one state: scan.cpp."""
    source = Path(__file__).parent / "scan.cpp"
    flags = "-O3 -march=native -ffast-math -fno-associative-math -fopenmp-simd -shared"
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/scan.so"
        command = ["g++", *flags.split(), "-fPIC", str(source), "-o", file]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(file)
    tile = library.tile_steps()

    def call(function, inputs, others, batch, groups, width, length):
        tensors = [t.contiguous() for t in (*inputs, *others)]
        assert all(t.dtype == torch.float32 for t in tensors)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        function(*pointers, batch, groups, width, length)

    def sizes(u, b):
        return len(u), b.shape[1], u.shape[1] // b.shape[1], u.shape[2]

    def forward(u, delta, a, b, c, d, bias, *_):
        states = u.new_empty(*u.shape[:2], -(-u.shape[2] // tile))
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        inputs = u, delta, a, b, c, d, bias
        call(library.forward, inputs, (y, states), *sizes(u, b))
        return y, states

    def backward(u, delta, a, b, c, d, bias, dout, states, *_):
        inputs = u, delta, a, b, c, d, bias
        grads = [torch.zeros(t.shape) for t in inputs]
        call(library.backward, (*inputs, dout, states), grads, *sizes(u, b))
        return grads

    return SimpleNamespace(fwd=forward, bwd=backward)


class CrossScan(torch.autograd.Function):
    """`cross_scan`, whose gradient is `cross_merge`, as in the authors' kernels."""

    @staticmethod
    def forward(ctx, x):
        ctx.sides = x.shape[2:]
        return cross_scan(x)

    @staticmethod
    def backward(ctx, y):
        return cross_merge(y.unflatten(-1, ctx.sides)).unflatten(-1, ctx.sides)


class CrossMerge(torch.autograd.Function):
    """`cross_merge`, whose gradient is `cross_scan`."""

    @staticmethod
    def forward(ctx, y):
        ctx.sides = y.shape[3:]
        return cross_merge(y)

    @staticmethod
    def backward(ctx, x):
        return cross_scan(x.unflatten(-1, ctx.sides)).unflatten(-1, ctx.sides)


def cross_scan(x: Tensor) -> Tensor:
    """(batch, C, H, W) along rows, columns and both reversed: (batch, 4, C, L)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)


def cross_merge(y: Tensor) -> Tensor:
    """The sum of the four paths (batch, 4, C, H, W), in row order: (batch, C, L)."""
    height, width = y.shape[-2:]
    y = y.flatten(3)
    rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
    return rows + columns.unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


def load_peer(folder: Path, device: torch.device) -> tuple[ModuleType, str]:
    """The authors' module, and where its scan came from."""
    sys.path.insert(0, str(folder.resolve()))
    name, origin = "selective_scan_cuda_oflex", "installed"
    if device.type == "cpu":
        sys.modules[name], origin = compiled_extension(), "scan.cpp"
    else:
        try:
            importlib.import_module(name)
        except ImportError:
            extension = importlib.import_module("peer_extension")
            sys.modules[name], origin = extension.load_extension()
    for old, new in {"layers": "timm.layers", "registry": "timm.models"}.items():
        try:
            importlib.import_module(f"timm.models.{old}")
        except ImportError:  # the old places, which a newer timm may have dropped
            sys.modules[f"timm.models.{old}"] = importlib.import_module(new)
    peer = importlib.import_module("sparx_mamba")
    if device.type == "cpu":
        peer.CrossScanTriton, peer.CrossMergeTriton = CrossScan, CrossMerge
    return peer, origin


def scan_inputs(
    batch: int, inner: int, length: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Inputs of the scan as `forward_ssm` makes them, K = 4 paths and N = 1 state."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    tokens = (batch, 4 * inner, length), (batch, 4 * inner, length)
    u, delta = (random(*shape).to(dtype) for shape in tokens)
    b, c = (random(batch, 4, 1, length).to(dtype) for _ in range(2))
    a = -(0.5 * random(4 * inner, 1)).exp()
    inputs = [u, delta, a, b, c, random(4 * inner), random(4 * inner) - 3]
    return [t.requires_grad_() for t in inputs]


def run_scan(peer: ModuleType, inputs: list[Tensor]) -> Tensor:
    return peer.SelectiveScanOflex.apply(*inputs, True, None, None, True)


def check_scan(peer: ModuleType, device: torch.device) -> dict[str, dict[str, float]]:
    """max |error| / max |value| of the output and each gradient, against float64."""
    worst = {}
    dtypes = dict(float32=torch.float32, bf16=torch.bfloat16)
    for label in dtypes if device.type == "cuda" else ["float32"]:
        dtype, errors = dtypes[label], Counter()
        worst[label] = errors
        for length in (49, 196, 784, 3136):
            inputs = scan_inputs(2, 6, length, dtype, device)
            out = run_scan(peer, inputs)
            dout = torch.randn_like(out)
            ours = [out, *torch.autograd.grad(out, inputs, dout)]
            exact = [t.detach().double().requires_grad_() for t in inputs]
            out = reference_scan(*exact)
            theirs = [out, *torch.autograd.grad(out, exact, dout.double())]
            for name, x, y in zip(["out", *SCAN_NAMES], ours, theirs, strict=True):
                error = ((x - y).abs().max() / y.abs().max()).item()
                errors[name] = max(errors[name], error)
        error = max(errors.values())
        print(f"scan, {label}: max relative error {error:.2e}", errors, file=sys.stderr)
    return worst


def clock(step: Callable[[], object], steps: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, and the most memory it held."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / steps)
    gib = torch.cuda.max_memory_allocated() / 2**30
    return dict(ms=statistics.median(times), min_ms=min(times), gib=gib)


def _autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def inference_step(model, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    model.eval()

    @torch.no_grad()
    def step():
        with _autocast(images.device, dtype):
            return model(images)

    return step


def training_step(
    model, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward, cross entropy, backward, fused AdamW; float16 scales its loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with _autocast(images.device, dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def profile(step: Callable[[], object]) -> dict[str, list]:
    """{kernel: [milliseconds, calls]} of one step."""
    for _ in range(3):
        step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as profiler:
        step()
        torch.cuda.synchronize()
    spent, calls = Counter(), Counter()
    for event in profiler.events():
        if event.device_type.name != "CUDA":
            continue
        if not getattr(event, "is_user_annotation", False):
            spent[event.name] += event.time_range.elapsed_us() / 1e3
        calls[event.name] += 1
    return {name: [ms, calls[name]] for name, ms in spent.most_common()}


def clock_scan(peer, images, clocked) -> dict[str, dict[str, float]]:
    """The scan by itself, at the shapes and types of T's stages under bfloat16."""
    results = {}
    batch, image, device = len(images), images.shape[-1], images.device
    for inner, stride in STAGES.items():
        inputs = scan_inputs(
            batch, inner, (image // stride) ** 2, torch.bfloat16, device
        )
        dout = torch.randn_like(run_scan(peer, inputs))

        def forward(inputs=inputs):
            with torch.no_grad():
                run_scan(peer, inputs)

        def both(inputs=inputs, dout=dout):
            torch.autograd.grad(run_scan(peer, inputs), inputs, dout)

        results[f"{inner} x {image // stride}^2"] = dict(
            forward_ms=clocked(forward)["ms"], both_ms=clocked(both)["ms"]
        )
    return results


def clock_ss2d(model, images, clocked) -> dict[str, float]:
    """The whole SS2D of the first block, input in float32 as its norm leaves it."""
    batch, device = len(images), images.device
    op, side = model.layers[0].blocks[0].op, images.shape[-1] // 4
    x = torch.randn(batch, 96, side, side, device=device, requires_grad=True)
    leaves = [x, *op.parameters()]

    def run():
        with torch.autocast(device.type, torch.bfloat16):
            return op(x, None)

    def forward():
        with torch.no_grad():
            run()

    dout = torch.randn_like(run())
    both = clocked(lambda: torch.autograd.grad(run(), leaves, dout))
    return dict(forward_ms=clocked(forward)["ms"], both_ms=both["ms"])


def check_network(peer: ModuleType) -> float:
    """How far its logits are from the golden that the authors' code once gave."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    reference = importlib.import_module("tests.parity.generate")
    model = peer.sparx_mamba_t(pretrained=False).eval()
    names = {name: t.shape for name, t in model.state_dict().items()}
    weights = {name: reference.tensor(name, shape) for name, shape in names.items()}
    model.load_state_dict({name: torch.tensor(t) for name, t in weights.items()})
    goldens = Path(reference.__file__).parent / "goldens"
    facts = json.loads((goldens / "sparx_mamba_t_64x64.json").read_text())
    images = torch.tensor(reference.image(facts["input_key"], facts["input_shape"]))
    logits = torch.tensor(np.load(goldens / "sparx_mamba_t_64x64.npz")["logits"])
    with torch.no_grad():
        return (model(images) - logits).abs().max().item()


def serve(args) -> None:
    """Steps of one network on one CPU thread, as many as each line asks for."""
    torch.set_num_threads(1)
    if args.folder:
        peer, _ = load_peer(args.folder, args.device)
        check_scan(peer, args.device)
        if args.product:
            peer.LayerScale.forward = lambda self, x: (
                x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
            )
        error = check_network(peer)
        print(f"logits are {error:.1e} from the golden's", file=sys.stderr)
        if not error < 1e-4:
            raise SystemExit("this is not the authors' network: nothing is timed")
        create = getattr(peer, args.serve)
    else:
        create = partial(importlib.import_module("timm").create_model, args.serve)
    model = create(pretrained=False, drop_path_rate=DROP_PATH)
    model.to(memory_format=FORMATS[args.layout])
    labels = torch.randint(1000, (args.batch,))
    images = torch.randn(args.batch, 3, args.image, args.image)
    images = images.contiguous(memory_format=FORMATS[args.layout])
    train = training_step(model, images, labels, torch.float32)
    steps = dict(evaluate=inference_step(model, images, torch.float32), train=train)
    for line in sys.stdin:
        kind, count = line.split()
        model.train(kind == "train")
        for _ in range(int(count)):
            steps[kind]()
        print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--quick", action="store_true", help="the two speeds alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--serve", help="on CPU: sparx_mamba_t, without FOLDER timm's")
    parser.add_argument("--layout", default="default", choices=list(FORMATS))
    parser.add_argument(
        "--product",
        action="store_true",
        help="layer scales as products: torch runs their convolution group by group",
    )
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    if args.device.type == "cpu" or not args.folder:
        parser.error("it takes a GPU and FOLDER, or --device=cpu and --serve")

    begin = time.perf_counter()
    device, batch = args.device, args.batch
    torch.backends.cudnn.benchmark = True  # as in the authors' train.py
    torch.manual_seed(0)
    clocked = partial(clock, steps=10 if args.quick else 20, repeats=3)
    results = dict(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        batch=batch,
        image=args.image,
    )

    def attempt(name: str, measure: Callable[[], object]) -> None:
        """Keeps what was measured, or the error: one failure costs one figure."""
        try:
            results[name] = measure()
        except Exception as error:
            traceback.print_exc()
            results[name] = dict(error=repr(error))
        seconds = time.perf_counter() - begin
        print(f"[{seconds:5.1f} s] {name}: {str(results[name])[:200]}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()

    peer, results["scan"] = load_peer(args.folder, device)
    attempt("check", lambda: check_scan(peer, device))
    model = peer.sparx_mamba_t(pretrained=False, drop_path_rate=DROP_PATH).to(device)
    results["parameters"] = sum(p.numel() for p in model.parameters())
    labels = torch.randint(1000, (batch,), device=device)
    images = torch.randn(batch, 3, args.image, args.image, device=device)

    def both_modes(network, label: str, dtype: torch.dtype) -> None:
        for mode in "inference", "training":

            def measure(mode=mode):
                if mode == "inference":
                    step = inference_step(network, images, dtype)
                else:
                    step = training_step(network, images, labels, dtype)
                row = clocked(step)
                return dict(images_per_s=1e3 * batch / row["ms"], **row)

            attempt(f"{mode} {label}", measure)
        model.zero_grad(set_to_none=True)

    def use(layout: str) -> None:
        nonlocal images
        model.to(memory_format=FORMATS[layout])
        images = images.contiguous(memory_format=FORMATS[layout])

    formats = ["channels_last"] if args.quick else list(FORMATS)
    for layout in formats:
        use(layout)
        both_modes(model, f"bf16 {layout}", torch.bfloat16)
    speeds = {x: results[f"training bf16 {x}"].get("images_per_s", 0) for x in formats}
    best = max(speeds, key=speeds.get)
    use(best)
    if not args.quick:
        # What the authors train in (--native-amp).
        both_modes(model, f"fp16 {best}", torch.float16)
        step = training_step(model, images, labels, torch.bfloat16)
        attempt("kernels", lambda: profile(step))
        model.zero_grad(set_to_none=True)
        attempt("scan alone", lambda: clock_scan(peer, images, clocked))
        attempt("ss2d", lambda: clock_ss2d(model, images, clocked))
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # each block is its own shape
        for name in "_selective_scan", "_cross_scan", "_cross_merge":
            kernel = torch.compiler.disable(getattr(peer.SparXSS2D, name))
            setattr(peer.SparXSS2D, name, kernel)
        both_modes(
            torch.compile(model, dynamic=False), f"bf16 {best} compiled", torch.bfloat16
        )
    show(results)


def show(results: dict) -> None:
    print(f"\n{results['device']}, torch {results['torch']}, scan {results['scan']}")
    for name, row in results.items():
        if isinstance(row, dict) and "images_per_s" in row:
            print(
                f"{name:36}{row['images_per_s']:9.1f} images/s{row['ms']:9.2f} ms"
                f"{row['gib']:7.2f} GiB"
            )
    if "ss2d" not in results:
        return
    ss2d = {"whole SS2D, stage 1": results["ss2d"]}
    for name, row in (results["scan alone"] | ss2d).items():
        if isinstance(row, dict) and "both_ms" in row:
            print(
                f"{name:24}forward{row['forward_ms']:9.3f} ms, with backward"
                f"{row['both_ms']:9.3f} ms"
            )
    if "error" not in results["kernels"]:
        total = sum(ms for ms, _ in results["kernels"].values())
        print(f"\none training step: {total:.2f} ms in kernels")
        for name, (ms, calls) in list(results["kernels"].items())[:15]:
            print(f"{ms:9.2f} ms{ms / total:7.1%}{calls:6}  {name[:90]}")


if __name__ == "__main__":
    main()
