"""The settings of the data, which `training/config.py` checks."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are cut and normalised."""

    name: Literal["digits", "folder", "tfds"] = "folder"
    root: str = ""
    """For `folder`: the folder that holds <split>/<class>/*.jpg; for `tfds`: the one
    that `python -m sparx_jax.data.prepare` wrote to (TFDS's `data_dir`)."""
    tfds_name: str = "imagenet2012"
    """For `tfds`: any of TFDS's sets for classification."""
    train_split: str = "train"
    eval_split: str = "test"
    decode: Literal["exact", "fast"] = "exact"
    """Training images equal to timm's in every pixel, or nearly so by OpenCV."""
    image_size: int = 224
    """Pixels of the square that the network sees."""
    crop: Literal["resized", "padded"] = "resized"
    """Training crop: a stretched random part, or a square of the padded image."""
    scale: tuple[float, ...] = (0.08, 1.0)
    """For `resized`: least and greatest share of the image's area."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """For `resized` and `rand_augment`; random: bilinear or bicubic, drawn each time.
    Evaluation is always bicubic."""
    crop_padding: int = 4
    """For `padded`: black pixels around the image."""
    crop_ratio: float = 0.9
    """For `resized`: image_size over the shorter edge in evaluation, in (0, 1]."""
    flip: bool = True
    """Mirrors half of the training images."""
    rand_augment: str = ""
    """Operations drawn for each training image, in timm's form, such as
    "rand-m9-mstd0.5-inc1"; see `data.rand_augment.parse`."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, from 0 to 1, that normalisation removes (ImageNet's)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    workers: int = 0
    """Processes that prepare batches; 0: threads of the main process."""
    max_bad_fraction: float = 0.01
    """Share of a split's examples that may be unreadable, in [0, 1).  They are logged
    and count nowhere; a run that meets more of them stops with exit code 65."""
