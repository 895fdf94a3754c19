"""Compares all pixels with timm's on a folder of photographs.

python -m tests.data.compare_with_timm FOLDER --peer_python=TORCH_PYTHON

For each photograph: evaluation at three crop ratios, the whole training transform with
drawn parameters, and every operation of RandAugment at a drawn level. Prints one line
of JSON: how many were compared and how many differ, by kind.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from sparx_jax.data import DataConfig, decode_image, eval_transform
from sparx_jax.data.rand_augment import OPERATIONS, RESAMPLINGS, Draw, parse
from sparx_jax.data.transforms import Choice, apply_choice, random_crop_box

FILL = (124, 116, 104)
LAW = parse("rand-m9-mstd0.5-inc1-p1")


def evaluate(image, size, ratio):
    data = DataConfig(image_size=size, crop_ratio=ratio)
    return eval_transform(data)(image)


def train(image, box, size, resample, flip, draws):
    operations = [Draw(*draw) for draw in draws]
    choice = Choice(box, Image.Resampling(resample), flip, operations)
    return np.asarray(apply_choice(image, choice, size, FILL))


def operate(image, *draw):
    image = Image.fromarray(evaluate(image, 224, 0.9))
    return np.asarray(Draw(*draw).apply(image, FILL))


KINDS = {"evaluation": evaluate, "training": train, "operation": operate}


def plain(draw):
    # Pillow 13 cannot posterize to 0 bits, which is level 10: see rand_augment.py.
    return draw.name, min(draw.level, 9.99), draw.sign, int(draw.resample)


def jobs(paths, rng):
    """[kind, path, arguments] for every comparison."""
    both = RESAMPLINGS["random"]
    for path in paths:
        for ratio in (0.875, 0.9, 0.95):
            yield "evaluation", path, (224, ratio)
        with Image.open(path) as image:
            box = random_crop_box(*image.size, rng, scale=(0.08, 1.0))
        draws = [plain(draw) for draw in LAW.draw(rng, both)]
        resample, flip = int(rng.choice(both)), bool(rng.random() < 0.5)
        yield "training", path, (box, 224, resample, flip, draws)
        for name in OPERATIONS:
            level, sign = float(rng.uniform(0, 9.99)), int(rng.choice((-1, 1)))
            yield "operation", path, (name, level, sign, int(rng.choice(both)))


def digest(pixels):
    text = str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.sha256(text).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--peer_python", required=True)
    options = parser.parse_args()
    paths = sorted(str(p) for p in Path(options.folder).rglob("*.JPEG"))
    todo = list(jobs(paths, np.random.default_rng(0)))
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "jobs.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(todo))
        script = str(Path(__file__).parent / "make_timm_goldens.py")
        command = [options.peer_python, script, str(answered), f"--jobs={asked}"]
        subprocess.run(command, check=True)
        expected = json.loads(answered.read_text())
    compared, differ = Counter(), Counter()
    for (kind, path, arguments), value in zip(todo, expected, strict=True):
        name = arguments[0] if kind == "operation" else kind
        image = decode_image(Path(path).read_bytes())
        compared[name] += 1
        differ[name] += digest(KINDS[kind](image, *arguments)) != value
    print(
        json.dumps(
            {
                "photographs": len(paths),
                **{
                    name: {"compared": compared[name], "differ": differ[name]}
                    for name in compared
                },
            }
        )
    )


if __name__ == "__main__":
    main()
