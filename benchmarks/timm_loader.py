"""timm's transforms behind torch's DataLoader; run by torch's Python.

Each line COUNT on standard input is answered after so many batches. What timm does on
the GPU (normalising, erasing) or while it collates (mixup) is left out, as it is left
out of ours.
"""

import sys

import torch
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder


def repair_posterize():
    """Level 10 keeps 0 bits, which Pillow 13 refuses; older ones gave black."""
    from timm.data import auto_augment

    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **kwargs: (
        posterize(image, bits, **kwargs) if bits else image.point([0] * 768)
    )


def main(root, batch_size, workers):
    torch.set_num_threads(1)
    repair_posterize()
    transform = create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        use_prefetcher=True,
    )
    dataset = ImageFolder(root, transform)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=10**7),
        num_workers=workers,
        collate_fn=fast_collate,
        drop_last=True,
    )
    batches = iter(loader)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
