"""The two compiled functions of a run: one training step, one evaluation step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from sparx_jax.layers.norm import BatchNorm
from sparx_jax.ops import batch_on, by_platform
from sparx_jax.parallel import batch_sharding, replicated, state_shardings
from sparx_jax.training.config import Config
from sparx_jax.training.mixing import erase, mix
from sparx_jax.training.optimizer import gradient_norm, is_frozen, trainable
from sparx_jax.training.state import (
    Network,
    TrainState,
    Weights,
    batch_stats,
    merge,
)
from sparx_jax.typing import Array, Float, Int, UInt8

Batch = dict[str, Array]
Metrics = dict[str, Array]


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple, std: tuple
) -> Float[Array, "b h w c"]:
    """uint8 pixels to float32 with the mean and deviation of each channel removed."""
    mean, std = (jnp.asarray(m, jnp.float32) for m in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def smooth_targets(
    labels: Int[Array, " b"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b k"]:
    """One-hot targets with `smoothing` of the mass spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(
    logits: Float[Array, "b k"], targets: Float[Array, "b k"]
) -> Float[Array, " b"]:
    """Cross entropy in nats, in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def train_step(
    graphdef: nnx.GraphDef,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    seed: Array,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One update of weights, statistics, moments and moving average.

    The loss is the mean over the examples, each with its weight: the targets carry it,
    so that a mixture of two images learns only from the one that could be read.
    Where the loss or the gradient is not finite only the step number moves on: no NaN
    gets into the state.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    targets = smooth_targets(
        batch["label"], config.model.num_classes, config.label_smoothing
    )
    targets = targets * batch["weight"][:, None]
    images, targets = mix(key, batch["image"], targets, config.mixing)
    images = normalize(images, config.data.mean, config.data.std)
    images = erase(key, images, config.mixing.erasing)

    # Of all devices, and unchanged by mixing; 1 if nothing could be read.
    num_examples = jnp.maximum(batch["weight"].sum(), 1.0)

    (params, stats), frozen = state.weights, config.optimizer.frozen

    def loss_and_stats(trained, stats, images, targets, key):
        model = merge(graphdef, Weights(params | trained, stats))
        _freeze_statistics(model, frozen)
        logits = model(images, key=key)
        loss = cross_entropy(logits, targets).sum() / num_examples
        return loss, batch_stats(model)

    gradient = partial(
        jax.value_and_grad(loss_and_stats, has_aux=True), trainable(params, frozen)
    )
    parts = config.accumulation_steps
    if parts == 1:
        (loss, stats), grads = gradient(stats, images, targets, key)
    else:
        loss, stats, grads = _in_parts(gradient, parts, stats, images, targets, key)
    rate, grad_norm = schedule(state.step), gradient_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def move(grads, stats, old):
        weights, ema, opt_state = old
        params = weights.params

        def update():
            updates, moments = optimizer.update(
                grads, opt_state, params, learning_rate=rate, grad_norm=grad_norm
            )
            moved = optax.apply_updates({path: params[path] for path in grads}, updates)
            return Weights(params | moved, stats), moments

        weights, opt_state = lax.cond(finite, update, lambda: (weights, opt_state))
        if ema is not None:  # by itself, or its kernels would compute the update again
            share = 1.0 - config.ema_decay
            # The average of a frozen weight stays that weight; the sum of two products
            # in optax.incremental_update would drift away by rounding.
            follow = jax.jit(lambda old, new: old + share * (new - old))
            average = partial(jax.tree.map, follow)
            ema = lax.cond(finite, average, lambda old, _: old, ema, weights)
        return weights, ema, opt_state

    old = state.weights, state.ema, state.opt_state
    new = by_platform(grads, stats, old, cpu=_raveled(move), default=move)
    metrics = {
        "train_loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "skipped": ~finite,
        "unreadable": jnp.sum(batch["weight"] == 0),
    }
    return TrainState(state.step + 1, *new), metrics


def _in_parts(gradient, parts, stats, images, targets, key):
    """Sums of loss and gradient; one part after the other moves the statistics."""

    def add(sums, part):
        loss, stats, grads = sums
        images, targets, number = part
        (more_loss, stats), more = gradient(
            stats, images, targets, jax.random.fold_in(key, number)
        )
        return (loss + more_loss, stats, jax.tree.map(jnp.add, grads, more)), None

    def split(x):  # every device has as much of each part, and none has to move
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    images, targets = split(images), split(targets)
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    (loss, _), grads = jax.eval_shape(gradient, stats, images[0], targets[0], key)
    start = zeros(loss), stats, zeros(grads)
    return lax.scan(add, start, (images, targets, jnp.arange(parts)))[0]


def _raveled(move):
    """`move` on arrays of one axis.

    XLA:CPU compiles equal kernels once, and there are fewer sizes than shapes.  Adam
    does not mind; an optimizer that does, such as Muon, must do without.
    """

    def on_vectors(*args):
        new = move(*jax.tree.map(jnp.ravel, args))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), new, args[-1])

    return on_vectors


def _freeze_statistics(model, frozen):
    """A frozen BatchNorm normalises by its averages, which then stay as they are."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            name = ".".join(map(str, (*path, "scale")))
            module.use_running_average |= is_frozen(name, frozen)


def eval_step(
    graphdef: nnx.GraphDef, config: Config, weights: Weights, batch: Batch
) -> dict[str, Array]:
    """Sums over the examples of weight 1, and the answer to each example."""
    images = normalize(batch["image"], config.data.mean, config.data.std)
    logits, labels = merge(graphdef, weights)(images), batch["label"]
    targets = smooth_targets(labels, logits.shape[-1])
    score = jnp.take_along_axis(logits, labels[:, None], -1)
    # The label's rank among the classes; a tie counts against it, and so does a NaN.
    rank = jnp.sum(~(logits < score), -1) - 1
    weight, top = batch["weight"], min(5, logits.shape[-1])
    return {
        "loss": jnp.sum(cross_entropy(logits, targets) * weight),
        "top1": jnp.sum((rank < 1) * weight),
        "top5": jnp.sum((rank < top) * weight),
        "examples": jnp.sum(weight),
        "index": batch["index"],
        "label": labels,
        "predicted": jnp.argmax(logits, -1),
        "probability": jnp.max(jax.nn.softmax(logits), -1),
    }


def jit_train_step(
    network: Network,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """`(seed, state, batch) -> (state, metrics)`; the old state's memory is reused.

    The seed is an argument so that runs that differ in it share what is compiled.
    """
    shardings = state_shardings(state, mesh)
    step = partial(train_step, network.train, config, optimizer, schedule)
    return jax.jit(
        batch_on(mesh, step),
        in_shardings=(replicated(mesh), shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=1,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def compile_train_step(
    network: Network,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """`(state, batch) -> (state, metrics)` of the config's seed."""
    step = jit_train_step(network, config, optimizer, schedule, state, mesh)
    seed = jax.device_put(np.uint32(config.seed), replicated(mesh))
    return partial(step, seed)


def compile_eval_step(
    network: Network, config: Config, weights: Weights, mesh: Mesh
) -> Any:
    """`(weights, batch) -> sums and answers`, the same on every process."""
    return jax.jit(
        batch_on(mesh, partial(eval_step, network.eval, config)),
        in_shardings=(state_shardings(weights, mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def compiler_options(platform: str) -> dict[str, str] | None:
    """On CPU YNNPACK for sums alone: Eigen's matrix products are the faster ones."""
    if platform != "cpu":
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
