"""What XLA needs to compile a network: python -m benchmarks.compile

Seconds are CPU time of this process, over all its threads; `compile` with an empty
cache, `cached` when the cache on disk has the program.  A run that starts needs `trace`
and `lower`, then one of the two.
"""

import argparse
import json
import platform
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from sparx_jax.parallel import make_mesh
from sparx_jax.training import state as states
from sparx_jax.training.config import default_config, from_config_dict
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.step import (
    cross_entropy,
    jit_train_step,
    normalize,
    smooth_targets,
)


def set_up(settings):
    """Config, network, state, training step and mesh of a run on one device."""
    config = from_config_dict(settings)
    schedule = learning_rate(config.optimizer, 10, 100)
    optimizer = make_optimizer(config.optimizer)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    network, state = states.init(
        config.model, optimizer, seed=0, use_ema=True, mesh=mesh
    )
    step = jit_train_step(network, config, optimizer, schedule, state, mesh)
    return config, network, state, step, mesh


def functions(name, image_size, batch_size):
    """Name -> (jitted function, arguments) for forward, gradient and training step."""
    settings = default_config()
    settings.model.name, settings.model.drop_path_rate = name, 0.1
    settings.data.image_size, settings.batch_size = image_size, batch_size
    config, network, state, step, _ = set_up(settings)
    weights = state.weights
    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    batch = {"image": images, "label": np.zeros(batch_size, np.int32)}
    batch["weight"] = np.ones(batch_size, np.float32)

    def loss(params, batch):
        model = states.merge(network.train, weights._replace(params=params))
        images = normalize(batch["image"], config.data.mean, config.data.std)
        logits = model(images, key=jax.random.key(0))
        targets = smooth_targets(batch["label"], config.model.num_classes)
        return cross_entropy(logits, targets).mean()

    return {
        "forward": (jax.jit(loss), (weights.params, batch)),
        "gradient": (jax.jit(jax.grad(loss)), (weights.params, batch)),
        "step": (step, (jnp.uint32(0), state, batch)),
    }


def measure(function, args):
    """Seconds of each phase and what comes out of them."""
    jax.clear_caches()
    times = [time.process_time()]
    traced = function.trace(*args)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    compiled = lowered.compile()
    times.append(time.process_time())
    jax.clear_caches()
    again = function.lower(*args)
    start = time.process_time()
    again.compile()
    seconds = [*np.diff(times), time.process_time() - start]
    before, after = lowered.as_text("hlo"), compiled.as_text()
    phases = "trace", "lower", "compile", "cached"
    return dict(zip(phases, np.round(seconds, 2).tolist(), strict=True)) | {
        "hlo_before": before.count(" = "),
        "hlo_after": after.count(" = "),
        "fusions": len(re.findall(r" fusion\(", after)),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }


def main():
    """Prints the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sparx_mamba_nano")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="forward, gradient, step")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    machine = {
        "device": jax.devices()[0].device_kind,
        "cpu": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    rows = {}
    for name, task in functions(args.model, args.image_size, args.batch).items():
        if args.only and name not in args.only:
            continue
        row = rows[name] = measure(*task)
        if len(rows) == 1:
            print(f"{args.model}, {args.image_size} pixels, batch {args.batch}")
            print(f"{'':10}", *(f"{key:>10}" for key in row))
        print(f"{name:10}", *(f"{value:>10}" for value in row.values()), flush=True)
    if args.out:
        setting = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
        args.out.write_text(json.dumps(machine | setting | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
