"""The network of a training run, for evaluation or as the start of another run."""

import os
from contextlib import closing
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from sparx_jax import models
from sparx_jax.checks import require
from sparx_jax.parallel import make_mesh, replicated
from sparx_jax.training import state as states
from sparx_jax.training.checkpoint import Checkpoints, WeightKind
from sparx_jax.training.state import Network, Weights


class Restored(NamedTuple):
    """What a checkpoint holds of a network."""

    network: Network
    weights: Weights
    kind: WeightKind
    step: int
    meta: dict[str, Any]
    """See `Checkpoints`."""


def load_run(
    workdir: str | os.PathLike,
    step: str | int = "best",
    weights: WeightKind | Literal["auto"] = "auto",
) -> models.Backbone:
    """The network that train.py trained, in evaluation mode, on the first device.

    Of a job of several processes all must call it.

    Args:
      workdir: the folder of the run.
      step: "best", "latest", or the number of one of its checkpoints.
      weights: "raw", "ema" for their moving average, "auto" for that if there is one.

    Raises UserError if there is no such checkpoint, DamagedError if it is damaged.
    """
    choices = "raw", "ema", "auto"
    require("weights", weights, weights in choices, f"one of {', '.join(choices)}")
    # On all devices: fingerprints add up what the processes hold.
    everywhere = replicated(make_mesh(-1, 1))
    found = restore_run(os.path.expanduser(workdir), str(step), weights, everywhere)
    here = jax.device_put(jax.device_get(found.weights), jax.local_devices()[0])
    return states.merge(found.network.eval, here)


def restore_run(
    workdir: str,
    step: str,
    weights: WeightKind | Literal["auto"],
    sharding: jax.sharding.Sharding,
) -> Restored:
    """As `load_run`, taken apart; all arrays get `sharding`."""
    with closing(Checkpoints(workdir, read_only=True)) as checkpoints:

        def restored(number):
            meta = checkpoints.meta(number)
            config = meta["config"]
            model = models.model_config(config["model_name"], **config["model"])
            network, like = states.split(nnx.eval_shape(lambda: models.build(model, 0)))
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                like,
            )
            kind, found = checkpoints.restore_weights(
                number, weights, like, config["model"]
            )
            return Restored(network, found, kind, number, meta)

        return checkpoints.read(step, restored)
