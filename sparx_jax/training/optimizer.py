"""AdamW with clipping, warm-up and cosine, and the rule for weight decay."""

import re
from collections.abc import Iterable

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from sparx_jax.errors import UserError
from sparx_jax.training.config import OptimizerConfig
from sparx_jax.typing import Array

# (pattern of a parameter's path, whether it is decayed); the first match counts.
# The authors' trainer exempts 1-D tensors and names that end in ".bias".  Their layer
# scale, step-size bias and A are not 1-D, so they are decayed; their skip weight is.
WEIGHT_DECAY_RULES = (
    (r"_residual\.scale$", True),
    (r"\.(bias|scale|skip)$", False),
    (r"\.position_bias$", False),  # exempt in Swin's trainer
    (r"\.(kernel|x_proj|dt_proj|dt_bias|a_log)$", True),
)

# Of the optimizer's vectors, whatever the mesh, so that any `fsdp` can split them.
LENGTH_MULTIPLE = 1024
_PADDING = "~"  # to that length; behind the names of all parameters


def is_decayed(path: str) -> bool:
    """Whether weight decay acts on the parameter `path`."""
    for pattern, decayed in WEIGHT_DECAY_RULES:
        if re.search(pattern, path):
            return decayed
    raise ValueError(f"no weight-decay rule for parameter {path!r}: add one")


def is_frozen(path: str, frozen: str) -> bool:
    """Whether the expression `frozen`, "" for none, matches the beginning of `path`."""
    return bool(frozen) and re.match(frozen, path) is not None


def trainable(params: dict[str, Array], frozen: str) -> dict[str, Array]:
    """The parameters that `frozen` leaves.

    Raises UserError if it takes none or all of them.
    """
    left = {path: a for path, a in params.items() if not is_frozen(path, frozen)}
    if frozen and len(left) in (0, len(params)):
        raise UserError(
            f"config.optimizer.frozen={frozen!r} matches {'no' if left else 'every'} "
            f"parameter: they begin with {', '.join(sorted(_beginnings(params)))}."
        )
    return left


def _beginnings(params):
    return {".".join(path.split(".")[:2]) for path in params}


def layer_numbers(paths: Iterable[str]) -> dict[str, int]:
    """The place of each parameter between the stem, 0, and the head.

    Every block is a layer; a downsampling is of the block that follows it, the last
    norm of the last block. Source: param_groups_layer_decay of timm 1.0.31 and its
    groups of Swin's parameters, after BEiT (arXiv:2106.08254).
    """
    places = {path: re.match(r"stages\.(\d+)\.blocks\.(\d+)", path) for path in paths}
    blocks = sorted(
        {tuple(map(int, match.groups())) for match in places.values() if match}
    )
    number = {block: i for i, block in enumerate(blocks, 1)}

    def layer(path, match):
        if match:
            return number[tuple(map(int, match.groups()))]
        kind, _, rest = path.partition(".")
        if kind == "downsamples":
            return number[int(rest[0]) + 1, 0]
        return {"stem": 0, "head": len(blocks) + 1}.get(kind, len(blocks))

    return {path: layer(path, match) for path, match in places.items()}


def learning_rate(config: OptimizerConfig, warmup_steps: int, total_steps: int):
    """Schedule: linear from `warmup_lr` to `lr`, then a half cosine to `min_lr`.

    Deviation: by step; the authors' trainer changes the rate once an epoch, and its
    cosine counts from step 0 instead of from the end of the warm-up.
    """
    return optax.warmup_cosine_decay_schedule(
        config.warmup_lr, config.lr, warmup_steps, total_steps, config.min_lr
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW of Loshchilov and Hutter after clipping by the global gradient norm.

    Gradients and updates are those of the `trainable` parameters alone. With layer
    decay the updates, weight decay included, shrink with the layers up to the head.
    Works on two long vectors, of the decayed parameters and of the others: arithmetic
    on each of hundreds of arrays by itself takes XLA longer to compile than the
    gradient of a small network.
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    inner = optax.chain(
        clip if config.clip_norm else optax.identity(),
        optax.adamw(
            schedule,
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask={"decayed": True, "free": False},
        ),
    )

    def init(params):
        return inner.init(_vectors(trainable(params, config.frozen))[0])

    def update(grads, state, params):
        vectors, split = _vectors(grads)
        trained = {path: params[path] for path in grads}
        updates, state = inner.update(vectors, state, _vectors(trained)[0])
        updates = split(updates)
        if config.layer_decay < 1:
            layers = layer_numbers(params)
            above = {path: max(layers.values()) - layers[path] for path in updates}
            updates = {
                p: u * config.layer_decay ** above[p] for p, u in updates.items()
            }
        return updates, state

    return optax.GradientTransformation(init, update)


def gradient_norm(grads: dict[str, Array]) -> Array:
    """The global norm, of the vectors that the optimizer makes too."""
    return optax.tree.norm(_vectors(grads)[0])


def _vectors(arrays):
    """The arrays as one vector per weight-decay group, and how to undo that."""
    groups = {"decayed": {}, "free": {}}
    for path, array in arrays.items():
        groups["decayed" if is_decayed(path) else "free"][path] = array
    for group in groups.values():
        size = sum(array.size for array in group.values())
        group[_PADDING] = jnp.zeros(-size % LENGTH_MULTIPLE)
    raveled = {name: ravel_pytree(group) for name, group in groups.items()}

    def split(vectors):
        parts = [back(vectors[name]) for name, (_, back) in raveled.items()]
        return {p: a for part in parts for p, a in part.items() if p != _PADDING}

    return {name: vector for name, (vector, _) in raveled.items()}, split
