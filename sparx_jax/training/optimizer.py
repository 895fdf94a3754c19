"""AdamW with clipping, warm-up and cosine, and the rule for weight decay."""

import re

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from sparx_jax.training.config import OptimizerConfig

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


def is_decayed(path: str) -> bool:
    """Whether weight decay acts on the parameter `path`."""
    for pattern, decayed in WEIGHT_DECAY_RULES:
        if re.search(pattern, path):
            return decayed
    raise ValueError(f"no weight-decay rule for parameter {path!r}: add one")


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
        return inner.init(_vectors(params)[0])

    def update(grads, state, params):
        vectors, split = _vectors(grads)
        updates, state = inner.update(vectors, state, _vectors(params)[0])
        return split(updates), state

    return optax.GradientTransformation(init, update)


def _vectors(arrays):
    """The arrays as one vector per weight-decay group, and how to undo that."""
    groups = {"decayed": {}, "free": {}}
    for path, array in arrays.items():
        groups["decayed" if is_decayed(path) else "free"][path] = array
    raveled = {name: ravel_pytree(group) for name, group in groups.items()}

    def split(vectors):
        parts = [back(vectors[n][: v.size]) for n, (v, back) in raveled.items()]
        return parts[0] | parts[1]

    def padded(vector):
        return jnp.pad(vector, (0, -vector.size % LENGTH_MULTIPLE))

    return {name: padded(vector) for name, (vector, _) in raveled.items()}, split
