"""Single mixers with their intermediates, and norms where their epsilon matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.layers import aggregator, norm
from tests.parity import generate
from tests.parity.reference import (
    LIMITS,
    arrays,
    distance,
    facts,
    load_part,
    nchw,
    nhwc,
    probe_distance,
    subsample,
    tap,
)

TAIL = 3  # channels of conv_in_tail
# For the fast suite: no context, and one ganglion of every reduction and widening.
FAST = {
    "ss2d/t/layers.0.blocks.0.op",
    "ss2d/t/layers.1.blocks.1.op",
    "ss2d/t/layers.2.blocks.2.op",
    "ss2d/t/layers.3.blocks.1.op",
}
CASES = facts("unit_ss2d")["cases"]
WIDENED = "ss2d/t/layers.2.blocks.2.op"  # unit_eps uses it, too


@functools.cache
def mixer_of(tag):
    """What the authors' `op` does: our input projection and our mixer."""
    _, letter, path = tag.split("/")
    block = path.replace("layers", "stages").removesuffix(".op")
    name = f"sparx_mamba_{letter}"
    return nnx.Dict(
        project=load_part(name, f"{block}.project"),
        mixer=load_part(name, f"{block}.mixer"),
    )


def compile_mixer(tag):
    """A function from the inputs of mixer `tag` to its output and intermediates."""
    graphdef, state = nnx.split(mixer_of(tag))

    @jax.jit
    def run(state, x, context=None):
        block, seen = nnx.merge(graphdef, state), {}

        def keep_argument(owner, name, label):
            tap(owner, name, lambda args, _: seen.update({label: args[0]}))

        def keep_result(owner, name, label):
            tap(owner, name, lambda _, out: seen.update({label: out}))

        keep_argument(block.mixer, "conv", "conv_in")
        keep_argument(block.mixer, "norm", "merged")
        if context is None:
            return {"out": block.mixer(block.project(x)), **seen}
        keep_result(block.project, "context_norm", "d_norm")
        keep_result(block.project, "context_proj", "d_proj")
        keep_result(block.project, "query", "q")
        keep_result(block.project, "key", "k")
        keep_result(block.project, "value", "v")
        keep_argument(block.project, "fuse_conv", "shuffled")
        out = block.mixer(block.project(x, context))
        # The reference's d_proj includes the activation.
        seen["d_proj"] = jax.nn.gelu(seen["d_proj"], approximate=False)
        return {"out": out, "conv_in_tail": seen["conv_in"][..., -TAIL:], **seen}

    return lambda *inputs: {
        name: nchw(array) for name, array in run(state, *inputs).items()
    }


compiled_mixer = functools.cache(compile_mixer)


def inputs(tag):
    case = CASES[tag]
    shapes = {"x": case["x_shape"], "shortcut": case["shortcut_shape"]}
    return [
        nhwc(generate.normal(f"{tag}/{name}", shape))
        for name, shape in shapes.items()
        if shape is not None
    ]


def deviations(tag, found):
    """By intermediate; the reference stored every 9th channel of most."""
    steps = {"out": "[:, ::2]", "conv_in_tail": "[:]"}
    return {
        name: distance(subsample(found[name], steps.get(name, "[:, ::9]")), array)
        for key, array in arrays("unit_ss2d").items()
        for owner, _, name in [key.rpartition("/")]
        if owner == tag
    }


def slow_except(fast, names):
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("tag", slow_except(FAST, CASES))
def test_mixer_and_every_intermediate_equal_the_authors(tag, check):
    case, found = CASES[tag], compiled_mixer(tag)(*inputs(tag))
    errors = deviations(tag, found)
    check("unit_ss2d", "mixer", {f"{tag} {name}": d for name, d in errors.items()})
    check("unit_ss2d", "probes", {tag: out_probe(f"{tag}/out", found["out"], case)})


def out_probe(key, out, case):
    # No rms is stored; the maximum of so many normal errors is about 4 rms.
    rms = case["f32_vs_f64_max"] / 4
    return probe_distance(key, out, case["out_probe"], rms=rms)


def test_every_mixer_of_the_golden_is_compared():
    owners = {key.rpartition("/")[0] for key in arrays("unit_ss2d")}
    assert owners == set(CASES)


# Mistakes that no change of weights can make: (module, name, wrong version).
MISTAKES = {
    "GELU tanh approximation": (
        aggregator,
        "gelu",
        functools.partial(jax.nn.gelu, approximate=True),
    ),
    "padded channel zero instead of the mean": (
        aggregator,
        "_widen",
        lambda x, missing: jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]),
    ),
    "concat order attn, x, v": (
        aggregator,
        "_shuffle",
        lambda x, attended, v, deal=aggregator._shuffle: deal(attended, x, v),
    ),
}


@pytest.mark.parametrize("mistake", slow_except({"GELU tanh approximation"}, MISTAKES))
def test_limit_on_mixers_catches(mistake, monkeypatch):
    monkeypatch.setattr(*MISTAKES[mistake])
    found = compile_mixer(WIDENED)(*inputs(WIDENED))
    assert deviations(WIDENED, found)["out"] > 10 * LIMITS["mixer"]


def group_norm(compiled=compiled_mixer):
    x = nhwc(generate.normal("eps/x", (2, 320, 5, 6)))
    context = nhwc(generate.normal("eps/shortcut", (2, 640, 5, 6))) / 256
    return compiled(WIDENED)(x, context)["out"]


def batch_norm(*, train):
    stem = load_part("sparx_mamba_t", "stem")
    if train:
        stem.train()
    else:
        first = stem.norms[0]
        first.var.set_value(first.var[...] * 2.0**-16)
        first.mean.set_value(first.mean[...] * 2.0**-8)
    graphdef, state = nnx.split(stem)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return nchw(run(state, nhwc(generate.image("eps/image", (2, 3, 32, 32))) / 256))


NORMS = {
    "groupnorm": group_norm,
    "batchnorm_train": functools.partial(batch_norm, train=True),
    "batchnorm_eval": functools.partial(batch_norm, train=False),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms_use_the_epsilon_of_the_authors(case, check, monkeypatch):
    about, out = facts("unit_eps"), NORMS[case]()
    case_facts = about["cases"][case]
    deviation = distance(subsample(out, about["sub"]), arrays("unit_eps")[case])
    check("unit_eps", "norm eps", {case: deviation})
    check("unit_eps", "probes", {case: out_probe(case, out, case_facts)})

    monkeypatch.setattr(norm, "EPS", 1e-6)
    wrong = NORMS[case](compile_mixer) if case == "groupnorm" else NORMS[case]()
    change = np.abs(subsample(wrong - out, about["sub"])).max()
    assert change == pytest.approx(case_facts["max_change_with_eps_1e-6"], rel=1e-4)
