"""The training transform with nearly the same pixels in less time.

What is drawn is what `transforms.py` draws, so only pixels differ. Deviation from timm:
JPEG files are decoded at 1/2, 1/4 or 1/8 where the crop stays as large as the output,
which the decoder does before its cosine transform; OpenCV resizes, without a wider
filter up to a shrinking by 1.5, and moves pixels, always bilinear; sharpness and colour
are rounded otherwise. Files that are no plain JPEG, or damaged, are left to Pillow.

The decoder is simplejpeg's libjpeg-turbo, whose pixels are Pillow's. Its faster cosine
transform would save 1 % of the decoding and add 0.7 grey levels of difference.

`benchmarks/input.py` measures the speed and how far the pixels are from the exact ones,
`benchmarks/decode.py` leads to the effect on training, which is in docs/training.md.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from PIL import Image

from sparx_jax.data.config import DataConfig
from sparx_jax.data.rand_augment import MATRICES, Draw
from sparx_jax.data.transforms import Choice, decode_image, make_choose, mean_color
from sparx_jax.errors import UserError

AREA_FROM = 1.5  # shrinking from which averaging over areas is worth its time

# A channel's new value follows from its old one: read off at each value once.
_BY_VALUE = (
    *("Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    "BrightnessIncreasing",
)
_VALUES = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's


def fast_train_transform(data: DataConfig) -> tuple[Callable, Callable]:
    """The training transform in two parts; `data.crop` must be "resized".

    Returns:
      `decode(image, rng) -> (cut, choice)` for an encoded image or an array, and
      `transform((cut, choice), rng)`, which gives the uint8 array.

    Raises:
      UserError: OpenCV or simplejpeg is not installed.
    """
    _imports()  # or what is missing is told late
    size = data.image_size
    decode = partial(_decode, choose=make_choose(data), size=size)
    return decode, partial(_transform, size=size, fill=mean_color(data))


@cache
def _imports():
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise UserError(
            "data.decode='fast' needs OpenCV and simplejpeg: pip install "
            "opencv-python-headless simplejpeg, or set data.decode='exact'."
        ) from error
    cv2.setNumThreads(0)  # each image has a thread or process already
    return cv2, simplejpeg


def _decode(image, rng, *, choose, size):
    if (shape := _rgb_jpeg_shape(image)) is None:
        decoded = decode_image(image)
        choice = choose(*decoded.size, rng)
        return np.asarray(decoded.crop(choice.box)), choice
    height, width = shape
    choice = choose(width, height, rng)
    left, top, right, bottom = choice.box
    shrinking = min(right - left, bottom - top) / size
    # Only these scales have vector instructions in libjpeg-turbo.
    scale = next(k for k in (8, 4, 2, 1) if k <= shrinking or k == 1)
    least = dict(min_height=-(-height // scale), min_width=-(-width // scale))
    _, simplejpeg = _imports()
    try:
        pixels = simplejpeg.decode_jpeg(image, "RGB", **least)
    except ValueError:  # where libjpeg only warns, Pillow decides
        return np.asarray(decode_image(image).crop(choice.box)), choice
    rows = slice(top // scale, -(-bottom // scale))
    return pixels[rows, left // scale : -(-right // scale)], choice


def _rgb_jpeg_shape(image):
    """Height and width of an encoded JPEG whose colours this decoder knows, or None."""
    if isinstance(image, np.ndarray):
        return None
    _, simplejpeg = _imports()
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
    except (ValueError, KeyError):  # KeyError: a subsampling that it cannot name
        return None
    return (height, width) if colors in ("YCbCr", "Gray") else None


def _transform(cut_and_choice: tuple[np.ndarray, Choice], rng, *, size, fill):
    del rng  # the choice is made
    cv2, _ = _imports()
    cut, choice = cut_and_choice
    if max(cut.shape[:2]) > AREA_FROM * size:
        how = cv2.INTER_AREA
    elif choice.resample == Image.Resampling.BICUBIC:
        how = cv2.INTER_CUBIC
    else:
        how = cv2.INTER_LINEAR
    image = cv2.resize(cut, (size, size), interpolation=how)
    if choice.flip:
        image = cv2.flip(image, 1)
    for draw in choice.operations:
        image = operate(draw, image, fill)
    return image


def operate(draw: Draw, image: np.ndarray, fill: tuple) -> np.ndarray:
    """`draw.apply` on a uint8 array (height, width, 3), most of it by OpenCV."""
    cv2, _ = _imports()
    if draw.name in MATRICES or draw.name == "Rotate":
        return _move(draw, image, fill)
    if draw.name in _BY_VALUE:
        return cv2.LUT(image, np.asarray(draw.apply(_VALUES, fill))[..., 0])
    factor = draw.argument
    if draw.name == "SharpnessIncreasing":
        smooth = cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE)
        return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)
    if draw.name == "ColorIncreasing":
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, factor, grey, 1 - factor, 0)
    return np.asarray(draw.apply(Image.fromarray(image), fill))


def _move(draw, image, fill):
    cv2, _ = _imports()
    height, width = image.shape[:2]
    if draw.name == "Rotate":
        centre = ((width - 1) / 2, (height - 1) / 2)
        matrix, inverse = cv2.getRotationMatrix2D(centre, draw.argument, 1.0), 0
    else:
        numbers = MATRICES[draw.name](draw.argument, width, height)
        matrix = np.array(numbers, float).reshape(2, 3)
        # Pillow counts from the corner of the first pixel, OpenCV from its centre.
        matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
        inverse = cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR | inverse,
        borderValue=fill,
    )
