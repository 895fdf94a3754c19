"""Mixup, cutmix and random erasing of a batch on the device, with timm's distributions.

Source: timm 1.0.31, data/mixup.py (mode "batch") and data/random_erasing.py (mode
"pixel", one box). All randomness comes from the key, whatever the number of devices.
"""

import math

import jax
import jax.numpy as jnp

from sparx_jax.training.config import MixingConfig
from sparx_jax.typing import Array, Float, Int, Key, UInt8

# What is folded into the step's key; the network's drop path folds in 0.
MIX_KEY, ERASE_KEY = 2**20, 2**20 + 1
ERASED_SHARE = (0.02, 1 / 3)  # of the image's area
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ATTEMPTS = 10  # boxes that are tried before an image is left as it is


def mix(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    targets: Float[Array, "b k"],
    config: MixingConfig,
) -> tuple[UInt8[Array, "b h w c"], Float[Array, "b k"]]:
    """Mixes the batch with itself backwards, one draw for all images.

    Grey levels are mixed and rounded before the images are normalised, as timm's
    trainer does it.

    Args:
      key: of the step.
      images: not normalised.
      targets: smoothed, each row with sum 1.
      config: what is on; if nothing is, the batch returns as it is.
    """
    if not (config.probability and (config.mixup or config.cutmix)):
        return images, targets
    share, use_cutmix, box_key = draw_mix(jax.random.fold_in(key, MIX_KEY), config)
    height, width = images.shape[1:3]
    box = cutmix_box(box_key, share, height, width)
    area = (box[2] - box[0]) * (box[3] - box[1])
    cut_share = 1 - area / (height * width)  # the borders may have cut the box
    partners = images[::-1]  # from other devices, a byte a value
    cut = jnp.where(_inside(box, height, width)[..., None], partners, images)
    mixed = jnp.round(blend(images, partners, share)).astype(jnp.uint8)
    images = jnp.where(use_cutmix, cut, mixed)
    share = jnp.where(use_cutmix, cut_share, share)
    return images, blend(targets, targets[::-1], share)


def blend(x: Array, partner: Array, share: Float[Array, ""]) -> Float[Array, "..."]:
    """`share` of `x`, and the rest of `partner`, in float32."""
    x, partner = x.astype(jnp.float32), partner.astype(jnp.float32)
    # Not x * share + partner * (1 - share): of these two products XLA fuses one with
    # the sum, a different one where the partner lies on another device.
    return x + (1 - share) * (partner - x)


def draw_mix(
    key: Key[Array, ""], config: MixingConfig
) -> tuple[Float[Array, ""], Array, Key[Array, ""]]:
    """Share of the first image, whether by a box, and a key for the box."""
    on_key, kind_key, share_key, box_key = jax.random.split(key, 4)
    if config.mixup and config.cutmix:
        use_cutmix = jax.random.bernoulli(kind_key, config.switch)
    else:
        use_cutmix = jnp.asarray(config.cutmix > 0)
    alpha = jnp.where(use_cutmix, config.cutmix, config.mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    on = jax.random.bernoulli(on_key, config.probability)
    return jnp.where(on, share, 1.0), use_cutmix, box_key


def cutmix_box(
    key: Key[Array, ""], share: Float[Array, ""], height: int, width: int
) -> Int[Array, "4"]:
    """A box (top, left, bottom, right), end exclusive, of about 1 - share of the area.

    Its centre is uniform over the pixels; what sticks out is cut off.
    """
    size = jnp.array([height, width])
    edges = (size * jnp.sqrt(1 - share)).astype(jnp.int32)
    centre = jax.random.randint(key, (2,), 0, size)
    start = jnp.clip(centre - edges // 2, 0, size)
    return jnp.concatenate([start, jnp.clip(centre + (edges + 1) // 2, 0, size)])


def erase(
    key: Key[Array, ""], images: Float[Array, "b h w c"], probability: float
) -> Float[Array, "b h w c"]:
    """A box of some images becomes standard normal noise, each pixel its own.

    Args:
      key: of the step.
      images: normalised.
      probability: that an image gets a box; at 0 the batch returns as it is.
    """
    if not probability:
        return images
    box_key, noise_key = jax.random.split(jax.random.fold_in(key, ERASE_KEY))
    count, height, width, _ = images.shape
    boxes = erased_boxes(box_key, count, height, width, probability)
    inside = jax.vmap(lambda box: _inside(box, height, width))(boxes)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(inside[..., None], noise, images)


def erased_boxes(
    key: Key[Array, ""], count: int, height: int, width: int, probability: float
) -> Int[Array, "b 4"]:
    """For each image a box as in `cutmix_box`, empty if nothing is erased."""
    on_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
    shape, size = (count, ATTEMPTS), jnp.array([height, width])
    low, high = ERASED_SHARE
    area = jax.random.uniform(area_key, shape, minval=low, maxval=high) * height * width
    low, high = map(math.log, ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=low, maxval=high))
    edges = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], -1)
    edges = jnp.round(edges).astype(jnp.int32)
    fits = jnp.all(edges < size, -1)
    first = jnp.argmax(fits, 1)  # the first that fits, or 0
    edges = jnp.take_along_axis(edges, first[:, None, None], 1)[:, 0]
    erased = fits.any(1) & jax.random.bernoulli(on_key, probability, (count,))
    edges = jnp.where(erased[:, None], edges, 0)
    start = jax.random.randint(place_key, (count, 2), 0, size - edges + 1)
    return jnp.concatenate([start, start + edges], -1)


def _inside(box, height, width):
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    top, left, bottom, right = box
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
