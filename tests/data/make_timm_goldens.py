"""What timm 1.0.31 makes of pictures, and the laws that it draws from.

This is the one file that needs timm, torch and torchvision, so it is run by another
Python than the tests: `TORCH_PYTHON tests/data/make_timm_goldens.py OUT.npz` writes
the goldens; with `--jobs=JOBS.json` it writes what `compare_with_timm.py` asks for.
Pillow must have the version of requirements.txt. No sentence of it is timm's.
"""

import argparse
import hashlib
import json
import random
from unittest.mock import patch

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, create_transform, mixup, random_erasing, transforms
from torchvision.transforms import functional

DRAWS = 100_000
SPEC = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
SIGNED = "Rotate ShearX ShearY TranslateXRel TranslateYRel".split()
ENHANCE = "Color Contrast Brightness Sharpness".split()
LEVELS = (0.0, 2.5, 7.3, 9.9)  # posterize fails at 10 with Pillow 13
SIZE = (48, 32)  # height, width in the laws of boxes


def digest(image):
    """SHA-256 of the pixels and their shape."""
    pixels = np.ascontiguousarray(image)
    text = str(pixels.shape).encode() + pixels.tobytes()
    return hashlib.sha256(text).hexdigest()


def operation(image, name, level, sign, resample, fill=FILL):
    """One operation of RandAugment with all that it would draw given."""
    hparams = dict(img_mean=tuple(fill), interpolation=Image.Resampling(resample))
    op = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
    with patch.object(auto_augment, "_randomly_negate", lambda value: sign * value):
        return op(image)


def evaluation(image, size, ratio):
    """The evaluation transform, before normalisation."""
    transform = create_transform(
        size, crop_pct=ratio, interpolation="bicubic", use_prefetcher=True
    )
    return transform(image).numpy().transpose(1, 2, 0)


def training(image, box, size, resample, flip, draws):
    """The training transform with all that it would draw given."""
    left, top, right, bottom = box
    mode = {2: "bilinear", 3: "bicubic"}[resample]
    image = functional.resized_crop(
        *(image, top, left, bottom - top, right - left),
        *((size, size), functional.InterpolationMode(mode)),
    )
    image = functional.hflip(image) if flip else image
    for draw in draws:
        image = operation(image, *draw)
    return image


def cases():
    """(name, level, sign, resample) of the goldens of operations."""
    for op in auto_augment.rand_augment_transform(SPEC).ops:
        enhance = op.name.removesuffix("Increasing") in ENHANCE
        fixed = op.level_fn is None
        for level in LEVELS[:1] if fixed else LEVELS:
            for sign in (1, -1) if enhance or op.name in SIGNED else (1,):
                for resample in (2, 3) if op.name in SIGNED else (2,):
                    yield op.name, level, sign, resample


def photographs():
    """scikit-learn's two, as Pillow images of 640 x 427 pixels."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def operation_goldens():
    small = [p.resize((24, 20), Image.Resampling.BICUBIC) for p in photographs()]
    table = list(cases())
    return {
        "pictures": np.stack(small),
        "cases": np.array(json.dumps(table)),
        "operated": np.stack(
            [[np.asarray(operation(p, *case)) for case in table] for p in small]
        ),
    }


def transform_goldens():
    made = {}
    for number, photo in enumerate(photographs()):
        for turned in (False, True):
            image = photo.transpose(Image.Transpose.TRANSPOSE) if turned else photo
            image = image.crop((0, 0, image.width - 3 * turned, image.height - number))
            for size, ratio in ((224, 0.9), (224, 0.95), (224, 0.875), (65, 0.9)):
                key = json.dumps(["eval", number, turned, size, ratio])
                made[key] = digest(evaluation(image, size, ratio))
    for resample in (2, 3):
        for flip in (False, True):
            box = (13, 57, 402, 311)
            draws = [("Rotate", 8.9, -1, 3), ("ColorIncreasing", 9.2, 1, 2)]
            out = training(photographs()[0], box, 224, resample, flip, draws)
            key = json.dumps(["train", box, 224, resample, flip, draws])
            made[key] = digest(out)
    return {"transforms": np.array(json.dumps(made))}


def rand_augment_law():
    """Which two operations, by their order (last: none), and the levels."""
    transform = auto_augment.rand_augment_transform(SPEC, dict(img_mean=FILL))
    names, seen, levels = [op.name for op in transform.ops], [], []
    negative = np.zeros((len(names), 2), np.int64)
    random.seed(0)
    np.random.seed(0)

    def spy(index, op):
        level_fn = op.level_fn

        def level(value, hparams):
            levels.append(value)
            argument = level_fn(value, hparams) if level_fn else (0.0,)
            negative[index, int(argument[0] < (1 if "Inc" in op.name else 0))] += 1
            return argument

        op.level_fn = level
        op.aug_fn = lambda image, *args, **kwargs: seen.append(index)

    for index, op in enumerate(transform.ops):
        spy(index, op)
    pairs = np.zeros((16, 16), np.int64)
    for _ in range(DRAWS):
        seen.clear()
        transform(None)
        pairs[tuple(([*seen, 15, 15])[:2])] += 1
    return {
        "ra_names": np.array(json.dumps(names)),
        "ra_pairs": pairs,
        "ra_levels": np.histogram(levels, np.linspace(6.5, 10, 36))[0],
        "ra_negative": negative,
    }


def box_law(boxes):
    """Marginal histograms of (top, left, height, width), one after another."""
    edge = max(SIZE) + 1
    return np.stack([np.bincount(column, minlength=edge) for column in boxes.T])


def crop_law():
    random.seed(1)
    image = Image.new("RGB", SIZE[::-1])
    get = transforms.RandomResizedCropAndInterpolation.get_params
    ratios = (3 / 4, 4 / 3)
    boxes = np.array([get(image, (0.08, 1.0), ratios) for _ in range(DRAWS)])
    return {"crop_boxes": box_law(boxes)}


def erasing_law():
    """(top, left, height, width) of the erased boxes; how many of 100,000 are."""
    random.seed(2)
    boxes = []

    class Spy:
        def __setitem__(self, key, value):
            _, rows, columns = key
            height, width = rows.stop - rows.start, columns.stop - columns.start
            boxes.append((rows.start, columns.start, height, width))

    random_erasing._get_pixels = lambda *args, **kwargs: None
    eraser = random_erasing.RandomErasing(0.25, mode="pixel", max_count=1)
    for _ in range(DRAWS):
        eraser._erase(Spy(), 3, *SIZE, None)
    return {"erased": np.array(len(boxes)), "erased_boxes": box_law(np.array(boxes))}


def mixing_law():
    """Histograms of lambda by kind, and of cutmix's boxes and corrected lambda."""
    np.random.seed(3)
    mixer = mixup.Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, num_classes=5)
    draws = [mixer._params_per_batch() for _ in range(DRAWS)]
    edges = np.linspace(0, 1, 21)
    lambdas = [
        np.histogram([lam for lam, cut in draws if cut == kind], edges)[0]
        for kind in (False, True)
    ]
    boxes, corrected = [], []
    for lam in (lam for lam, cut in draws if cut):
        (yl, yh, xl, xh), lam = mixup.cutmix_bbox_and_lam((3, *SIZE), lam)
        boxes.append((yl, xl, yh - yl, xh - xl))
        corrected.append(lam)
    return {
        "mix_lambdas": np.stack(lambdas),
        "cutmix_boxes": box_law(np.array(boxes)),
        "cutmix_lambdas": np.histogram(corrected, edges)[0],
    }


def mixing_goldens():
    """A batch of four: mixup with share 0.3137 and cutmix with box 1:6, 2:5."""
    rng = np.random.default_rng(4)
    images = rng.integers(256, size=(4, 8, 6, 3)).astype(np.uint8)
    labels = np.array([0, 3, 3, 4])
    made = {"mix_images": images, "mix_labels": labels}
    batch = [(x.transpose(2, 0, 1), y) for x, y in zip(images, labels, strict=True)]
    mixup.cutmix_bbox_and_lam = lambda *args, **kwargs: ((1, 6, 2, 5), 1 - 15 / 48)
    for cut in (False, True):
        mixer = mixup.FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
        mixer._params_per_batch = lambda cut=cut: (0.3137, cut)
        x, target = mixer(batch)
        made[f"mixed_{cut:d}"] = x.numpy().transpose(0, 2, 3, 1)
        made[f"target_{cut:d}"] = target.numpy()
    return made


def do_jobs(jobs):
    """Digests of what each job asks for: [kind, path, arguments]."""
    kinds = dict(evaluation=evaluation, training=training, operation=operation)
    outs = []
    for kind, path, arguments in jobs:
        image = Image.open(path).convert("RGB")
        if kind == "operation":
            image = Image.fromarray(evaluation(image, 224, 0.9))
        outs.append(digest(kinds[kind](image, *arguments)))
    return outs


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--jobs")
    options = parser.parse_args()
    if options.jobs:
        with open(options.jobs) as file, open(options.out, "w") as out:
            json.dump(do_jobs(json.load(file)), out)
        return
    made = transform_goldens() | crop_law() | rand_augment_law() | erasing_law()
    made |= operation_goldens() | mixing_law() | mixing_goldens()
    np.savez_compressed(options.out, **made)


if __name__ == "__main__":
    main()
