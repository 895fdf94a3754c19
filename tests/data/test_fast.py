"""The fast training transform: the same draws as the exact one, nearly its pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sparx_jax.data.config import DataConfig
from sparx_jax.data.fast import fast_train_transform, operate
from sparx_jax.data.rand_augment import OPERATIONS, Draw
from sparx_jax.data.transforms import decode_image, train_transform

pytest.importorskip("cv2")
pytest.importorskip("simplejpeg")

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def config(**changes):
    defaults = dict(image_size=96, interpolation="random", mean=(0.5, 0.4, 0.3))
    return DataConfig(**defaults | changes)


def encoded(number, format="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[number]).save(buffer, format)
    return buffer.getvalue()


def both(data, image, seed):
    decode, transform = fast_train_transform(data)
    rng = np.random.default_rng(seed)
    fast = transform(decode(image, rng), rng).astype(int)
    return fast, train_transform(data)(decode_image(image), np.random.default_rng(seed))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [96, 224])  # the first decodes at a half and a quarter
def test_fast_images_are_close_to_the_exact_ones(format, size):
    for seed in range(8):
        fast, exact = both(config(image_size=size), encoded(seed % 2, format), seed)
        assert fast.shape == exact.shape
        assert np.abs(fast - exact).mean() < 6, seed  # grey levels


def test_subsampling_that_simplejpeg_cannot_name_is_left_to_pillow():
    """4:4:1."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "JPEG", subsampling="4:1:1")
    content = bytearray(buffer.getvalue())
    content[content.find(b"\xff\xc0") + 11] = 0x14  # as many blocks, one on another
    fast, exact = both(config(), bytes(content), 0)
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_moves_go_where_the_exact_ones_go(name, sign):
    image = Image.fromarray(load_sample_images().images[0]).resize((61, 48))
    draw = Draw(name, 7.0, sign, Image.Resampling.BILINEAR)
    fill = (124, 116, 104)
    fast = operate(draw, np.asarray(image), fill).astype(int)
    exact = np.asarray(draw.apply(image, fill), int)
    back = np.asarray(draw._replace(sign=-sign).apply(image, fill), int)
    assert np.abs(fast - exact).mean() < 2 < np.abs(fast - back).mean()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - set(MOVES)))
@pytest.mark.parametrize("sign", [-1, 1])
def test_other_operations_differ_by_rounding(name, sign):
    image = Image.fromarray(load_sample_images().images[0]).resize((61, 48))
    draw = Draw(name, 7.0, sign, Image.Resampling.BILINEAR)
    fast = operate(draw, np.asarray(image), (0, 0, 0)).astype(int)
    exact = np.asarray(draw.apply(image, (0, 0, 0)), int)
    inner = (slice(1, -1),) * 2  # Pillow does not smooth the border
    assert np.abs(fast - exact)[inner].max() <= 3
    assert np.abs(fast - exact).mean() < 1


@pytest.mark.parametrize("kind", ["grey", "CMYK", "bytes after the end"])
def test_files_that_are_no_plain_jpeg_are_read_as_by_pillow(kind):
    image = Image.open(io.BytesIO(encoded(0)))
    mode = {"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB")
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG")
    fast, exact = both(config(), buffer.getvalue() + b"more" * (mode == "RGB"), 0)
    assert np.abs(fast - exact).mean() < 6


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_truncated_files_are_rejected(share):
    decode, _ = fast_train_transform(config())
    image = encoded(0)
    with pytest.raises(OSError, match=r"truncated|cannot identify"):
        decode(image[: int(share * len(image))], np.random.default_rng(0))
