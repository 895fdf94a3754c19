"""Training pictures a second, ours against timm's, on a folder of photographs.

python -m benchmarks.input FOLDER --peer_python=TORCH_PYTHON [--workers=2]

FOLDER holds <class>/*.JPEG. timm 1.0.31 with torchvision must be installed for
TORCH_PYTHON (see timm_loader.py). All take turns, round by round, on the same
pictures: decode, random crop, flip, RandAugment, batches of uint8. Without workers CPU
time is measured, that is pictures a second and core; with workers the wall clock.
Prints a table of stages, the ratios (median over the rounds, least, greatest), how far
the fast pixels are from the exact ones, and one line of JSON last.
"""

import argparse
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from sparx_jax.data import decode_image, train_batches
from sparx_jax.data.fast import fast_train_transform, operate
from sparx_jax.data.rand_augment import Draw
from sparx_jax.data.sources import FolderSource
from sparx_jax.data.transforms import make_choose, train_transform
from sparx_jax.training.config import DataConfig

RECIPE = DataConfig(interpolation="random", rand_augment="rand-m9-mstd0.5-inc1")
FILL = (124, 116, 104)
BATCH = 32


class Ours:
    """Batches of `train_batches` in one mode."""

    def __init__(self, decode, source, workers):
        data = replace(RECIPE, decode=decode, workers=workers)
        self._batches = train_batches(data, source, batch_size=BATCH, seed=0)

    def time(self, count, skip):
        for _ in range(skip):
            next(self._batches)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(self._batches)
        return time.perf_counter() - wall, time.process_time() - cpu


class Timm:
    """timm's loader in a process of its own."""

    def __init__(self, python, root, workers):
        script = Path(__file__).parent / "timm_loader.py"
        self._process = subprocess.Popen(
            [python, script, root, str(BATCH), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, count, skip):
        self._process.stdin.write(f"{count} {skip}\n")
        self._process.stdin.flush()
        return tuple(map(float, self._process.stdout.readline().split()))

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def rates(loaders, rounds, count, workers):
    """Pictures a second of each loader in each round."""
    # Whatever was prepared during the turns of the others is not counted.
    skip = 4 * workers + 2 if workers else 1
    seconds = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            wall, cpu = loader.time(count, skip)
            seconds[name].append(wall if workers else cpu)
    return {name: [count * BATCH / s for s in all] for name, all in seconds.items()}


def stages(files):
    """CPU time of each stage in ms a picture, both modes, best of three."""
    data = replace(RECIPE, rand_augment="")
    rand = make_choose(RECIPE)
    rng = np.random.default_rng(0)
    images = [decode_image(file) for file in files]
    choices = [rand(*image.size, rng) for image in images]
    exact, (decode, fast) = train_transform(data), fast_train_transform(data)
    cuts = [decode(file, np.random.default_rng(1)) for file in files]
    squares = [image.resize((224, 224)) for image in images]

    def operations(apply):
        for square, choice in zip(squares, choices, strict=True):
            for draw in choice.operations:
                square = apply(draw, square, FILL)

    work = {
        "draws": lambda: [rand(*image.size, rng) for image in images],
        "decode (fast: and crop)": (
            lambda: [decode_image(file) for file in files],
            lambda: [decode(file, np.random.default_rng(1)) for file in files],
        ),
        "crop, resize, flip": (
            lambda: [exact(image, np.random.default_rng(1)) for image in images],
            lambda: [fast(cut, None) for cut in cuts],
        ),
        "RandAugment": (lambda: operations(Draw.apply), lambda: operations(operate)),
    }

    def cost(function):
        times = []
        for _ in range(3):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return 1e3 * min(times) / len(files)

    table = {}
    for name, functions in work.items():
        both = functions if isinstance(functions, tuple) else (functions,) * 2
        table[name] = [cost(function) for function in both]
    return table


def differences(files):
    """Mean absolute difference of fast from exact pixels, in grey levels."""
    totals = {}
    for name, spec in (("crop and resize", ""), ("whole", RECIPE.rand_augment)):
        data = replace(RECIPE, rand_augment=spec)
        decode, fast = fast_train_transform(data)
        exact, out = train_transform(data), []
        for seed, file in enumerate(files):
            rng = np.random.default_rng(seed)
            pixels = exact(decode_image(file), np.random.default_rng(seed))
            out.append(
                np.abs(fast(decode(file, rng), None) - pixels.astype(int)).mean()
            )
        totals[name] = {"mean": float(np.mean(out)), "max": float(np.max(out))}
    # The yardstick: the two interpolations that the recipe draws from.
    out = []
    for file in files:
        image = decode_image(file)
        one, two = (
            np.asarray(image.resize((224, 224), how), int)
            for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
        )
        out.append(np.abs(one - two).mean())
    totals["bilinear from bicubic"] = {
        "mean": float(np.mean(out)),
        "max": float(np.max(out)),
    }
    return totals


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--peer_python", required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    root = Path(options.folder).absolute()
    source = FolderSource(str(root.parent), root.name, root.name)
    timm = Timm(options.peer_python, root, options.workers)
    loaders = {"timm": timm} | {
        mode: Ours(mode, source, options.workers) for mode in ("exact", "fast")
    }
    found = rates(loaders, options.rounds, options.batches, options.workers)
    timm.close()
    files = [source[i]["image"] for i in range(len(source))]
    table, apart = stages(files), differences(files)

    print(f"{'stage, ms of CPU a picture':30} exact   fast")
    for name, (one, two) in table.items():
        print(f"{name:30} {one:5.2f}  {two:5.2f}")
    per = f"{options.workers} workers, wall clock" if options.workers else "core"
    result = {"workers": options.workers, "ms": table, "grey levels apart": apart}
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values, found["timm"], strict=True)]
        result[name] = {
            "images_per_s": median(values),
            "ratio": median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
        }
        print(
            f"{name:6} {median(values):6.0f} pictures/s ({per}), {median(ratios):.2f} "
            f"times timm ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
