"""The training transform with nearly the same pixels in less time, by OpenCV.

What is drawn is what `transforms.py` draws, so only pixels differ. Deviation from timm:
JPEG files are decoded at 1/2, 1/4 or 1/8 where the crop stays as large as the output,
which the decoder does before its cosine transform; OpenCV resizes, without a wider
filter up to a shrinking by 1.5; and it moves pixels, always bilinear. A JPEG with
damaged data in its middle is accepted.

`benchmarks/input.py` measures the speed and how far the pixels are from the exact ones.
The effect on training was not measured.
"""

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from sparx_jax.data.rand_augment import Draw
from sparx_jax.data.transforms import (
    Choice,
    decode_image,
    finish,
    make_choose,
    mean_color,
)
from sparx_jax.errors import UserError

AREA_FROM = 1.5  # shrinking from which averaging over areas is worth its time

# Where the pixel at (x, y) comes from, as the matrix of an affine map.
_MATRICES = {
    "ShearX": lambda factor, width, height: ((1, factor, 0), (0, 1, 0)),
    "ShearY": lambda factor, width, height: ((1, 0, 0), (factor, 1, 0)),
    "TranslateXRel": lambda share, width, height: ((1, 0, share * width), (0, 1, 0)),
    "TranslateYRel": lambda share, width, height: ((1, 0, 0), (0, 1, share * height)),
}


def fast_train_transform(data: Any) -> tuple[Callable, Callable]:
    """The training transform in two parts, for `crop` "resized".

    Args:
      data: as for `transforms.train_transform`.

    Returns:
      `decode(image, rng) -> (cut, choice)` for an encoded image or an array, and
      `transform((cut, choice), rng)`, which gives the uint8 array.

    Raises:
      UserError: OpenCV is not installed, or a setting is wrong.
    """
    cv2 = _import_cv2()
    cv2.setNumThreads(0)  # each picture has a thread or process already
    if data.crop != "resized":
        raise UserError("data.decode='fast' needs data.crop='resized'.")
    size = data.image_size
    decode = partial(_decode, choose=make_choose(data), size=size)
    return decode, partial(_transform, size=size, fill=mean_color(data))


def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "data.decode='fast' needs OpenCV: pip install opencv-python-headless, or "
            "set data.decode='exact'."
        ) from error
    return cv2


def _decode(image, rng, *, choose, size):
    if isinstance(image, np.ndarray) or image[:2] != b"\xff\xd8":
        return _cut_decoded(image, rng, choose)
    header = Image.open(io.BytesIO(image))  # reads the size and decodes nothing
    if header.mode not in ("RGB", "L"):
        return _cut_decoded(image, rng, choose)
    cv2 = _import_cv2()
    choice = choose(*header.size, rng)
    left, top, right, bottom = choice.box
    shrinking = min(right - left, bottom - top) / size
    scale = next(k for k in (8, 4, 2, 1) if k <= shrinking or k == 1)
    mode = {
        1: cv2.IMREAD_COLOR_RGB,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[scale]
    encoded = np.frombuffer(image, np.uint8)
    pixels = cv2.imdecode(encoded, mode | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("damaged or truncated")
    if scale > 1:
        pixels = pixels[..., ::-1]  # these modes know only blue, green, red
    cut = pixels[
        top // scale : math.ceil(bottom / scale),
        left // scale : math.ceil(right / scale),
    ]
    return cut, choice


def _cut_decoded(image, rng, choose):
    decoded = decode_image(image)
    choice = choose(*decoded.size, rng)
    return np.asarray(decoded.crop(choice.box)), choice


def _transform(cut_and_choice: tuple[np.ndarray, Choice], rng, *, size, fill):
    del rng  # the choice is made
    cv2 = _import_cv2()
    cut, choice = cut_and_choice
    if max(cut.shape[:2]) > AREA_FROM * size:
        how = cv2.INTER_AREA
    elif choice.resample == Image.Resampling.BICUBIC:
        how = cv2.INTER_CUBIC
    else:
        how = cv2.INTER_LINEAR
    image = Image.fromarray(cv2.resize(cut, (size, size), interpolation=how))
    return np.asarray(finish(image, choice, fill, operate))


def operate(draw: Draw, image: Image.Image, fill: tuple) -> Image.Image:
    """`draw.apply`, with moves of pixels by OpenCV."""
    if draw.name not in (*_MATRICES, "Rotate"):
        return draw.apply(image, fill)
    cv2, (width, height) = _import_cv2(), image.size
    if draw.name == "Rotate":
        centre = ((width - 1) / 2, (height - 1) / 2)
        matrix, inverse = cv2.getRotationMatrix2D(centre, draw.argument, 1.0), 0
    else:
        matrix = np.array(_MATRICES[draw.name](draw.argument, width, height), float)
        # Pillow counts from the corner of the first pixel, OpenCV from its centre.
        matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
        inverse = cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(
        np.asarray(image),
        matrix,
        image.size,
        flags=cv2.INTER_LINEAR | inverse,
        borderValue=fill,
    )
    return Image.fromarray(moved)
