"""One training step of SparX-Mamba-T: loss, every gradient, BatchNorm statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.interop.names import to_torch
from tests.parity import generate
from tests.parity.reference import (
    arrays,
    distance,
    empty_model,
    facts,
    load,
    nchw,
    nhwc,
    weights,
)

pytestmark = pytest.mark.slow
NAME, GOLDEN = "sparx_mamba_t", "sparx_mamba_t_train96"


def by_torch_name(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves)
    return to_torch({n: a for n, (_, a) in zip(names, leaves, strict=True)})


@functools.cache
def step():
    """Everything that the reference stored of the step, by torch name and layout."""
    model = nnx.merge(
        nnx.graphdef(empty_model(NAME)), load(empty_model(NAME), weights(NAME))
    )
    model.train()
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    # Variables of an outer trace may not be written to, so arrays go in and out.
    params, statistics = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)

    def loss(params, images, statistics, labels):
        model = nnx.merge(graphdef, params, statistics)
        logits = model(images)
        log_likelihood = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        new = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return -log_likelihood.mean(), (logits, new)

    about = facts(GOLDEN)
    images = nhwc(generate.image(about["input_key"], about["input_shape"]))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    labels = jnp.asarray(about["labels"])
    (value, (logits, new)), (grads, grad_images) = run(
        params, images, statistics, labels
    )
    return {
        "loss": value,
        "logits": np.asarray(logits),
        "grad": by_torch_name(grads),
        "bn": by_torch_name(new),
        "input_grad": nchw(grad_images),
    }


def norm(array):
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def stored(kind):
    """The golden arrays of `kind`, by torch name."""
    return {
        key.removeprefix(kind + "/"): array
        for key, array in arrays(GOLDEN).items()
        if key.startswith(kind + "/")
    }


def test_loss_and_logits_equal_the_authors_in_float64(check):
    logits = arrays(GOLDEN)["logits_f64"]
    check(
        GOLDEN, "train loss", {"loss": abs(step()["loss"] - facts(GOLDEN)["loss_f64"])}
    )
    check(GOLDEN, "train logits", {"logits": distance(step()["logits"], logits)})


def test_every_gradient_has_the_norm_and_probe_of_the_authors(check):
    """Two numbers for every array, in units of its norm.

    The probe of an error is a normal number times the error's norm, so the limit on
    relative norms of errors holds for it as well.
    """
    about, found, errors = facts(GOLDEN), step()["grad"], {}
    assert found.keys() == about["grads"].keys()
    for key, (size, probe, _) in about["grads"].items():
        if key in about["zero_grads"]:
            continue
        errors[f"norm {key}"] = abs(norm(found[key]) / size - 1)
        errors[f"probe {key}"] = abs(generate.probe(key, found[key]) - probe) / size
    check(GOLDEN, "gradients", errors)


def test_stored_gradients_equal_the_authors_element_by_element(check):
    found = step()["grad"]
    errors = {
        f"array {key}": norm(found[key] - array) / norm(array)
        for key, array in stored("grad").items()
    }
    check(GOLDEN, "gradients", errors)


def test_gradient_of_the_images_equals_the_authors(check):
    about, found = facts(GOLDEN), step()["input_grad"]
    size, probe = about["input_grad"]["norm"], about["input_grad"]["probe"]
    key = f"{about['input_key']}/input_grad"
    errors = {
        "norm input_grad": abs(norm(found) / size - 1),
        "probe input_grad": abs(generate.probe(key, found) - probe) / size,
    }
    check(GOLDEN, "gradients", errors)


def test_shifts_before_a_query_have_no_gradient(check):
    """Stage 4 reads x through the query alone, whose BatchNorm removes any shift."""
    found = step()["grad"]
    sizes = {key: norm(found[key]) for key in facts(GOLDEN)["zero_grads"]}
    check(GOLDEN, "zero gradients", sizes)


def test_statistics_after_the_step_equal_the_authors(check):
    """Stored arrays, and for all others the rms error that two numbers tell of."""
    about, found, errors = facts(GOLDEN), step()["bn"], {}
    assert found.keys() == about["bn"].keys()
    for key, array in stored("bn").items():
        errors[f"array {key}"] = distance(found[key], array)
    for key, (size, probe) in about["bn"].items():
        unit = np.sqrt(found[key].size)
        errors[f"norm {key}"] = abs(norm(found[key]) - size) / unit
        errors[f"probe {key}"] = abs(generate.probe(key, found[key]) - probe) / unit
    check(GOLDEN, "BatchNorm statistics", errors)
