"""Image transforms on the host: Pillow in, uint8 out, torchvision's rounding rules."""

import io
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from sparx_jax.data.config import DataConfig
from sparx_jax.data.rand_augment import RESAMPLINGS, Draw, draw_resampling, parse

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height of random resized crops


def train_transform(
    data: DataConfig,
) -> Callable[[Image.Image, np.random.Generator], np.ndarray]:
    """The augmentation of `data`: crop, flip and `rand_augment`, in this order.

    With `crop` "resized", a random part of the image is stretched to the image size.
    With "padded", the shorter edge is resized to the image size (if it differs),
    bicubic, and a random square is cut from the image bordered by black pixels.
    `rand_augment` fills what moves in with the mean colour.

    Returns:
      A function from (RGB image, generator) to a uint8 array (image_size, image_size,
      3), which draws all its randomness from the generator.
    """
    return partial(
        _augment,
        size=data.image_size,
        padded=data.crop == "padded",
        choose=make_choose(data),
        fill=mean_color(data),
    )


def make_choose(
    data: DataConfig,
) -> Callable[[int, int, np.random.Generator], "Choice"]:
    """`(width, height, rng) -> Choice`, what `train_transform` draws."""
    if data.crop == "resized":
        box = partial(random_crop_box, scale=data.scale)
    else:
        box = partial(random_square, size=data.image_size, padding=data.crop_padding)
    return partial(
        _choose,
        box=box,
        resamplings=RESAMPLINGS[data.interpolation],
        flip=data.flip,
        rand_augment=parse(data.rand_augment) if data.rand_augment else None,
    )


def mean_color(data: DataConfig) -> tuple[int, ...]:
    """The mean of the channels in grey levels."""
    return tuple(round(255 * mean) for mean in data.mean)


def eval_transform(data: DataConfig) -> Callable[[Image.Image], np.ndarray]:
    """Resizes the shorter edge, bicubic, and cuts the centre out.

    With `crop` "resized", the shorter edge becomes image_size / `crop_ratio` pixels,
    rounded down. With "padded" it becomes the image size, as in training, so an image
    of that size passes unchanged. Source: timm's transforms_imagenet_eval; equal to it
    in every bit.

    Returns:
      A function from an RGB image to a uint8 array (image_size, image_size, 3).
    """
    ratio = data.crop_ratio if data.crop == "resized" else 1.0
    edge = math.floor(data.image_size / ratio)
    return partial(_resize_and_crop, edge=edge, size=data.image_size)


def decode_image(image: bytes | np.ndarray) -> Image.Image:
    """An RGB image from an encoded file or from an array: uint8 RGB, RGBA or grey.

    Transparency is dropped and 16 bits become 8. Pillow is strict: unlike OpenCV it
    rejects truncated and damaged files.

    Raises:
      Exception: of many kinds, as Pillow's decoders raise them.
    """
    is_array = isinstance(image, np.ndarray)
    decoded = Image.fromarray(image) if is_array else Image.open(io.BytesIO(image))
    if decoded.mode.startswith("I;16"):  # convert() would clip at 255, not rescale
        decoded = Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8))
    decoded.load()
    return decoded if decoded.mode == "RGB" else decoded.convert("RGB")


class Choice(NamedTuple):
    """All that is drawn for one training image."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels."""
    resample: Image.Resampling
    flip: bool
    operations: list[Draw]


def apply_choice(
    image: Image.Image, choice: Choice, size: int, fill: tuple[int, int, int]
) -> Image.Image:
    """A training image of `size` x `size` pixels, equal to timm's in every bit.

    Crops before it resizes: Pillow's `resize(box=...)` reads pixels outside of the box.
    """
    image = image.crop(choice.box)
    if image.size != (size, size):
        image = image.resize((size, size), choice.resample)
    if choice.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in choice.operations:
        image = operation.apply(image, fill)
    return image


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, *, scale: tuple
) -> tuple[int, int, int, int]:
    """A random (left, top, right, bottom) in pixels, by the law of torchvision.

    The share of the area is uniform in `scale` and the aspect ratio log-uniform in
    `ASPECT_RATIOS`; after ten boxes that do not fit it is the largest central box whose
    ratio is allowed. Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*np.log(ASPECT_RATIOS)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers((width - w + 1, height - h + 1)).tolist()
            return left, top, left + w, top + h
    narrowest, widest = ASPECT_RATIOS
    w = min(width, round(height * widest))
    h = min(height, round(width / narrowest))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_square(
    width: int, height: int, rng: np.random.Generator, *, size: int, padding: int
) -> tuple[int, int, int, int]:
    """A random square of `size` pixels within the image and `padding` around it.

    What lies outside of the image is black: Pillow's crop fills it with zeros.
    """
    high = np.array([width, height]) + padding - size
    left, top = rng.integers(-padding, high, endpoint=True).tolist()
    return left, top, left + size, top + size


def resize_shorter_edge(image: Image.Image, edge: int) -> Image.Image:
    """Resizes, bicubic, to `edge` pixels; the longer edge is rounded down.

    Raises ValueError where an image is so narrow that the result would fill memory.
    """
    short = min(image.size)
    if short == edge:
        return image
    size = tuple(int(edge * length / short) for length in image.size)
    if math.prod(size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError("{} x {} pixels: too narrow to be resized".format(*image.size))
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cuts the central `size` x `size` square; a half pixel rounds to the even one."""
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def _choose(width, height, rng, *, box, resamplings, flip, rand_augment):
    return Choice(
        box(width, height, rng),
        draw_resampling(resamplings, rng),
        flip and rng.random() < 0.5,
        rand_augment.draw(rng, resamplings) if rand_augment else [],
    )


def _augment(image, rng, *, size, padded, choose, fill):
    if padded:
        image = resize_shorter_edge(image, size)
    return np.asarray(apply_choice(image, choose(*image.size, rng), size, fill))


def _resize_and_crop(image, *, edge, size):
    return np.asarray(center_crop(resize_shorter_edge(image, edge), size))
