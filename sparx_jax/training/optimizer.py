"""AdamW with clipping, warm-up and cosine, and the rule for weight decay."""

import re

import optax

from sparx_jax.training.config import OptimizerConfig

# (pattern of a parameter's path, whether it is decayed); the first match counts.
# The authors' trainer exempts 1-D tensors and names that end in ".bias".  Their layer
# scale, step-size bias and A are not 1-D, so they are decayed; their skip weight is.
WEIGHT_DECAY_RULES = (
    (r"_residual\.scale$", True),
    (r"\.(bias|scale|skip)$", False),
    (r"\.(kernel|x_proj|dt_proj|dt_bias|a_log)$", True),
)


def is_decayed(path: str) -> bool:
    """Whether weight decay acts on the parameter `path`."""
    for pattern, decayed in WEIGHT_DECAY_RULES:
        if re.search(pattern, path):
            return decayed
    raise ValueError(f"no weight-decay rule for parameter {path!r}: add one")


def learning_rate(config: OptimizerConfig, warmup_steps: int, total_steps: int):
    """Schedule: linear from `warmup_lr` to `lr`, then a half cosine to `min_lr`."""
    return optax.warmup_cosine_decay_schedule(
        config.warmup_lr, config.lr, warmup_steps, total_steps, config.min_lr
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW of Loshchilov and Hutter after clipping by the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm
        else optax.identity(),
        optax.adamw(
            schedule,
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {path: is_decayed(path) for path in params},
        ),
    )
