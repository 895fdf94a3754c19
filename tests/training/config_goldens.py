"""Every recipe, resolved: python -m tests.training.config_goldens renews the texts."""

from pathlib import Path

from configs import cifar10, digits, imagenet
from sparx_jax.training.config import as_dict, from_config_dict

FOLDER = Path(__file__).parents[1] / "goldens/configs"
RECIPES = {
    "cifar10": (cifar10.get_config, 10),
    "digits": (digits.get_config, 10),
    **{
        f"imagenet_{name}": (lambda name=name: imagenet.get_config(name), 1000)
        for name in imagenet.VARIANTS
    },
}
"""Name of the text -> (function that makes the config, classes of the data set)."""


def text(name):
    """A line for each setting that the run would have, "data.image_size = 224"."""
    make, num_classes = RECIPES[name]
    config = from_config_dict(make(), num_classes=num_classes)
    return "".join(f"{line}\n" for line in _lines(as_dict(config)))


def _lines(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value!r}"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name in RECIPES:
        (FOLDER / f"{name}.txt").write_text(text(name))
