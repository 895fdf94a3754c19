"""Training images a second, ours against timm's and tf.data's.

python -m benchmarks.input FOLDER --timm_python=PYTHON --tf_python=PYTHON [--workers=1]

FOLDER holds <class>/*.JPEG, photographs. timm 1.0.31 with torchvision and TensorFlow
must be installed for these interpreters (see timm_loader.py, tf_data_loader.py); either
may be left out. All take turns, round by round, on the same images: decode, random
crop, flip, RandAugment, batches of uint8, each from WORKERS processes (tf.data:
threads). Rates are by wall clock, and by CPU time (the workers' too), that is by core.
Prints a table of stages, the rates and their ratios to the others' (median over the
rounds, least, greatest), how far the fast pixels are from the exact ones, JSON last.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import timing
from sparx_jax.data import DataConfig, decode_image, train_batches
from sparx_jax.data.fast import fast_train_transform, operate
from sparx_jax.data.rand_augment import Draw
from sparx_jax.data.sources import FolderSource
from sparx_jax.data.transforms import make_choose, train_transform

RECIPE = DataConfig(interpolation="random", rand_augment="rand-m9-mstd0.5-inc1")
FILL = (124, 116, 104)
BATCH = 32


class Repeated:
    """As if the folder held 100 times as many images.

    Grain draws the order of so few as 256 in 0.13 ms an image, of 25,600 in 0.01 ms.
    """

    def __init__(self, source):
        self._source, self.class_names = source, source.class_names

    def __len__(self):
        return 100 * len(self._source)

    def __getitem__(self, index):
        return self._source[index % len(self._source)]


def serve(mode, source, workers):
    """What `timing.Process` talks to: our batches."""
    data = replace(RECIPE, decode=mode, workers=workers)
    batches = train_batches(data, Repeated(source), batch_size=BATCH, seed=0)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        print("done", flush=True)
    batches.close()


def rates(loaders, rounds, count, workers):
    """Images a second of wall clock and of CPU of each loader in each round."""
    found = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            # What was prepared during the turns of the others is not counted.
            loader.ask(4 * workers + 2)
            found[name].append([count * BATCH / s for s in loader.ask(count)])
    return {name: np.array(pairs).T for name, pairs in found.items()}


def stages(files):
    """CPU time of each stage in ms an image, both modes, best of three."""
    data = replace(RECIPE, rand_augment="")
    rand = make_choose(RECIPE)
    rng = np.random.default_rng(0)
    images = [decode_image(file) for file in files]
    choices = [rand(*image.size, rng) for image in images]
    exact, (decode, fast) = train_transform(data), fast_train_transform(data)
    cuts = [decode(file, np.random.default_rng(1)) for file in files]
    squares = [image.resize((224, 224)) for image in images]

    def operations(apply, squares):
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
        "RandAugment": (
            lambda: operations(Draw.apply, squares),
            lambda: operations(operate, [np.asarray(square) for square in squares]),
        ),
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


def differences(files, size=224):
    """Mean absolute difference of fast from exact pixels, in grey levels."""
    totals = {}
    for name, spec in (("crop and resize", ""), ("whole", RECIPE.rand_augment)):
        data = replace(RECIPE, rand_augment=spec, image_size=size)
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
            np.asarray(image.resize((size, size), how), int)
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
    parser.add_argument("--timm_python")
    parser.add_argument("--tf_python")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--serve", choices=("exact", "fast"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    root = Path(options.folder).absolute()
    source = FolderSource(str(root.parent), root.name, root.name)
    if options.serve:
        return serve(options.serve, source, options.workers)
    peers = {
        "timm": (options.timm_python, "timm_loader.py"),
        "tf.data": (options.tf_python, "tf_data_loader.py"),
    }
    peers = {name: command for name, command in peers.items() if command[0]}
    loaders = {}
    for name, (python, program) in peers.items():
        command = [python, Path(__file__).parent / program, root]
        loaders[name] = timing.Process(*command, str(BATCH), str(options.workers))
    for mode in ("exact", "fast"):
        command = [sys.executable, *sys.orig_argv[1:], f"--serve={mode}"]
        loaders[mode] = timing.Process(*command)
    try:
        found = rates(loaders, options.rounds, options.batches, options.workers)
    finally:
        for loader in loaders.values():
            loader.close()
    files = [source[i]["image"] for i in range(len(source))]
    table, apart = stages(files), differences(files)

    print(f"{'stage, ms of CPU an image':30} exact   fast")
    for name, (one, two) in table.items():
        print(f"{name:30} {one:5.2f}  {two:5.2f}")
    result = {"workers": options.workers, "ms": table, "grey levels apart": apart}
    for name, clocks in found.items():
        for clock, rounds in zip(("wall", "core"), clocks, strict=True):
            entry = {"images_per_s": float(np.median(rounds))}
            line = f"{name:7} {np.median(rounds):6.0f} images/s ({clock})"
            for peer in peers:
                ratios = rounds / found[peer][("wall", "core").index(clock)]
                median, least, most = np.quantile(ratios, (0.5, 0, 1)).tolist()
                entry[peer] = {"ratio": median, "least": least, "greatest": most}
                line += f", {median:.2f} ({least:.2f} to {most:.2f}) times {peer}"
            result[f"{name}, {clock}"] = entry
            print(line)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
