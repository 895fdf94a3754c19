"""Laws of the training and evaluation steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax

from sparx_jax import models
from sparx_jax.training import state as states
from sparx_jax.training import step as steps
from sparx_jax.training.config import MixingConfig
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import prepare
from sparx_jax.training.step import (
    compile_train_step,
    cross_entropy,
    eval_step,
    normalize,
    smooth_targets,
    train_step,
)
from tests.training.conftest import digest, tiny_settings


def after(run, batch, steps):
    state = run.init()
    for _ in range(steps):
        state, metrics = run.train_step(state, batch)
    return state, metrics


def test_normalize_removes_mean_and_deviation():
    image = np.full((1, 2, 2, 3), (0, 51, 255), np.uint8)
    out = normalize(jnp.asarray(image), (0.5, 0.1, 0.0), (0.25, 0.5, 2.0))
    np.testing.assert_allclose(out[0, 0, 0], (-2.0, 0.2, 0.5), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_spreads_the_smoothing_over_all_classes(smoothing):
    logits = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    labels = np.array([0, 3, 6, 3, 1])
    target = np.full((5, 7), smoothing / 7)
    target[np.arange(5), labels] += 1 - smoothing
    expected = -(target * log_softmax(logits.astype(np.float64), -1)).sum(-1)
    targets = smooth_targets(jnp.asarray(labels), 7, smoothing)
    out = cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_average_follows_weights_and_statistics(run, batch):
    start = jax.device_get(run.init())
    state = jax.device_get(after(run, batch, 1)[0])
    decay = run.config.ema_decay
    for old, new, average in zip(start.weights, state.weights, state.ema, strict=True):
        for path in old:
            expected = decay * old[path] + (1 - decay) * new[path]
            np.testing.assert_allclose(average[path], expected, atol=1e-6)
    assert any(
        (start.weights.batch_stats[p] != state.weights.batch_stats[p]).any()
        for p in start.weights.batch_stats
    )


def test_the_loss_of_a_repeated_batch_falls(run, batch):
    first = after(run, batch, 1)[1]["train_loss"]
    assert after(run, batch, 12)[1]["train_loss"] < first - 0.02


def test_equal_seeds_and_steps_give_equal_bits_and_another_step_other_ones(run, batch):
    one, again = (digest(after(run, batch, 2)[0]) for _ in range(2))
    assert one == again
    later = run.init()
    seven = jax.device_put(np.int32(7), later.step.sharding)
    later = later._replace(step=seven)
    losses = [run.train_step(s, batch)[1]["train_loss"] for s in (run.init(), later)]
    assert losses[0] != losses[1]  # other paths are dropped


def test_training_traces_once_and_reuses_the_memory_of_the_state(run, batch):
    start = run.init()
    state, _ = run.train_step(start, batch)
    for _ in range(2):
        state, _ = run.train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    assert run.train_step.func._cache_size() == 1


@pytest.mark.slow
def test_runs_that_differ_in_the_seed_compile_to_the_same_program(run, batch):
    """So a sweep over seeds compiles once."""
    config, state = run.config, run.init()
    network = states.split(models.build(config.model, 0))[0]

    def program(seed):
        changed = dataclasses.replace(config, seed=seed)
        step = compile_train_step(
            network, changed, run.optimizer, run.schedule, state, run.setup.mesh
        )
        return step.func.lower(*step.args, state, batch).as_text()

    assert program(0) == program(2)


@pytest.mark.slow
def test_without_average_the_state_has_none(run, batch):
    state = run.init()._replace(ema=None)
    step = lambda s: train_step(  # noqa: E731
        states.split(models.build(run.config.model, 0))[0].train,
        run.config,
        run.optimizer,
        run.schedule,
        np.uint32(0),
        s,
        batch,
    )
    assert jax.eval_shape(step, state)[0].ema is None


# A baseline, since only LayerNorm sees the same in a part as in the whole.
SWIN = {
    "model.name": "swin_t",
    "model.depths": (1, 1, 1, 1),
    "model.dims": (16, 16, 32, 32),
    "model.head_dim": 16,
    "model.drop_path_rate": 0.0,
    "mixing.mixup": 0.8,
    "mixing.cutmix": 1.0,
    "mixing.erasing": 0.25,
}


def first_step(batch, **settings):
    config, _, _, mesh = prepare(tiny_settings(**settings))
    optimizer = make_optimizer(config.optimizer)
    network, state = states.init(
        config.model, optimizer, seed=0, use_ema=True, mesh=mesh
    )
    schedule = learning_rate(config.optimizer, 2, 12)
    step = compile_train_step(network, config, optimizer, schedule, state, mesh)
    return step(state, batch)


@pytest.mark.slow
def test_parts_add_up_to_the_loss_and_gradient_of_the_batch(batch):
    weight = (np.arange(16) % 5 > 0).astype(np.float32)  # some could not be read
    batch = batch | {"weight": weight}
    whole, parts = (
        first_step(batch, accumulation_steps=parts, **SWIN) for parts in (1, 4)
    )
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-5, err_msg=name)
    found, expected = (state.opt_state[0].mu for state, _ in (parts, whole))
    for path in expected:  # the first moment is the gradient, clipped
        limit = 1e-5 * np.abs(expected[path]).max()
        np.testing.assert_allclose(found[path], expected[path], atol=limit)


@pytest.mark.slow
def test_parts_move_the_statistics_one_after_the_other(batch):
    still = {"model.drop_path_rate": 0.0}
    state, metrics = first_step(batch, accumulation_steps=2, **still)
    config = prepare(tiny_settings(**still)).config
    model = models.build(config.model, 0)
    model.train()
    images = normalize(batch["image"], config.data.mean, config.data.std)
    targets = smooth_targets(batch["label"], 10, config.label_smoothing)
    run = nnx.jit(lambda model, images: model(images))
    losses = [cross_entropy(run(model, images[i::2]), targets[i::2]) for i in (0, 1)]
    assert metrics["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    expected = states.batch_stats(model)
    for path, value in state.weights.batch_stats.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6)


def test_evaluation_counts_only_examples_of_weight_one(run, batch):
    weights = run.init().weights
    size = run.config.eval_batch_size
    images = np.resize(batch["image"], (size, 32, 32, 3))
    full = {
        "image": images,
        "label": np.resize(batch["label"], size),
        "index": np.arange(size, dtype=np.int32),
        "weight": np.ones(size, np.float32),
    }
    half = full | {"weight": (np.arange(size) < size // 2).astype(np.float32)}
    whole, part = (jax.device_get(run.eval_step(weights, b)) for b in (full, half))
    right = whole["predicted"] == full["label"]
    assert part["examples"] == size // 2 and whole["examples"] == size
    assert part["top1"] == right[: size // 2].sum() and whole["top1"] == right.sum()
    assert whole["top1"] <= whole["top5"] <= size


def test_examples_weigh_as_told_whatever_their_labels(run, batch):
    """The loss of a step is the mean over the examples of weight 1."""
    first = np.arange(16) < 5

    def loss(weight, label):
        given = batch | {"weight": weight.astype(np.float32), "label": label}
        state, metrics = run.train_step(run.init(), given)
        return float(metrics["train_loss"]), digest(state)

    label = batch["label"]
    whole, part, rest = (loss(w, label)[0] for w in (first | True, first, ~first))
    assert 16 * whole == pytest.approx(5 * part + 11 * rest, rel=1e-6)
    unreadable = np.where(first, label, -1)
    assert loss(first, label) == loss(first, unreadable)
    nothing, state = loss(first & False, label)
    assert nothing == 0
    assert all(np.isfinite(np.frombuffer(x, np.float32)).all() for x in state.values())


@pytest.fixture
def with_network(monkeypatch):
    """Puts `function(params, images)` in the network's place: nothing compiles long."""

    def put(function):
        def merge(graphdef, weights):
            class Network(nnx.Module):
                def __call__(self, images, key=None):
                    return function(weights.params, images)

            return Network()

        monkeypatch.setattr(steps, "merge", merge)

    return put


def one_step(run, batch, **mixing):
    config = dataclasses.replace(run.config, mixing=MixingConfig(**mixing))
    optimizer = make_optimizer(config.optimizer)
    params = {"a.kernel": jnp.zeros((2, 2))}
    state = states.TrainState(
        jnp.int32(0), states.Weights(params, {}), None, optimizer.init(params)
    )
    schedule = optax.constant_schedule(0.1)
    return train_step(None, config, optimizer, schedule, np.uint32(0), state, batch)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_guess_costs_the_logarithm_of_the_classes_whatever_is_mixed(
    run, batch, with_network, kind
):
    """An image that cannot be read takes its part of a mixture along."""
    with_network(lambda params, images: jnp.zeros((16, 10)))
    read = np.arange(16) != 3
    batch = batch | {
        "weight": read.astype(np.float32),
        "label": np.where(read, batch["label"], -1),
    }
    loss = one_step(run, batch, **{kind: 1.0})[1]["train_loss"]
    assert loss == pytest.approx(math.log(10), rel=1e-6)


def test_the_network_sees_normal_noise_where_images_are_erased(
    run, batch, with_network
):
    seen = []

    def network(params, images):
        seen.append(np.asarray(jax.lax.stop_gradient(images)))
        return jnp.zeros((16, 10))

    with_network(network)
    batch = batch | {"image": np.full((16, 32, 32, 3), 255, np.uint8)}
    one_step(run, batch, erasing=1.0)
    white = (1 - np.array(run.config.data.mean)) / run.config.data.std
    noise = seen[0][np.abs(seen[0] - white).max(-1) > 1e-5]
    assert len(noise) > 200 and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_step_whose_gradient_alone_is_not_finite_changes_no_weight(
    run, batch, with_network
):
    with_network(
        lambda params, images: (
            jnp.sqrt(params["a.kernel"][:1, :1]) * jnp.arange(10.0)
            + jnp.zeros((16, 10))
        )
    )
    state, metrics = one_step(run, batch)
    assert np.isfinite(metrics["train_loss"]) and metrics["skipped"]
    assert not state.weights.params["a.kernel"].any() and state.step == 1


def test_a_tie_and_a_nan_count_against_the_label(run, with_network):
    nan = np.nan
    logits = jnp.array(
        [
            [3, 1, 2, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [7.0] * 6,
            [nan] * 6,
            [0, 1, nan, 0, 0, 0],
        ]
    )
    with_network(lambda params, images: logits)
    count = len(logits)
    batch = {
        "image": np.zeros((count, 32, 32, 3), np.uint8),
        "label": np.array([0, 0, 0, 0, 1]),
        "weight": np.ones(count, np.float32),
        "index": np.arange(count),
    }
    found = eval_step(None, run.config, states.Weights({}, {}), batch)
    assert (found["top1"], found["top5"]) == (1, 3)
    expected = np.exp(3) / (np.exp([3, 1, 2]).sum() + 3)
    assert found["probability"][0] == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_weights_and_draws(run):
    def weights(seed):
        return states.init(
            run.config.model,
            run.optimizer,
            seed=seed,
            use_ema=True,
            mesh=run.setup.mesh,
        )[1].weights

    one, other = weights(0), weights(2)
    name = "head.kernel"
    assert (one.params[name] != other.params[name]).any()
    network = states.split(models.build(run.config.model, 0))[0]
    config = dataclasses.replace(run.config, seed=2)
    step = compile_train_step(
        network, config, run.optimizer, run.schedule, run.init(), run.setup.mesh
    )
    assert step.args == (2,)
