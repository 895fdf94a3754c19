"""Times the authors' SparX-Mamba-T in PyTorch, with its CUDA selective scan, on a GPU.

FOLDER holds their sparx_mamba.py and csm_triton.py, and, where the module
selective_scan_cuda_oflex is not installed, a peer_extension.py whose load_extension()
returns it and a word on where it came from. On the CPU a plain recurrence takes the
scan's place, which tests this script and nothing else.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

DROP_PATH = 0.2  # of the authors' scripts/train_sparx_mamba_t.sh
SCAN_NAMES = "u delta A B C D bias".split()
STAGES = {192: 4, 384: 8, 640: 16, 1024: 32}  # d_inner of T: stride of its map
FORMATS = dict(default=torch.contiguous_format, channels_last=torch.channels_last)
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)


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


def reference_extension() -> SimpleNamespace:
    """What the CUDA extension offers, from `reference_scan`."""

    def backward(*args):
        leaves = [t.detach().requires_grad_() for t in args[:7]]
        with torch.enable_grad():
            return torch.autograd.grad(reference_scan(*leaves), leaves, args[7])

    return SimpleNamespace(
        fwd=lambda *args: (reference_scan(*args[:7]), args[0].new_empty(0)),
        bwd=backward,
    )


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
        sys.modules[name], origin = reference_extension(), "reference"
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
        peer.CrossScanTriton = SimpleNamespace(apply=cross_scan)
        peer.CrossMergeTriton = SimpleNamespace(apply=cross_merge)
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
    for label, dtype in dict(float32=torch.float32, bf16=torch.bfloat16).items():
        errors = worst[label] = Counter()
        for length in (49, 196, 784, 3136) if device.type == "cuda" else (49,):
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
        print(f"scan, {label}: max relative error {max(errors.values()):.2e}", errors)
    return worst


def clock(
    step: Callable[[], object], device: torch.device, steps: int, repeats: int
) -> dict[str, float]:
    """Median milliseconds of a step, and the most memory it held."""
    for _ in range(5 if device.type == "cuda" else 1):
        step()
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return dict(ms=1e3 * (time.perf_counter() - start), gib=0.0)
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


def inference_step(model, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    model.eval()

    @torch.no_grad()
    def step():
        with torch.autocast(images.device.type, dtype):
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
        with torch.autocast(images.device.type, dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def profile(step: Callable[[], object], device: torch.device) -> dict[str, list]:
    """{kernel (on the CPU, operator): [milliseconds, calls]} of one step."""
    kinds = torch.profiler.ProfilerActivity
    for _ in range(3):
        step()
    activities = [kinds.CUDA if device.type == "cuda" else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    spent, calls = Counter(), Counter()
    for event in profiler.events():
        if event.device_type.name != device.type.upper():
            continue
        if device.type == "cpu":
            spent[event.name] += event.self_cpu_time_total / 1e3
        elif not getattr(event, "is_user_annotation", False):
            spent[event.name] += event.time_range.elapsed_us() / 1e3
        calls[event.name] += 1
    return {name: [ms, calls[name]] for name, ms in spent.most_common()}


def clock_scan(peer, batch, image, clocked) -> dict[str, dict[str, float]]:
    """The scan by itself, at the shapes and types of T's stages under bfloat16."""
    results = {}
    device = clocked.keywords["device"]
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


def clock_ss2d(model, batch, image, clocked) -> dict[str, float]:
    """The whole SS2D of the first block, input in float32 as its norm leaves it."""
    device = clocked.keywords["device"]
    op, side = model.layers[0].blocks[0].op, image // 4
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--quick", action="store_true", help="the two speeds alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    args = parser.parse_args()

    begin = time.perf_counter()
    device, batch = args.device, args.batch
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as in the authors' train.py
    torch.manual_seed(0)
    clocked = partial(clock, device=device, steps=10 if args.quick else 20, repeats=3)
    results = dict(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
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
        if on_gpu:
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
        if on_gpu:  # what the authors train in (--native-amp)
            both_modes(model, f"fp16 {best}", torch.float16)
        step = training_step(model, images, labels, torch.bfloat16)
        attempt("kernels", lambda: profile(step, device))
        model.zero_grad(set_to_none=True)
        attempt("scan alone", lambda: clock_scan(peer, batch, args.image, clocked))
        attempt("ss2d", lambda: clock_ss2d(model, batch, args.image, clocked))
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
