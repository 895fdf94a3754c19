"""Mixup, cutmix and erasing: timm's numbers for given draws, timm's laws of draws."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.training import mixing
from sparx_jax.training.config import MixingConfig
from sparx_jax.training.step import smooth_targets
from tests.laws import agree, box_law

HEIGHT, WIDTH = 48, 32  # of the pictures that timm's boxes were drawn for
BOTH = MixingConfig(mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def timm():
    path = Path(__file__).parents[1] / "data/goldens/timm.npz"
    with np.load(path) as file:
        return dict(file)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def as_law(boxes):
    """Of (top, left, height, width), as in the goldens."""
    top, left, bottom, right = np.asarray(boxes).T
    return box_law(np.stack([top, left, bottom - top, right - left], 1), HEIGHT)


@pytest.mark.parametrize("number, share, cutmix", [(0, 0.3137, False), (1, 0.5, True)])
def test_given_draws_give_the_numbers_of_timm(timm, monkeypatch, number, share, cutmix):
    images, labels = (jnp.asarray(timm[f"mix_{n}"]) for n in ("images", "labels"))
    drawn = jnp.float32(share), jnp.asarray(cutmix), None
    monkeypatch.setattr(mixing, "draw_mix", lambda *_: drawn)
    monkeypatch.setattr(mixing, "cutmix_box", lambda *_: jnp.array([1, 2, 6, 5]))
    config = MixingConfig(mixup=0.8, cutmix=1.0)
    targets = smooth_targets(labels, 5, 0.1)
    mixed, targets = mixing.mix(jax.random.key(0), images, targets, config)
    np.testing.assert_array_equal(mixed, timm[f"mixed_{number}"])
    np.testing.assert_allclose(targets, timm[f"target_{number}"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("config", [MixingConfig(mixup=0.8), MixingConfig(cutmix=1.0)])
def test_mixing_moves_weight_but_neither_adds_nor_loses_any(config):
    """Which is why the loss may divide by the weight before mixing."""
    images = jnp.zeros((4, 8, 8, 3), jnp.uint8)
    weight = jnp.array([1.0, 0.0, 1.0, 1.0])
    targets = smooth_targets(jnp.array([2, -1, 0, 1]), 5, 0.1) * weight[:, None]
    mixed = mixing.mix(jax.random.key(3), images, targets, config)[1]
    assert jnp.sum(mixed) == pytest.approx(3, rel=1e-6)
    rows = jnp.sum(mixed, 1)
    assert rows[1] + rows[2] == pytest.approx(1, rel=1e-6) and 0 < rows[1] < 1
    np.testing.assert_allclose(rows[jnp.array([0, 3])], 1, rtol=1e-6)


def test_kinds_and_shares_follow_the_law_of_timm(timm):
    draw = jax.jit(jax.vmap(lambda key: mixing.draw_mix(key, BOTH)[:2]))
    share, use_cutmix = map(np.asarray, draw(keys(20_000)))
    edges = np.linspace(0, 1, 21)
    counts = [np.histogram(share[use_cutmix == k], edges)[0] for k in (False, True)]
    assert agree(counts, timm["mix_lambdas"])
    assert not agree(counts[0], timm["mix_lambdas"][1])


def test_cutmix_boxes_and_shares_follow_the_law_of_timm(timm):
    @jax.jit
    @jax.vmap
    def draw(key):
        share, _, box_key = mixing.draw_mix(key, MixingConfig(cutmix=1.0))
        return mixing.cutmix_box(box_key, share, HEIGHT, WIDTH)

    boxes = np.asarray(draw(keys(20_000)))
    for counts, expected in zip(as_law(boxes), timm["cutmix_boxes"], strict=True):
        assert agree(counts, expected)
    top, left, bottom, right = boxes.T
    share = 1 - (bottom - top) * (right - left) / (HEIGHT * WIDTH)
    edges = np.linspace(0, 1, 21)
    assert agree(np.histogram(share, edges)[0], timm["cutmix_lambdas"])


def test_erased_boxes_follow_the_law_of_timm(timm):
    boxes = np.asarray(
        mixing.erased_boxes(jax.random.key(0), 100_000, HEIGHT, WIDTH, 0.25)
    )
    erased = boxes[boxes[:, 2] > boxes[:, 0]]
    others = int(timm["erased"])
    assert agree([len(erased), 100_000 - len(erased)], [others, 100_000 - others])
    for counts, expected in zip(as_law(erased), timm["erased_boxes"], strict=True):
        assert agree(counts, expected)


def test_erasing_puts_normal_noise_into_the_box_and_nothing_else():
    images = jnp.full((64, HEIGHT, WIDTH, 3), 9.0)
    out = np.asarray(mixing.erase(jax.random.key(1), images, 0.5))
    noise = out[out != 9.0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    changed = (out != 9.0).all(-1)
    assert 16 < changed.any((1, 2)).sum() < 48
    for picture in changed[changed.any((1, 2))]:
        rows, columns = picture.any(1), picture.any(0)
        assert (picture == rows[:, None] & columns).all()


@pytest.mark.parametrize(
    "config", [MixingConfig(mixup=0.8), MixingConfig(cutmix=1.0), BOTH]
)
def test_targets_stay_distributions_and_tell_the_shares_of_the_images(config):
    targets = smooth_targets(jnp.arange(6) % 4, 4, 0.1)
    grey = np.arange(6) * 50
    images = np.broadcast_to(grey[:, None, None, None], (6, 8, 8, 3)).astype(np.uint8)
    mix = jax.jit(lambda key: mixing.mix(key, jnp.asarray(images), targets, config))
    for key in keys(20):
        out, mixed = map(np.asarray, mix(key))
        np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-6)
        share = (out.mean((1, 2, 3)) - grey[::-1]) / (grey - grey[::-1])
        expected = share[:, None] * targets + (1 - share[:, None]) * targets[::-1]
        np.testing.assert_allclose(mixed, expected, atol=0.01)  # of a grey level of 50


def test_half_a_probability_leaves_half_of_the_batches_alone():
    config = MixingConfig(mixup=0.8, cutmix=1.0, probability=0.5)
    draw = jax.jit(jax.vmap(lambda key: mixing.draw_mix(key, config)[0]))
    assert 0.47 < float((draw(keys(4000)) == 1.0).mean()) < 0.53


def test_what_is_off_leaves_the_batch_alone():
    images, targets = jnp.ones((2, 4, 4, 3), jnp.uint8), jnp.ones((2, 5))
    out = mixing.mix(jax.random.key(0), images, targets, MixingConfig())
    assert out[0] is images and out[1] is targets
    assert mixing.erase(jax.random.key(0), images, 0.0) is images


PROGRAM = """
import hashlib, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sparx_jax.parallel import batch_sharding, make_mesh, replicated
from sparx_jax.training.config import MixingConfig
from sparx_jax.training.mixing import erase, mix
from sparx_jax.training.step import normalize, smooth_targets

config = MixingConfig(mixup=0.8, cutmix=1.0, erasing=0.5)
def run(step, images, labels):
    key = jax.random.fold_in(jax.random.key(3), step)
    images, targets = mix(key, images, smooth_targets(labels, 7, 0.1), config)
    images = normalize(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    return erase(key, images, config.erasing), targets
mesh = make_mesh()
split = batch_sharding(mesh)
run = jax.jit(run, in_shardings=(replicated(mesh), split, split), out_shardings=split)
rng = np.random.default_rng(0)
images = rng.integers(256, size=(8, 37, 29, 3)).astype(np.uint8)
for step in range(6):
    out = run(step, images, np.arange(8) % 7)
    print(*(hashlib.sha1(np.asarray(x).tobytes()).hexdigest() for x in out))
"""


@pytest.mark.slow
def test_one_two_and_four_devices_give_the_same_bits():
    outs = []
    for devices in (1, 2, 4):
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
        outs.append(done.stdout)
    assert outs[0] == outs[1] == outs[2]
    assert len(set(outs[0].split("\n"))) == 7  # each step another batch


def test_the_switch_is_the_share_of_cutmix():
    config = MixingConfig(mixup=0.8, cutmix=1.0, switch=0.9)
    draw = jax.jit(jax.vmap(lambda key: mixing.draw_mix(key, config)[1]))
    assert 0.87 < np.mean(draw(keys(2000))) < 0.93


def test_each_erased_image_has_noise_of_its_own():
    images = jnp.full((64, 48, 32, 3), 9.0)
    out = np.asarray(mixing.erase(jax.random.key(1), images, 1.0))
    noise = out[out != 9.0]
    assert len(np.unique(noise)) > 0.99 * len(noise)
