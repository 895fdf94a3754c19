"""Images for a trial: does data.decode="fast" change what is learned?

    python -m benchmarks.decode SMALL LARGE [--times=3]

SMALL holds train/<class>/* and test/<class>/*, such as CIFAR-10; LARGE gets the same as
JPEGs that many times as wide and high (Pillow, bicubic, quality 92). Trained at the
width of SMALL, three times as large images make crops that shrink by 0.85 to 3, where
ImageNet's photographs at 224 pixels mostly shrink by 0.5 to 2: the fast mode takes all
its short cuts. Prints how many grey levels the modes are apart, and the sweep.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from benchmarks.input import differences

SWEEP = """python -m sparx_jax.sweep --config=configs/ablation.py:mamba_sparx \\
    --workdir=runs/decode --config.data.root={root} --config.data.crop=resized \\
    --config.data.interpolation=random --jobs=2 \\
    --config.data.rand_augment=rand-m9-mstd0.5-inc1 \\
    --sweep seed=0,1,2 --sweep data.decode=exact,fast"""


def main():
    """Writes the images, compares 1,000 of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    made = []
    for path in sorted(p for p in options.small.rglob("*") if p.is_file()):
        made.append(options.large / path.relative_to(options.small).with_suffix(".jpg"))
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            width, height = image.size
            large = image.convert("RGB").resize(
                (width * options.times, height * options.times),
                Image.Resampling.BICUBIC,
            )
            large.save(made[-1], quality=92)
    if not made:
        parser.error(f"{options.small} holds no images: give the folder of train/")
    sample = [path.read_bytes() for path in made[:: max(1, len(made) // 1000)]]
    print(json.dumps({"grey levels apart": differences(sample, width)}))
    print(SWEEP.format(root=options.large))


if __name__ == "__main__":
    main()
