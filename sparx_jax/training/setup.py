"""From a config to what a run works with: settings, images, devices."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sparx_jax.data import Source, open_source
from sparx_jax.errors import UserError
from sparx_jax.parallel import make_mesh
from sparx_jax.training.config import Config, from_config_dict


class Setup(NamedTuple):
    """What training and evaluation share."""

    config: Config
    train_source: Source
    eval_source: Source
    mesh: Mesh


def prepare(settings: ConfigDict, *, training: bool = True) -> Setup:
    """Opens the data, counts its classes and checks the batch sizes.

    Nothing is compiled yet: bad input is told within seconds.

    Args:
      settings: of the run.
      training: whether `batch_size` is needed, and not `eval_batch_size` alone.

    Raises UserError.
    """
    data = from_config_dict(settings).data
    train_source, eval_source = (open_source(data, s) for s in ("train", "eval"))
    num_classes = len(train_source.class_names)
    if num_classes < 2:
        raise UserError(
            f"{train_source.class_names[0]!r} is the only class of the training "
            "images: give at least two, each in a folder of its own."
        )
    config = from_config_dict(settings, num_classes=num_classes)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_sizes(config, mesh.size, training=training)
    return Setup(config, train_source, eval_source, mesh)


def check_batch_sizes(config: Config, devices: int, *, training: bool = True) -> None:
    """Raises UserError if a batch cannot be split evenly over the devices."""
    parts = {"batch_size": config.accumulation_steps} if training else {}
    for name, count in (parts | {"eval_batch_size": 1}).items():
        size, divisor = getattr(config, name), devices * count
        if size % divisor:
            times = f" times {count} accumulation steps" if count > 1 else ""
            raise UserError(
                f"config.{name}={size} must be a multiple of {devices} device(s)"
                f"{times}: use {max(size // divisor, 1) * divisor}."
            )


def process_share() -> dict[str, int]:
    """Which part of every global batch this process reads."""
    return dict(process_index=jax.process_index(), process_count=jax.process_count())
