"""Image transforms on the host: Pillow in, uint8 out, torchvision's rounding rules."""

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from sparx_jax.errors import UserError

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height of random resized crops


def train_transform(data: Any) -> Callable[[Image.Image, np.random.Generator], Any]:
    """The augmentation that the `data` configuration describes.

    Args:
      data: attributes `image_size`, pixels; `flip`, whether to mirror half of the
        images; and `crop`. With "resized", a random part of the image, `scale` =
        (least, greatest) share of its area, is stretched to the image size. With
        "padded", the shorter edge is resized to the image size (if it differs) and a
        random square is cut from the image bordered by `crop_padding` black pixels.

    Returns:
      A function from (RGB image, generator) to a uint8 array (image_size, image_size,
      3), which draws all its randomness from the generator.

    Raises:
      UserError: `crop` is neither.
    """
    crop = _by_crop(
        data,
        resized=partial(random_resized_crop, scale=tuple(data.scale)),
        padded=partial(random_padded_crop, padding=data.crop_padding),
    )
    return partial(_augment, size=data.image_size, crop=crop, flip=data.flip)


def eval_transform(data: Any) -> Callable[[Image.Image], np.ndarray]:
    """Resizes the shorter edge, bicubic, and cuts the centre out.

    Args:
      data: attributes `image_size`, pixels, and `crop`. With "resized", the shorter
        edge becomes round(image_size / `crop_ratio`) pixels. With "padded" it becomes
        the image size, as in training, so an image of that size passes unchanged.

    Returns:
      A function from an RGB image to a uint8 array (image_size, image_size, 3).

    Raises:
      UserError: `crop` is neither, or `crop_ratio` is not in (0, 1].
    """
    ratio = _by_crop(data, resized=data.crop_ratio, padded=1.0)
    if not 0 < ratio <= 1:
        raise UserError(f"data.crop_ratio is {ratio}: use a number in (0, 1].")
    edge = round(data.image_size / ratio)
    return partial(_resize_and_crop, edge=edge, size=data.image_size)


def decode_image(image: bytes | np.ndarray) -> Image.Image:
    """An RGB image from an encoded file or from a uint8 array (height, width, 3).

    Transparency is dropped and 16 bits become 8. Pillow is strict: unlike OpenCV it
    rejects truncated and damaged files.

    Raises:
      Exception: of many kinds, as Pillow's decoders raise them.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    decoded = Image.open(io.BytesIO(image))
    if decoded.mode.startswith("I;16"):  # convert() would clip at 255, not rescale
        decoded = Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8))
    return decoded.convert("RGB")


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, scale: tuple
) -> Image.Image:
    """Crops a random box and resizes it, bicubic, to `size` x `size` pixels.

    Crops first: Pillow's `resize(box=...)` also reads pixels outside of the box.
    """
    box = random_crop_box(*image.size, scale, rng)
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def random_crop_box(
    width: int, height: int, scale: tuple, rng: np.random.Generator
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


def random_padded_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, padding: int
) -> Image.Image:
    """Cuts a random `size` x `size` square from the image with a black border.

    The shorter edge is first resized to `size` pixels if it differs.
    """
    image = resize_shorter_edge(image, size)
    high = np.array(image.size) + padding - size
    left, top = rng.integers(-padding, high, endpoint=True).tolist()
    # Pillow fills what lies outside of the image with zeros.
    return image.crop((left, top, left + size, top + size))


def resize_shorter_edge(image: Image.Image, edge: int) -> Image.Image:
    """Resizes, bicubic, to `edge` pixels; the longer edge is rounded down."""
    short = min(image.size)
    if short == edge:
        return image
    size = tuple(int(edge * length / short) for length in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cuts the central `size` x `size` square; a half pixel rounds to the even one."""
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def _by_crop(data, **choices):
    if data.crop not in choices:
        raise UserError(f"data.crop is {data.crop!r}: use 'resized' or 'padded'.")
    return choices[data.crop]


def _augment(image, rng, *, size, crop, flip):
    image = crop(image, size, rng)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def _resize_and_crop(image, *, edge, size):
    return np.asarray(center_crop(resize_shorter_edge(image, edge), size))
