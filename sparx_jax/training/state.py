"""What training keeps: flat dicts of arrays.  Only this file takes models apart."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from sparx_jax import models
from sparx_jax.parallel import check_rules, state_shardings
from sparx_jax.typing import Array


class Weights(NamedTuple):
    """All arrays of a network by path, such as "stages.0.blocks.1.mlp_norm.scale"."""

    params: dict[str, Array]
    batch_stats: dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a training step reads and writes."""

    step: Array
    """Steps taken so far; all randomness of a step is a function of it and the seed."""
    weights: Weights
    ema: Weights | None
    """Exponential moving average of `weights`, if the configuration wants one."""
    opt_state: Any


class Network(NamedTuple):
    """The structure of a model without its arrays, in both modes."""

    train: nnx.GraphDef
    eval: nnx.GraphDef


def split(model: models.Backbone) -> tuple[Network, Weights]:
    """Takes a model in evaluation mode apart."""
    graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    model.train()
    train_graphdef = nnx.graphdef(model)
    model.eval()
    return Network(train_graphdef, graphdef), Weights(*map(_flat, states))


def merge(graphdef: nnx.GraphDef, weights: Weights) -> models.Backbone:
    """Puts a model together, in the mode of `graphdef`."""
    return nnx.merge(graphdef, *map(_nested, weights))


def batch_stats(model: models.Backbone) -> dict[str, Array]:
    """The BatchNorm statistics of a model that has just run."""
    return _flat(nnx.state(model, nnx.BatchStat))


def init(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    seed: int,
    use_ema: bool,
    mesh: Mesh,
) -> tuple[Network, TrainState]:
    """A fresh state on the mesh; every process draws the same weights from `seed`."""
    network, like = init_abstract(config, optimizer, use_ema=use_ema, mesh=mesh)
    _, weights = split(models.build(config, seed))
    weights = jax.device_get(weights)  # every process gives the same to its devices
    shardings = jax.tree.map(lambda x: x.sharding, like)
    first = partial(_first_state, optimizer, use_ema)
    return network, jax.jit(first, out_shardings=shardings)(weights)


def init_abstract(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    use_ema: bool,
    mesh: Mesh,
) -> tuple[Network, TrainState]:
    """As `init`, with shapes, dtypes and shardings in place of arrays."""
    network, weights = split(nnx.eval_shape(lambda: models.build(config, 0)))
    state = jax.eval_shape(partial(_first_state, optimizer, use_ema), weights)
    check_rules(state)

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return network, jax.tree.map(placed, state, state_shardings(state, mesh))


def _first_state(optimizer, use_ema, weights):
    ema = jax.tree.map(jnp.copy, weights) if use_ema else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, weights, ema, optimizer.init(weights.params))


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: a target for restoring."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def _flat(state):
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}


def _nested(arrays):
    def keys(path):
        return tuple(int(k) if k.isdigit() else k for k in path.split("."))

    return nnx.from_flat_state({keys(path): array for path, array in arrays.items()})
