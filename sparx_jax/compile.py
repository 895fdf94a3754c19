"""Compiles a run's steps for machines that need not be there: what will they need?

    python -m sparx_jax.compile --config=configs/imagenet.py:sparx_mamba_t \\
        --topology=v5e:16x16 --remat=none,block

The steps are those of train.py and eval.py, compiled for every device of the topology
by the compiler of that device, which has to be installed, but nothing runs.  No data is
opened: there are `config.model.num_classes`, 1,000 if that is not set.  Memory and
collectives are what the compiler has decided; times are predictions from the chip's
datasheet, to be believed within a factor of two at best.  With
`config.accumulation_steps` images and times are those of one part of the batch.
"""

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxlib import _jax
from ml_collections import ConfigDict

from sparx_jax.chips import HERE, Chip, find_devices
from sparx_jax.errors import UserError
from sparx_jax.ops.tpu_cycles import static_cycles
from sparx_jax.parallel import batch_sharding, make_mesh
from sparx_jax.training import cli
from sparx_jax.training import state as states
from sparx_jax.training.config import Config, from_config_dict
from sparx_jax.training.logging import duration
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import check_batch_sizes
from sparx_jax.training.step import compile_eval_step, jit_train_step

_TOPOLOGY = flags.DEFINE_string(
    "topology", HERE, "Devices to compile for: v5e:16x16, v4:2x2x4, h100:8, here."
)
_REMAT = flags.DEFINE_list(
    "remat", [], "Settings of model.remat to compare; none given: the config's."
)
_SEARCH = flags.DEFINE_bool("search", True, "Look for the largest batch that fits.")
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.")

GIB = 2.0**30
# What the runtime keeps of a chip's memory: XLA for v5e lets a program use 15.75 GiB.
USABLE = 15.75 / 16
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}  # others: 4 bytes
# For a GPU that is not there: jaxlib 0.10.2 fails on products that it would tune on the
# card, and hides instructions in command buffers.
_ABSENT_GPU = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_command_buffer": "",
}
_KERNELS = r'"(?:tpu_custom_call|__gpu\$xla\.gpu\.(?:triton|ptx))"'
_MOVES_NOTHING = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
_COLLECTIVES = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    "ragged-all-to-all"
)


def compile_step(config: Config, devices: list[jax.Device], kind: str) -> dict:
    """What one device needs for the train or eval step of `config`.

    Returns:
      Bytes of `parameters` (BatchNorm statistics too), `average`, `optimizer`, `batch`,
      `temporaries`, and `peak` of all together; `operations` and `traffic` (bytes) as
      XLA counts them, loops once (of a GPU that is not there: before it optimises, and
      by `traffic`); `cycles` if it estimates them, and of our `kernels`;
      `collectives`: kind to [number, bytes]; `seconds` of compilation; `fits`.
      If it does not fit and the compiler says so, only `peak` and `fits` are known.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    schedule = learning_rate(config.optimizer, 1, 2)
    optimizer = make_optimizer(config.optimizer)
    network, state = states.init_abstract(
        config.model, optimizer, use_ema=config.use_ema, mesh=mesh
    )
    batch = _batch(config, mesh, kind)
    held = {
        "parameters": _bytes(state.weights),
        "average": _bytes(state.ema) if kind == "train" else 0,
        "optimizer": _bytes(state.opt_state) if kind == "train" else 0,
        "batch": _bytes(batch),
    }
    start = time.perf_counter()
    if kind == "train":
        step = jit_train_step(network, config, optimizer, schedule, state, mesh)
        lowered = step.lower(jax.ShapeDtypeStruct((), np.uint32), state, batch)
    else:
        step = compile_eval_step(network, config, state.weights, mesh)
        lowered = step.lower(state.weights, batch)
    # A GPU of a topology; TPUs' compiler needs no such help.
    absent = devices[0].platform == "gpu" != jax.default_backend()
    try:
        compiled = lowered.compile(_ABSENT_GPU if absent else None)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]?) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        peak = float(used[1]) * _UNITS[used[2]]
        return held | {"peak": peak, "fits": False}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if absent:
        cpu, module = jax.devices()[0].client, lowered.compiler_ir("hlo")
        cost = _jax.hlo_module_cost_analysis(cpu, module.get_hlo_module())
        cost = {"flops": cost["flops"] / len(devices), "bytes accessed": traffic(text)}
    else:
        cost = compiled.cost_analysis() or {}
    cycles = [int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    whole = arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return held | {
        "temporaries": memory.temp_size_in_bytes,
        "peak": max(whole, memory.peak_memory_in_bytes),
        "operations": cost.get("flops", 0.0),
        "traffic": cost.get("bytes accessed", 0.0),
        "cycles": sum(cycles) + static_cycles(text, devices[0].device_kind),
        "kernels": len(re.findall(_KERNELS, text)),
        "collectives": collectives(text),
        "instructions": sum(" = " in line for line in text.splitlines()),
        "seconds": time.perf_counter() - start,
        "fits": True,
    }


def collectives(text: str) -> dict[str, list[int]]:
    """Number and bytes of the results of each kind of collective in a program."""
    found = defaultdict(lambda: [0, 0])
    pattern = rf"= (.*?) ({_COLLECTIVES})(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        found[kind][0] += 1
        found[kind][1] += _size(shapes)
    return dict(found)


def traffic(text: str) -> int:
    """Bytes that the instructions of a program's main part read and write."""
    main = text[text.index("\nENTRY ") :]
    sizes, total = {}, 0
    pattern = r"^ +(?:ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)"
    for name, shapes, operation, operands in re.findall(pattern, main, re.MULTILINE):
        sizes[name] = _size(re.sub(r"s8\[\d+\]", "", shapes))  # cuBLAS's workspace
        if operation not in _MOVES_NOTHING:
            read = re.findall(r"%[^\s,)]+", operands)
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in read)
    return total


def _size(shapes):
    """Bytes of the arrays in a text such as "(f32[2,3]{1,0}, s32[])"."""
    return sum(
        _SIZES.get(dtype, 4) * prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    )


def predict(step: dict, chip: Chip, count: int) -> dict[str, float]:
    """Seconds of one step by what would bound it, from the chip's datasheet.

    `arithmetic` and `memory`, which overlap, and `network`, which is added: a ring
    moves nearly twice the bytes of an all-reduce.  `schedule`, where XLA estimates
    cycles, replaces the first two: it sees that vector units are slower than matrix
    units.
    """
    sent = {"all-reduce": 2.0}
    moved = sum(b * sent.get(k, 1.0) for k, (_, b) in step["collectives"].items())
    seconds = {
        "arithmetic": step["operations"] / (chip.flops or float("inf")),
        "memory": step["traffic"] / (chip.bandwidth or float("inf")),
        "network": moved * (count - 1) / count / (chip.links or float("inf")),
    }
    if step["cycles"] and chip.clock:
        seconds["schedule"] = step["cycles"] / chip.clock
    return seconds


def largest_batch(measure, chip: Chip, first: dict, batch: int, count: int) -> tuple:
    """The most images per device of which a compiled step fits, and that step.

    Memory is nearly linear in the batch: two compilations give the line, a third
    confirms the answer, and a smaller one is tried where it does not fit.  (0, None) if
    none fits.

    Args:
      measure: images per device to `compile_step`.
      chip: a device.
      first: the step of `batch` images per device.
      batch: per device.
      count: of devices.
    """
    limit = chip.memory * USABLE

    def fits(n):
        return known[n]["fits"] and known[n]["peak"] <= limit

    other = max(1, batch // 2)
    known = {batch: first, other: first if other == batch else measure(other)}
    tried = None
    for _ in range(4):
        (low, one), (high, two) = sorted(known.items())[-2:] * (1 + (len(known) < 2))
        slope = (two["peak"] - one["peak"]) / max(1, high - low)
        guess = int(low + (limit - one["peak"]) / slope) if slope > 0 else 8 * high
        if tried is not None:
            guess = min(guess, tried - max(1, tried // 16))
        guess = max(1, guess - guess % 8 if guess > 8 else guess)
        known[guess] = known.get(guess) or measure(guess)
        if fits(guess) or guess == 1:
            break
        tried = guess
    most = max(filter(fits, known), default=0)
    return most, known.get(most)


def report(
    settings: ConfigDict,
    devices: list,
    chip: Chip,
    remats: list[str],
    search: bool,
    save: Callable[[dict], None],
) -> None:
    """Compiles all steps, by setting of remat; prints what it is doing and a table.

    After each step, which may have taken half an hour, `save` gets all figures so far.
    """
    count = len(devices)
    base = from_config_dict(settings)
    for remat in remats:  # all are checked before the first is compiled
        settings.model.remat = remat
        from_config_dict(settings)
    check_batch_sizes(base, count)
    results = defaultdict(dict)
    found = {
        "model": base.model_name,
        "device": chip._asdict(),
        "devices": count,
        "mesh": make_mesh(base.mesh.data, base.mesh.fsdp, devices).devices.shape,
        "image_size": base.data.image_size,
        "dtype": base.model.dtype,
        "versions": {"jax": jax.__version__},
        "steps": results,
    }

    def measure(per_device, remat, kind="train"):
        settings.model.remat = remat
        settings.batch_size = per_device * count * base.accumulation_steps
        settings.eval_batch_size = per_device * count
        config = from_config_dict(settings)
        print(f"compiling the {kind} step, {per_device} images a device, remat "
              f"{remat} ...", file=sys.stderr, flush=True)  # fmt: skip
        step = compile_step(config, devices, kind)
        jax.clear_caches()  # a pod's program takes 17 GB of this machine
        return step

    def add(name, kind, step, per_device):
        results[name][kind] = step | {"per_device": per_device}
        if "collectives" in step and chip.flops and chip.bandwidth:  # both are known
            results[name][kind]["predicted_s"] = predict(step, chip, count)
        save(found)

    for remat in remats or [base.model.remat]:
        per_device = base.batch_size // count // base.accumulation_steps
        step = measure(per_device, remat)
        add(remat, "train", step, per_device)
        if search:
            most, step = largest_batch(
                lambda n, remat=remat: measure(n, remat), chip, step, per_device, count
            )
            add(remat, "largest", step or {}, most)
    per_device = base.eval_batch_size // count
    add("eval", "eval", measure(per_device, base.model.remat, "eval"), per_device)
    rows = [
        (f"{n}, {kind}", s) for n, steps in results.items() for kind, s in steps.items()
    ]
    print("\n".join(table(rows, chip, count)))


def table(rows: list[tuple[str, dict]], chip: Chip, count: int) -> list[str]:
    """The lines of the printed table, a column a step."""

    def gib(name):
        return lambda s: f"{s[name] / GIB:.2f} GiB" if name in s else "?"

    def network(step):
        if "collectives" not in step:
            return "?"
        parts = [f"{n} {k} {b / 2**20:.1f} MiB"
                 for k, (n, b) in step["collectives"].items()]  # fmt: skip
        return ", ".join(parts) or "none"

    def seconds(step):
        if "predicted_s" not in step:
            return "?"
        times = step["predicted_s"]
        busy = {k: v for k, v in times.items() if k != "network"}
        bound = "schedule" if "schedule" in busy else max(busy, key=busy.get)
        total = busy[bound] + times["network"]
        rate = step["per_device"] * count / total
        return f"{1e3 * total:.0f} ms, {rate:,.0f} images/s, bound by {bound}"

    lines = {
        "images a device": lambda s: str(s["per_device"]),
        "parameters": gib("parameters"),
        "average": gib("average"),
        "optimizer": gib("optimizer"),
        "activations and other temporaries": gib("temporaries"),
        "peak": gib("peak"),
        "of the device's memory": lambda s: f"{s['peak'] / chip.memory:.0%}"
        + ("" if s["fits"] and s["peak"] <= chip.memory * USABLE else ": TOO MUCH")
        if "peak" in s
        else "nothing fits",
        "operations": lambda s: f"{s['operations']:.2e}" if "operations" in s else "?",
        "memory traffic": gib("traffic"),
        "collectives": network,
        "predicted time": seconds,
        "compiled in": lambda s: duration(s["seconds"]) if "seconds" in s else "?",
    }  # fmt: skip
    header = f"| one of {count} {chip.kind} | " + " | ".join(n for n, _ in rows) + " |"
    body = [
        f"| {name} | " + " | ".join(cell(step) for _, step in rows) + " |"
        for name, cell in lines.items()
    ]
    return [header, "|---" * (len(rows) + 1) + "|", *body]


def _batch(config, mesh, kind):
    size = config.batch_size if kind == "train" else config.eval_batch_size
    pixels = config.data.image_size
    shapes = {
        "image": ((size, pixels, pixels, 3), np.uint8),
        "label": ((size,), np.int32),
        "weight": ((size,), np.float32),
    }
    if kind == "eval":
        shapes["index"] = ((size,), np.int32)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _bytes(tree):
    """On one device."""
    return sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def main(config: ConfigDict, workdir: str | None) -> None:
    """What the flags say."""
    del workdir
    if not (folder := Path(_OUT.value).absolute().parent).is_dir():
        raise UserError(f"--out={_OUT.value}: there is no folder {folder}: create it.")
    if _OUT.value and Path(_OUT.value).is_dir():
        raise UserError(f"--out={_OUT.value} is a folder: give the path of a file.")
    devices, chip = find_devices(_TOPOLOGY.value)
    if _TOPOLOGY.value != HERE:  # programs for devices that are not here cannot be read
        jax.config.update("jax_enable_compilation_cache", False)

    def save(found):
        if _OUT.value:
            with open(_OUT.value, "w") as file:
                json.dump({"topology": _TOPOLOGY.value} | found, file, indent=1)

    report(config, devices, chip, _REMAT.value, _SEARCH.value, save)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main, needs_workdir=False, joins=False)
