"""The recipes of configs/ are complete and valid."""

import difflib

import pytest

from configs import imagenet
from sparx_jax import list_models
from sparx_jax.errors import UserError
from sparx_jax.training.config import as_dict, changes_of_run, from_config_dict
from sparx_jax.training.loop import plan
from tests.training import config_goldens


@pytest.mark.parametrize("name", config_goldens.RECIPES)
def test_resolved_recipe_is_the_recorded_one(name):
    path = config_goldens.FOLDER / f"{name}.txt"
    old, new = path.read_text(), config_goldens.text(name)
    if old != new:
        lines = (text.splitlines() for text in (old, new))
        diff = difflib.unified_diff(*lines, str(path), "now", lineterm="", n=0)
        pytest.fail(
            "\n".join(diff) + "\nIf that is meant, renew the texts: "
            "python -m tests.training.config_goldens",
            pytrace=False,
        )


def test_every_text_has_its_recipe():
    texts = {path.stem for path in config_goldens.FOLDER.iterdir()}
    assert texts == set(config_goldens.RECIPES)


@pytest.mark.parametrize("variant", list_models("*_[tsb]"))
def test_every_released_size_has_a_recipe_that_is_valid(variant):
    config = from_config_dict(imagenet.get_config(variant), num_classes=1000)
    assert config.model_name == variant


@pytest.mark.parametrize("variant", list_models("*swin_[tsb]"))
def test_recipe_of_windows_is_swins(variant):
    config = from_config_dict(imagenet.get_config(variant), num_classes=1000)
    optimizer = config.optimizer
    rates = optimizer.lr, optimizer.warmup_lr, optimizer.min_lr
    assert rates == (1e-3, 1e-6, 1e-5)  # of main.py for a batch of 1024
    assert (config.batch_size, config.data.crop_ratio) == (1024, 0.875)
    assert not config.use_ema and config.cooldown_epochs == 0


@pytest.mark.parametrize("variant", list_models("sparx_mamba_[tsb]"))
def test_imagenet_recipe_is_the_authors(variant):
    config = from_config_dict(imagenet.get_config(variant), num_classes=1000)
    assert config.model_name == variant
    expected = {"sparx_mamba_t": (0.2, 0.9), "sparx_mamba_s": (0.3, 0.95)}
    drop_path, crop_ratio = expected.get(variant, (0.5, 0.95))
    assert config.model.drop_path_rate == drop_path
    settings = as_dict(config)
    assert settings["mixing"] == dict(
        mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, erasing=0.25
    )
    assert settings["optimizer"] == dict(
        lr=4e-3,
        warmup_lr=1e-6,
        min_lr=1e-5,
        warmup_epochs=20.0,
        weight_decay=0.05,
        clip_norm=5.0,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        layer_decay=1.0,
        frozen="",
    )
    data = config.data
    assert (data.crop_ratio, data.scale) == (crop_ratio, (0.08, 1.0))
    assert (data.interpolation, data.rand_augment, data.flip) == (
        *("random", "rand-m9-mstd0.5-inc1", True),
    )


def test_cooldown_follows_the_schedule():
    config = from_config_dict(imagenet.get_config(), num_classes=1000)
    lengths = plan(config, 2048 * 100)
    assert (lengths.schedule_steps, lengths.total_steps) == (30_000, 31_000)
    assert lengths.warmup_steps == 2_000


def test_home_is_found_where_no_shell_does_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = imagenet.get_config("sparx_mamba_t")
    settings.data.root, settings.init_from = "~/images", "~/runs/t"
    config = from_config_dict(settings)
    assert (config.data.root, config.init_from) == (
        "/home/me/images",
        "/home/me/runs/t",
    )


def test_an_unknown_variant_is_refused():
    with pytest.raises(UserError, match="sparx_mamba_s"):
        imagenet.get_config("sparx_mamba_xl")


@pytest.mark.parametrize(
    "name, value", [("dtype", "bfloat16"), ("drop_path_rate", 0.3)]
)
def test_what_alters_the_run_is_no_free_setting(run, name, value):
    settings = as_dict(run.config)
    other = settings | {"model": settings["model"] | {name: value}}
    assert len(changes_of_run(settings, other)) == 1
