"""Whole networks: SparX-Mamba-T at three sizes, its dense form, and the baselines."""

import functools

import jax
import pytest
from flax import nnx

from tests.parity import generate, mistakes
from tests.parity.reference import (
    LIMITS,
    arrays,
    distance,
    empty_model,
    facts,
    load,
    nchw,
    nhwc,
    probe_distance,
    subsample,
    tap,
    weights,
)

NAME = "sparx_mamba_t"
SMALL, LARGE = "sparx_mamba_t_64x64", "sparx_mamba_t_224x224"
SWIN, VMAMBA = "swin_tiny_patch4_window7_224", "vmambav2v_tiny_224"
GOLDENS = [
    SMALL,
    pytest.param("sparx_mamba_t_256x192", marks=pytest.mark.slow),
    pytest.param(LARGE, marks=pytest.mark.slow),
    f"{SWIN}_224x224",
    pytest.param(f"{VMAMBA}_224x224", marks=pytest.mark.slow),
]


def model_of(golden):
    return golden.rpartition("_")[0]


@functools.cache
def state(name):
    return load(empty_model(name), weights(name))


@functools.partial(jax.jit, static_argnums=0)
def forward(name, state, images):
    """Logits and every stored intermediate of one ordinary call of the model."""
    seen = {}

    def layers(_, stages):
        for i, outputs in enumerate(stages):
            seen.update({f"block{i}_{j}": x for j, x in enumerate(outputs)})
            seen[f"stage{i}"] = outputs[-1]

    model = nnx.merge(nnx.graphdef(empty_model(name)), state)
    tap(model, "stem", lambda _, out: seen.update(patch_embed=out))
    tap(model, "forward_layers", layers)
    tap(model, "head", lambda args, _: seen.update(pooled=args[0]))
    return {"logits": model(images), **seen}


def images(golden):
    about = facts(golden)
    return nhwc(generate.image(about["input_key"], about["input_shape"]))


@functools.cache
def outputs(golden):
    name = model_of(golden)
    found = forward(name, state(name), images(golden))
    return {k: nchw(v) for k, v in found.items()}


@pytest.mark.parametrize("golden", GOLDENS)
def test_logits_equal_the_authors_in_float64(golden, check):
    deviation = distance(outputs(golden)["logits"], arrays(golden)["logits_f64"])
    check(golden, "logits", {"logits": deviation})


@pytest.mark.parametrize("golden", GOLDENS)
def test_every_layer_equals_the_authors(golden, check):
    about, deviations = facts(golden), {}
    stored = arrays(golden).keys() - {"logits", "logits_f64"}
    for name in sorted(stored):
        got, want = outputs(golden)[name], arrays(golden)[name]
        assert list(got.shape) == about["tensors"][name]["shape"]
        got = subsample(got, about["sub"]) if got.ndim == 4 else got
        limit = name if name in ("patch_embed", "pooled") else "layers"
        deviations.setdefault(limit, {})[name] = distance(got, want)
    for limit, found in deviations.items():
        check(golden, limit, found)


@pytest.mark.parametrize("golden", GOLDENS)
def test_probes_see_every_element_of_the_stages(golden, check):
    about = facts(golden)
    check(
        golden,
        "probes",
        {
            name: probe_distance(
                f"{about['input_key']}/{name}",
                outputs(golden)[name],
                tensor["probe"],
                rms=tensor["f32_vs_f64_rms"],
            )
            for name, tensor in about["tensors"].items()
            if tensor["probe"] is not None
        },
    )


@pytest.mark.slow
def test_dense_outputs_equal_the_authors(check):
    golden, seg = "sparx_mamba_t_seg_128x128", "sparx_mamba_t_seg"
    model = empty_model(NAME, num_classes=0, stage_norms=True)
    model = nnx.merge(nnx.graphdef(model), load(model, weights(seg)))
    found = model.forward_features(images(golden))
    about, deviations, probes = facts(golden), {}, {}
    for (name, tensor), got in zip(about["tensors"].items(), found, strict=True):
        got, want = nchw(got), arrays(golden)[name]
        deviations[name] = distance(subsample(got, about["sub"]), want)
        # No rms is stored; the maximum of so many normal errors is above 4 rms.
        rms = tensor["f32_vs_f64_max"] / 4
        key = f"{about['input_key']}/{name}"
        probes[name] = probe_distance(key, got, tensor["probe"], rms=rms)
    check(golden, "seg outputs", deviations)
    check(golden, "probes", probes)


def change(golden, mistake):
    """How much the logits move when `mistake` is made in the weights."""
    name = model_of(golden)
    wrong = load(empty_model(name), mistake(weights(name)))
    logits = forward(name, wrong, images(golden))["logits"]
    return distance(logits, arrays(golden)["logits_f64"])


@pytest.mark.parametrize("mistake", mistakes.SAMPLE)
def test_limit_on_logits_catches(mistake):
    assert change(SMALL, mistakes.WEIGHTS[NAME][mistake]) > 10 * LIMITS["logits"]


@pytest.mark.parametrize(
    "name, mistake",
    [
        pytest.param(name, mistake, marks=() if name == SWIN else pytest.mark.slow)
        for name, made in mistakes.WEIGHTS.items()
        for mistake in made
    ],
)
def test_mistake_has_the_same_effect_as_in_the_reference(name, mistake):
    largest, _ = facts("sensitivities")[name][mistake]
    # Three digits are stored.  The reference compared with its float32 run.
    slack = 6e-3 * largest + LIMITS["logits"]
    got = change(f"{name}_224x224", mistakes.WEIGHTS[name][mistake])
    assert abs(got - largest) < slack
