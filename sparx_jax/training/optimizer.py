"""AdamW with clipping, warm-up and cosine, and the rule for weight decay."""

import re
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import optax

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


def is_decayed(path: str) -> bool:
    """Whether weight decay acts on the parameter `path`."""
    for pattern, decayed in WEIGHT_DECAY_RULES:
        if re.search(pattern, path):
            return decayed
    raise ValueError(
        f"no weight-decay rule for parameter {path!r}: add one to WEIGHT_DECAY_RULES"
    )


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


def gradient_norm(grads: dict[str, Array]) -> Array:
    """The global norm; the many short arrays as one, or each has kernels of its own."""
    short = [grad for grad in grads.values() if grad.ndim == 1]
    rest = [grad for grad in grads.values() if grad.ndim != 1]
    return optax.tree.norm([jnp.concatenate(short), *rest] if short else rest)


def make_optimizer(
    config: OptimizerConfig,
) -> optax.GradientTransformationExtraArgs:
    """AdamW of Loshchilov and Hutter after clipping by the global gradient norm.

    `update` needs `learning_rate` and `grad_norm`, scalars that its caller has anyway.
    Gradients and updates are those of the `trainable` parameters alone. With layer
    decay the updates, weight decay included, shrink with the layers up to the head.
    The state has the form of `optax.adamw`'s.
    """

    betas_eps = config.beta1, config.beta2, config.eps
    adam = optax.scale_by_adam(*betas_eps)

    def init(params):
        mask = lambda params: {path: is_decayed(path) for path in params}  # noqa: E731
        adamw = optax.adamw(0.0, *betas_eps, mask=mask)
        return adamw.init(trainable(params, config.frozen))

    @partial(jax.jit, static_argnums=0)  # hundreds of arrays, but fewer shapes
    def update_one(decayed, grad, mu, nu, param, count, scale, rate):
        state = optax.ScaleByAdamState(count, mu, nu)
        update, state = adam.update(scale * grad, state)
        if decayed:
            update += config.weight_decay * param
        return -rate * update, state.mu, state.nu

    def update(grads, state, params, *, learning_rate, grad_norm):
        scale = 1.0
        if config.clip_norm:
            scale = jnp.minimum(scale, config.clip_norm / grad_norm)
        layers = layer_numbers(params) if config.layer_decay < 1 else {}
        head = max(layers.values(), default=0)
        (count, mu, nu), *others = state
        moved = {}
        for path, grad in grads.items():
            rate = learning_rate * config.layer_decay ** (head - layers.get(path, head))
            arrays = grad, mu[path], nu[path], params[path]
            moved[path] = update_one(is_decayed(path), *arrays, count, scale, rate)
        updates, mu, nu = ({p: m[i] for p, m in moved.items()} for i in range(3))
        adam_state = optax.ScaleByAdamState(optax.safe_increment(count), mu, nu)
        return updates, (adam_state, *others)

    return optax.GradientTransformationExtraArgs(init, update)
