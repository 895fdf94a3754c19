"""Laws of the transforms: geometry, randomness, and what the decoder accepts."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sparx_jax.data import DataConfig, decode_image, eval_transform, train_transform
from sparx_jax.data.rand_augment import Draw
from sparx_jax.data.transforms import Choice, apply_choice, random_crop_box
from tests.laws import agree, box_law

FILL = (124, 116, 104)


def config(**changes):
    defaults = dict(image_size=32, flip=False, mean=(0.5, 0.4, 0.3))
    return DataConfig(**defaults | changes)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_random_resized_crop_obeys_scale_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_crop_box(400, 400, rng, scale=(0.1, 0.5)) for _ in range(4000)]
    )
    assert boxes.min() >= 0 and boxes.max() <= 400
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, log_ratio = width * height / 400**2, np.log(width / height)
    assert 0.098 < share.min() < 0.102 and 0.49 < share.max() < 0.51
    assert abs(share.mean() - 0.3) < 0.01  # uniform
    assert 0.28 < np.abs(log_ratio).max() < np.log(4 / 3) + 0.02
    assert abs(log_ratio.mean()) < 0.01  # log-uniform
    centre = (boxes[:, :2] + boxes[:, 2:]).mean(0) / 2
    np.testing.assert_allclose(centre, 200, atol=3)


@pytest.mark.parametrize(
    "size, box",
    [
        ((100, 10), (43, 0, 56, 10)),
        ((10, 100), (0, 43, 10, 56)),
        ((8, 9), (0, 0, 8, 9)),
    ],
)
def test_crop_that_never_fits_falls_back_to_the_centre(size, box):
    rng = np.random.default_rng(0)
    assert random_crop_box(*size, rng, scale=(1.5, 2.0)) == box  # larger than the image


def digest(pixels):
    text = str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.sha256(text).hexdigest()


def photograph(number, turned=False):
    image = Image.fromarray(load_sample_images().images[number])
    image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    return image.crop((0, 0, image.width - 3 * turned, image.height - number))


def test_evaluation_and_training_equal_timm_in_every_pixel(timm):
    expected = json.loads(str(timm["transforms"]))
    for key, value in expected.items():
        kind, *arguments = json.loads(key)
        if kind == "eval":
            number, turned, size, ratio = arguments
            data = config(image_size=size, crop_ratio=ratio)
            out = eval_transform(data)(photograph(number, turned))
        else:
            box, size, resample, flip, draws = arguments
            draws = [Draw(*draw) for draw in draws]
            choice = Choice(tuple(box), Image.Resampling(resample), flip, draws)
            out = np.asarray(apply_choice(photograph(0), choice, size, FILL))
        assert digest(out) == value, key
    assert len(expected) == 20


def test_random_crops_follow_the_law_of_timm(timm):
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_crop_box(32, 48, rng, scale=(0.08, 1)) for _ in range(100_000)]
    )
    left, top, right, bottom = boxes.T
    law = box_law(np.stack([top, left, bottom - top, right - left], 1), 48)
    for counts, expected in zip(law, timm["crop_boxes"], strict=True):
        assert agree(counts, expected)


def test_a_random_interpolation_is_bilinear_or_bicubic():
    image, data = noise(90, 70), config(interpolation="random", scale=(1.0, 1.0))
    outs = {
        train_transform(data)(
            image.resize((64, 64)), np.random.default_rng(k)
        ).tobytes()
        for k in range(12)
    }
    expected = {
        np.asarray(image.resize((64, 64)).resize((32, 32), resample)).tobytes()
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    }
    assert expected <= outs


def test_rand_augment_is_the_last_and_fills_with_the_mean():
    data = config(rand_augment="rand-m9-n1-p1-inc1")
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    outs = [train_transform(data)(image, np.random.default_rng(k)) for k in range(60)]
    colours = {tuple(pixel) for out in outs for pixel in out.reshape(-1, 3).tolist()}
    assert (128, 102, 76) in colours  # 0.5, 0.4 and 0.3 of 255, to even


def test_random_resized_crop_crops_before_it_resizes():
    image, data = noise(90, 70), config()
    box = random_crop_box(*image.size, np.random.default_rng(5), scale=data.scale)
    expected = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    out = train_transform(data)(image, np.random.default_rng(5))
    np.testing.assert_array_equal(out, expected)


def test_padded_crops_are_the_windows_of_the_zero_padded_image():
    image, data = noise(8, 8), config(image_size=8, crop="padded", crop_padding=2)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    windows = {
        padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)
    }
    rng, transform = np.random.default_rng(0), train_transform(data)
    assert {transform(image, rng).tobytes() for _ in range(400)} == windows


def test_half_of_the_images_are_mirrored():
    image = noise(8, 8)
    data = config(image_size=8, crop="padded", crop_padding=0, flip=True)
    rng, transform = np.random.default_rng(0), train_transform(data)
    outs = [transform(image, rng).tobytes() for _ in range(400)]
    original = np.asarray(image)
    mirrored = outs.count(original[:, ::-1].tobytes())
    assert 160 < mirrored < 240
    assert outs.count(original.tobytes()) == 400 - mirrored


@pytest.mark.parametrize("crop", ["resized", "padded"])
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (7, 50), (131, 64)])
def test_every_image_becomes_a_uint8_square(crop, size):
    data = config(crop=crop, flip=True)
    image = noise(*size)
    outs = (
        train_transform(data)(image, np.random.default_rng(0)),
        eval_transform(data)(image),
    )
    for out in outs:
        assert out.shape == (32, 32, 3) and out.dtype == np.uint8


def test_train_transform_draws_only_from_its_generator():
    image, transform = noise(50, 40), train_transform(config(flip=True))
    first, second, other = (
        transform(image, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(
    "size, resized, corner",
    [((100, 75), (46, 35), (7, 2)), ((75, 104), (35, 48), (2, 8))],
)
def test_eval_transform_resizes_the_shorter_edge_and_cuts_the_centre(
    size, resized, corner
):
    # 32 / 0.9 = 35.6 -> 35; the longer edge rounds down; 1.5 pixels round to 2.
    image, (left, top) = noise(*size), corner
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    expected = whole[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(eval_transform(config())(image), expected)


def test_eval_transform_passes_padded_images_of_the_right_size_unchanged():
    image = noise(32, 32)
    np.testing.assert_array_equal(eval_transform(config(crop="padded"))(image), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    decoded = decode_image(encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.mode == "RGB" and decoded.size == (5, 4)
    assert np.asarray(decoded).min() > 250


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_arrays_become_rgb_too(shape):
    decoded = decode_image(np.full(shape, 7, np.uint8))
    assert np.asarray(decoded).tolist() == np.full((4, 5, 3), 7).tolist()


def test_sixteen_bits_are_rescaled_to_eight():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(grey))))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_are_rejected(format):
    encoded = encode(noise(64, 64), format)
    with pytest.raises(Exception):  # noqa: B017 (Pillow raises many kinds)
        decode_image(encoded[: len(encoded) // 2])


def test_padded_crops_of_a_long_image_show_little_of_the_border():
    image = Image.new("RGB", (40, 8), (255, 255, 255))
    transform = train_transform(config(image_size=8, crop="padded", crop_padding=2))
    rng = np.random.default_rng(0)
    outs = np.stack([transform(image, rng) for _ in range(100)])
    assert (outs[:, 2:6, 2:6] == 255).all()  # at most 2 pixels of the border
    assert (outs == 255).all((1, 2, 3)).any()
