"""RandAugment equals timm's: the pixels of each operation, and the law of the draws."""

import json

import numpy as np
import pytest
from PIL import Image

from sparx_jax.data.rand_augment import (
    OPERATIONS,
    RESAMPLINGS,
    Draw,
    RandAugment,
    parse,
)
from sparx_jax.errors import UserError
from tests.laws import agree

SPEC = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
SIGNED = "Rotate ShearX ShearY TranslateXRel TranslateYRel".split()
ENHANCE = "Color Contrast Brightness Sharpness".split()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_timm_in_every_pixel(timm, name):
    cases = json.loads(str(timm["cases"]))
    compared = 0
    for picture, outs in zip(timm["pictures"], timm["operated"], strict=True):
        for (case, level, sign, resample), expected in zip(cases, outs, strict=True):
            if case == name:
                out = Draw(name, level, sign, Image.Resampling(resample)).apply(
                    Image.fromarray(picture), FILL
                )
                np.testing.assert_array_equal(out, expected)
                compared += 1
    assert compared >= 2


def test_level_ten_of_posterize_is_black(timm):
    # What timm gives with the Pillow of its time; Pillow 13 fails there.
    draw = Draw("PosterizeIncreasing", 10.0, 1, Image.Resampling.BILINEAR)
    assert not np.asarray(draw.apply(Image.fromarray(timm["pictures"][0]), FILL)).any()


def test_100_000_draws_follow_the_law_of_timm(timm):
    law, rng = parse(SPEC), np.random.default_rng(0)
    names = json.loads(str(timm["ra_names"]))
    assert names == list(OPERATIONS)
    pairs, negative, levels = np.zeros((16, 16), int), np.zeros((15, 2), int), []
    resampled = []
    for _ in range(100_000):
        draws = law.draw(rng, RESAMPLINGS["random"])
        seen = [names.index(draw.name) for draw in draws]
        pairs[tuple([*seen, 15, 15][:2])] += 1
        for index, draw in zip(seen, draws, strict=True):
            levels.append(draw.level)
            negative[index, int(draw.sign < 0)] += 1
            resampled.append(int(draw.resample))
    assert agree(pairs, timm["ra_pairs"])
    assert agree(np.histogram(levels, np.linspace(6.5, 10, 36))[0], timm["ra_levels"])
    for index, name in enumerate(names):
        if name in SIGNED or name.removesuffix("Increasing") in ENHANCE:
            assert agree(negative[index], timm["ra_negative"][index])
    assert agree(np.bincount(resampled)[2:], [1, 1] * np.array(len(resampled) // 2))


@pytest.mark.parametrize(
    "other", ["rand-m9-mstd0.6-inc1", "rand-m8-mstd0.5-inc1", "rand-m9-inc1"]
)
def test_the_comparison_of_levels_notices_another_law(timm, other):
    rng, law = np.random.default_rng(0), parse(other)
    levels = [
        d.level for _ in range(20_000) for d in law.draw(rng, RESAMPLINGS["bicubic"])
    ]
    counts = np.histogram(levels, np.linspace(6.5, 10, 36))[0]
    assert not agree(counts, timm["ra_levels"])


def test_a_fixed_interpolation_is_never_drawn():
    rng, law = np.random.default_rng(0), parse(SPEC)
    seen = {
        d.resample for _ in range(99) for d in law.draw(rng, RESAMPLINGS["bilinear"])
    }
    assert seen == {Image.Resampling.BILINEAR}


def test_weighted_draws_do_not_repeat_and_prefer_the_heavy():
    law, rng = parse("rand-n3-p1-inc1-tweights"), np.random.default_rng(0)
    names = [
        [draw.name for draw in law.draw(rng, RESAMPLINGS["random"])] for _ in range(500)
    ]
    assert all(len(set(chosen)) == 3 for chosen in names)
    flat = [name for chosen in names for name in chosen]
    assert flat.count("Rotate") > 300 > 20 > flat.count("Invert")


@pytest.mark.parametrize(
    "spec, law",
    [
        ("rand-inc1", RandAugment()),
        (SPEC, RandAugment(level=9, deviation=0.5)),
        (
            "rand-inc1-n3-m15-p0.25-mmax20-mstd101",
            RandAugment(15, 3, 0.25, 101.0, 20),
        ),
    ],
)
def test_specification_is_read_as_timm_reads_it(spec, law):
    assert parse(spec) == law


def test_a_deviation_above_100_makes_levels_uniform():
    law, rng = parse("rand-m8-mstd101-p1-inc1"), np.random.default_rng(0)
    levels = [
        d.level for _ in range(5000) for d in law.draw(rng, RESAMPLINGS["random"])
    ]
    counts = np.histogram(levels, 8, (0, 8))[0]
    assert counts.sum() == 10_000 and agree(counts, np.full(8, 10_000))


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("augmix-m3", "does not begin with 'rand'"),
        ("rand-m9", "'inc1' is missing"),
        ("rand-m9-inc0", "'inc1' is missing"),
        ("rand-m9.5-inc1", "'m9.5' is none of"),
        ("rand-m-inc1", "'m' is none of"),
        ("rand--inc1", "'' is none of"),
        ("rand-w0-inc1", "'w0' is none of"),
        ("rand-m9-m8-inc1", "'m' is given twice"),
        ("rand-n0-inc1", "n must be from 1"),
        ("rand-n16-inc1-tweights", "n must be from 1 to 15"),
        ("rand-p1.5-inc1", "p must be"),
    ],
)
def test_any_other_specification_is_refused(spec, reason):
    with pytest.raises(UserError, match=reason):
        parse(spec)


def test_a_greatest_level_of_0_is_the_default():
    assert parse("rand-inc1-mmax0") == RandAugment()
