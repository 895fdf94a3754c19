"""RandAugment: a few operations on each image, drawn from timm's distributions.

Cubuk et al., "RandAugment", arXiv:1909.13719. Which operations there are, how a level
becomes an argument, and the form of the specification are those of timm 1.0.31's
"increasing" set (timm/data/auto_augment.py); all images are RGB.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sparx_jax.errors import UserError

RESAMPLINGS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
"""What is drawn from, by the name of the interpolation."""


def draw_resampling(choices: tuple, rng: np.random.Generator) -> Image.Resampling:
    """One of them; if there is only one, nothing is drawn."""
    return choices[rng.integers(len(choices))] if len(choices) > 1 else choices[0]


def auto_contrast(image, argument, resample, fill):
    """Stretches each channel to the whole range."""
    return ImageOps.autocontrast(image)


def equalize(image, argument, resample, fill):
    """Makes the histogram of each channel flat."""
    return ImageOps.equalize(image)


def invert(image, argument, resample, fill):
    """The negative."""
    return ImageOps.invert(image)


def rotate(image, degrees, resample, fill):
    """Rotates about the centre, counterclockwise."""
    return image.rotate(degrees, resample, fillcolor=fill)


def posterize(image, bits, resample, fill):
    """Keeps the highest `bits`, 0 to 8, of each channel.

    Deviation: 0 bits give black, as they did in timm until Pillow 13 forbade them.
    """
    return image.point([value >> 8 - bits << 8 - bits for value in range(256)] * 3)


def solarize(image, threshold, resample, fill):
    """Inverts the values from `threshold` on."""
    return ImageOps.solarize(image, threshold)


def solarize_add(image, add, resample, fill):
    """Adds to the values below 128."""
    table = [min(255, v + add) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


class Operation(NamedTuple):
    """A pure function of an image and what its level means."""

    apply: Callable
    """(image, argument, resample, fill) -> image."""
    argument: Callable
    """(level, sign) -> argument; the level is from 0 to 10, the sign -1 or 1."""
    weight: float
    """Relative frequency in the weighted set."""


def _signed(greatest):
    return lambda level, sign: sign * (level / 10 * greatest)


def _enhancing(kind, weight):
    """Towards grey, the mean grey, black or a smooth image at 0; away above 1."""
    return Operation(
        lambda image, factor, resample, fill: kind(image).enhance(factor),
        lambda level, sign: max(0.1, 1 + sign * (level / 10 * 0.9)),
        weight,
    )


# Where the pixel at (x, y) comes from, as the six numbers of an affine map.
MATRICES = {
    "ShearX": lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    "TranslateXRel": lambda share, width, height: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, width, height: (1, 0, 0, 0, 1, share * height),
}


def _moving(name, greatest, weight):
    def move(image, argument, resample, fill):
        affine, matrix = Image.Transform.AFFINE, MATRICES[name](argument, *image.size)
        return image.transform(image.size, affine, matrix, resample, fillcolor=fill)

    return Operation(move, _signed(greatest), weight)


OPERATIONS = {
    "AutoContrast": Operation(auto_contrast, lambda level, sign: None, 0.25),
    "Equalize": Operation(equalize, lambda level, sign: None, 0.05),
    "Invert": Operation(invert, lambda level, sign: None, 0.05),
    "Rotate": Operation(rotate, _signed(30.0), 3),
    "PosterizeIncreasing": Operation(
        posterize, lambda level, sign: max(0, 4 - int(level / 10 * 4)), 0.05
    ),
    "SolarizeIncreasing": Operation(
        solarize, lambda level, sign: 256 - min(256, int(level / 10 * 256)), 0.05
    ),
    "SolarizeAdd": Operation(
        solarize_add, lambda level, sign: min(128, int(level / 10 * 110)), 0.05
    ),
    "ColorIncreasing": _enhancing(ImageEnhance.Color, 0.25),
    "ContrastIncreasing": _enhancing(ImageEnhance.Contrast, 0.05),
    "BrightnessIncreasing": _enhancing(ImageEnhance.Brightness, 0.05),
    "SharpnessIncreasing": _enhancing(ImageEnhance.Sharpness, 0.25),
    "ShearX": _moving("ShearX", 0.3, 2),
    "ShearY": _moving("ShearY", 0.3, 2),
    "TranslateXRel": _moving("TranslateXRel", 0.45, 1),
    "TranslateYRel": _moving("TranslateYRel", 0.45, 1),
}
"""By timm's names."""

_NAMES = tuple(OPERATIONS)
_WEIGHTS = np.array([operation.weight for operation in OPERATIONS.values()])
_WEIGHTS /= _WEIGHTS.sum()


class Draw(NamedTuple):
    """One operation with all that was drawn for it."""

    name: str
    level: float
    sign: int
    resample: Image.Resampling

    @property
    def argument(self):
        """What the level means to this operation: degrees, a factor, bits..."""
        return OPERATIONS[self.name].argument(self.level, self.sign)

    def apply(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """The image after the operation; `fill` is the colour of what moves in."""
        apply = OPERATIONS[self.name].apply
        return apply(image, self.argument, self.resample, fill)


@dataclass(frozen=True)
class RandAugment:
    """The law from which the operations of an image are drawn; see `parse`."""

    level: int = 10
    count: int = 2
    probability: float = 0.5
    deviation: float = 0.0
    max_level: int = 10
    weighted: bool = False

    def draw(self, rng: np.random.Generator, resamplings: tuple) -> list[Draw]:
        """The operations for one image, in their order.

        Args:
          rng: of all randomness.
          resamplings: a value of `RESAMPLINGS`.
        """
        if self.weighted:
            chosen = rng.choice(len(_NAMES), self.count, replace=False, p=_WEIGHTS)
        else:
            chosen = rng.integers(len(_NAMES), size=self.count)
        draws = []
        for index in chosen:
            if rng.random() >= self.probability:
                continue
            level = self.level
            if self.deviation > 100:  # timm's way to say uniform
                level = rng.uniform(0, level)
            elif self.deviation:
                level = rng.normal(level, self.deviation)
            level = max(0.0, min(level, self.max_level))
            sign = 1 if rng.random() < 0.5 else -1
            resample = draw_resampling(resamplings, rng)
            draws.append(Draw(_NAMES[index], level, sign, resample))
        return draws


def parse(spec: str) -> RandAugment:
    """Reads timm's specification, such as "rand-m9-mstd0.5-inc1".

    After "rand" come, in any order, `m` level (whole, 10 if absent), `n` operations a
    image (2), `p` probability that a chosen one is applied (0.5), `mstd` deviation of
    the level (0; above 100 the level is uniform from 0 to m), `mmax` greatest level
    (10), `tweights` for the weighted choice, and `inc1`, which must be there: only the
    operations that grow with the level are made.

    Raises:
      UserError: the specification is anything else.
    """

    def refuse(reason):
        raise UserError(
            f"data.rand_augment is {spec!r}: {reason}; write it like "
            "'rand-m9-mstd0.5-inc1', or '' for none."
        )

    head, *parts = spec.split("-")
    if head != "rand":
        refuse("it does not begin with 'rand'")
    values = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|mmax|inc)(\d+)|(p|mstd)(\d+(?:\.\d+)?)", part)
        if part == "tweights":
            key, value = "tweights", True
        elif not match:
            refuse(f"{part!r} is none of m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights")
        elif match[1]:
            key, value = match[1], int(match[2])
        else:
            key, value = match[3], float(match[4])
        if key in values:
            refuse(f"{key!r} is given twice")
        values[key] = value
    if values.pop("inc", 0) != 1:
        refuse("'inc1' is missing")
    weighted = values.get("tweights", False)
    count, most = values.get("n", 2), len(OPERATIONS) if weighted else 100
    if not 1 <= count <= most:
        refuse(f"n must be from 1 to {most}")
    if values.get("p", 0.5) > 1:
        refuse("p must be from 0 to 1")
    return RandAugment(
        level=values.get("m", 10),
        count=count,
        probability=values.get("p", 0.5),
        deviation=values.get("mstd", 0.0),
        max_level=values.get("mmax", 10) or 10,  # as in timm, 0 is the default
        weighted=weighted,
    )
