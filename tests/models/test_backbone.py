"""Laws of whole networks, on tiny ones: what compiles is shared between the tests."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparx_jax.errors import UserError
from sparx_jax.interop import load_torch_weights, torch_state_dict
from sparx_jax.layers.aggregator import Fusion
from sparx_jax.models import TOTAL_STRIDE, Backbone, backbone, create_model

TOLERANCE = {
    # Two compilations of the same arithmetic; logits of about unit size.
    "compiled": 1e-5,
    # 8 bits of storage through four layers, relative to the largest logit.
    "bfloat16": 0.05,
    # Size of a gradient that is zero, over the median size; others are above.
    "zero": 1e-5,
}

# The smallest variant, thinner.  "auto" would trace every scan twice.
TINY = dict(dims=(8, 12, 16, 20), num_classes=5, scan_method="loop")
# Every kind of parameter in four layers: normal ones, ganglions with and without
# reduction, both with and without scaled residual paths.
SHORT = TINY | dict(
    depths=(1, 1, 1, 1),
    reductions=(2, 2, 2, 1),
    connector=dict(stride=(0, 1, 0, 1), start=(0, 0, 0, 0)),
)
# The query's BatchNorm removes a shift, and where nothing is reduced (stage 4) the map
# is read through the query only.
ZERO_GRADIENTS = {"stages.3.blocks.0.mixer_norm.bias"}


def build(**overrides):
    return create_model("sparx_mamba_nano", **TINY | overrides)


def randomise(model, seed=5):
    """Unit-size weights: the initial ones (0.02) let tiny networks fade to nothing."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape, name = variable.shape, path[-1]
        value = rng.standard_normal(shape)
        if name == "kernel" or name.endswith("proj"):
            value /= np.sqrt(np.prod(shape[:-1] if name == "kernel" else shape[-2]))
        else:
            value = 0.2 * value + (name in ("scale", "var", "skip"))
            value = abs(value) + 0.1 if name == "var" else value
        variable.set_value(jnp.asarray(value, jnp.float32))
    return model


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_path(model, kind=(nnx.Param, nnx.BatchStat)):
    """Arrays by dotted path; copies, as later updates write in place."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): np.array(v[...]) for path, v in flat}


@pytest.fixture(scope="module")
def model():
    """In evaluation mode, with drop path to switch on."""
    return randomise(build(**SHORT, drop_path_rate=0.5))


@pytest.fixture(scope="module")
def images():
    return draw(4, 64, 48, 3)


@pytest.fixture(scope="module")
def logits(model, images):
    return np.asarray(model(images))


# -- evaluation --------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers_of(model):
    """Compiled (images) -> outputs of all layers by stage."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).forward_layers(x))
    return partial(run, state)


@pytest.fixture(scope="module")
def layers(layers_of, images):
    return layers_of(images)


@pytest.fixture
def stop_at(monkeypatch):
    """Lets networks take their layers' outputs from here: the rest compiles fast."""

    def patch(layers):
        call = lambda self, images, *, key=None: layers  # noqa: E731
        monkeypatch.setattr(Backbone, "forward_layers", call)

    return patch


def test_evaluation_is_the_same_inside_and_outside_jit(
    model, layers, images, logits, stop_at
):
    assert logits.dtype == np.float32 and logits.std() > 0.1
    stop_at(layers)
    head = jax.jit(lambda images: model(images))
    np.testing.assert_allclose(head(images), logits, atol=TOLERANCE["compiled"])


def test_evaluation_is_deterministic_and_changes_nothing(model, images, logits):
    before = by_path(model)
    np.testing.assert_array_equal(model(images), logits)
    np.testing.assert_array_equal(model(images, key=jax.random.key(1)), logits)
    jax.tree.map(np.testing.assert_array_equal, before, by_path(model))


def test_images_do_not_see_each_other(model, images, logits):
    """Picture i's logits are the same beside other pictures, in another place."""
    others = draw(*images.shape, seed=1)
    others[3] = images[0]
    np.testing.assert_allclose(model(others)[3], logits[0], atol=TOLERANCE["compiled"])


def test_head_reads_the_normalised_mean_of_the_last_map(
    model, layers, images, logits, stop_at
):
    last = np.asarray(layers[-1][-1], np.float64)
    axes = (1, 2, 3)
    std = np.sqrt(last.var(axes, keepdims=True) + 1e-5)
    normal = (last - last.mean(axes, keepdims=True)) / std
    normal = normal * np.asarray(model.head_norm.scale[...])
    pooled = normal.mean((1, 2)) + np.asarray(model.head_norm.bias[...])
    expected = pooled @ np.asarray(model.head.kernel[...])
    expected = expected + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE["compiled"])

    headless = build(**SHORT | dict(num_classes=0))
    nnx.update(headless.head_norm, nnx.state(model.head_norm))
    stop_at(layers)
    np.testing.assert_allclose(headless(images), pooled, atol=TOLERANCE["compiled"])


def test_a_stage_hands_every_layer_its_sources():
    """Stand-ins for the layers note what they are given."""
    stage = build(depths=(1, 1, 7, 1)).stages[2]
    calls = []

    class Layer(nnx.Module):
        def __call__(self, x, context, draws):
            calls.append((x, context, draws))
            return jnp.full((1, 1, 1, 16), float(len(calls) - 1))

    stage.blocks = nnx.List(Layer() for _ in stage.blocks)
    stage_input = jnp.full((1, 1, 1, 16), -1.0)
    draws = jax.random.uniform(jax.random.key(0), (7, 2, 1))
    outputs = stage(stage_input, draws)
    assert [float(y.max()) for y in outputs] == list(range(7))
    name = lambda x: int(x.max())  # noqa: E731
    assert [name(x) for x, _, _ in calls] == [-1, *range(6)]
    sources = [tuple(map(name, context)) for _, context, _ in calls]
    assert sources == [(-1,), (), (1, 0), (), (3, 0, 2), (), (5, 0, 2, 4)]
    np.testing.assert_array_equal(jnp.stack([mine for _, _, mine in calls]), draws)


def test_features_are_the_last_layers(model, images, stop_at):
    layers = [
        [jnp.zeros((4, 1, 1, 1))] * 2 + [jnp.full((4, 1, 1, 1), i)]
        for i in (1.0, 2.0, 3.0, 4.0)
    ]
    stop_at(layers)
    features = jax.jit(lambda images: model.forward_features(images))(images)
    assert [int(x.max()) for x in features] == [1, 2, 3, 4]


def test_stage_norms_are_per_pixel_and_replace_the_classifier(layers, images, stop_at):
    dense = build(**SHORT | dict(num_classes=0, stage_norms=True))
    assert dense.head is None and dense.head_norm is None
    stop_at(layers)
    features = dense.forward_features(images)
    for feature, outputs in zip(features, layers, strict=True):
        x = np.asarray(outputs[-1], np.float64)
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(feature, expected, atol=1e-4)
    pooled = np.asarray(features[-1]).mean((1, 2))
    np.testing.assert_allclose(dense(images), pooled, atol=TOLERANCE["compiled"])


def test_bfloat16_stays_close_and_its_parameters_stay_float32(model, images, logits):
    low = build(**SHORT, dtype="bfloat16")
    nnx.update(low, nnx.state(model))
    got = low(images)
    assert got.dtype == jnp.float32
    error = np.abs(got - logits).max() / np.abs(logits).max()
    assert 1e-4 < error < TOLERANCE["bfloat16"]
    assert {str(a.dtype) for a in by_path(low).values()} == {"float32"}


def test_float32_is_not_multiplied_in_less_on_accelerators():
    """They would take TF32 or bfloat16 where nothing is said, which no CPU shows."""
    settings = SHORT | dict(dims=(8,) * 4, head_dim=4)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    for dtype in ("float32", "bfloat16"):
        model = create_model("sparx_swin_nano", **settings, dtype=dtype)
        text = str(jax.make_jaxpr(model)(images))
        products = text.count("dot_general[") + text.count("conv_general_dilated[")
        exact = len(re.findall(r"precision=\(?(?:Precision\.)?HIGHEST", text))
        assert products > 20
        assert exact == products if dtype == "float32" else exact < products / 2


# -- wrong input -------------------------------------------------------------------


def refusal(call, *args):
    """The one sentence of the UserError that `call` raises, before any compilation."""
    with pytest.raises(UserError) as error:
        call(*args)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("method", ["__call__", "forward_features", "forward_layers"])
def test_too_small_images_are_refused_with_size_and_minimum(model, method):
    sentence = refusal(getattr(model, method), np.zeros((1, 31, 64, 3), np.float32))
    assert "31 x 64" in sentence and f"{TOTAL_STRIDE} x {TOTAL_STRIDE}" in sentence


@pytest.mark.parametrize(
    "shape", [(64, 64, 3), (1, 3, 64, 64), (1, 64, 64, 1), (2, 1, 64, 64, 3)]
)
def test_wrong_layouts_are_refused_with_the_right_one(model, shape):
    sentence = refusal(model, np.zeros(shape, np.float32))
    assert str(shape) in sentence and "(batch, height, width, 3)" in sentence


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_raw_pixels_are_refused(model, dtype):
    sentence = refusal(model, np.zeros((1, 64, 64, 3), dtype))
    assert dtype in sentence and "floating-point" in sentence


def test_an_empty_batch_and_meshes_of_explicit_axes_are_refused(model, images):
    assert "empty" in refusal(model, images[:0])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert "AxisType.Auto" in refusal(model, jax.device_put(images, sharding))
    with jax.set_mesh(mesh):
        assert "AxisType.Auto" in refusal(jax.jit(model), images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparx_mamba_nano", "sparx_swin_nano"])
def test_export_with_a_symbolic_batch(name, images):
    settings = SHORT | dict(dims=(8,) * 4, head_dim=4, scan_method="auto")
    model = randomise(create_model(name, **settings))
    shape = jax.export.symbolic_shape("b, 64, 48, 3")
    pictures = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(model))(pictures)
    got = jax.export.deserialize(exported.serialize()).call(images)
    expected = model(images)
    limit = TOLERANCE["compiled"] * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=limit)


def test_wrong_input_is_refused_inside_jit_too(model):
    refusal(jax.jit(model), np.zeros((1, 16, 16, 3), np.float32))


def test_other_channels_are_the_configurations(images):
    gray = build(in_channels=1)
    assert "3)" in refusal(gray, images)
    shape = jax.eval_shape(gray, jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))
    assert shape.shape == (1, 5)


# -- training ----------------------------------------------------------------------


def training_function(model):
    """Jitted (images, key) -> logits, gradients and statistics."""
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    @jax.jit
    def run(images, key):
        def loss(params):
            model = nnx.merge(graphdef, params, stats)
            logits = model(images, key=key)
            weights = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return (logits * weights).sum(), (logits, after)

        grads, (logits, after) = jax.grad(loss, has_aux=True)(params)
        return logits, grads, after

    return run


def training_step(model):
    """Compiled (images, key) -> logits, gradients and statistics by path."""
    run = training_function(model)

    def call(images, key):
        logits, *trees = run(images, key)
        return logits, *map(flat, trees)

    return call


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def step():
    return training_step(randomise(build(**SHORT, drop_path_rate=0.5)))


@pytest.fixture(scope="module")
def result(step, images):
    # With this key drop path keeps a picture in every branch, so all have gradients.
    return step(images, jax.random.key(2))


def check_gradients(model, grads):
    size = {path: np.abs(grad).max() for path, grad in grads.items()}
    assert size.keys() == by_path(model, nnx.Param).keys()
    limit = TOLERANCE["zero"] * np.median(list(size.values()))
    assert {path for path in size if not size[path] > limit} == ZERO_GRADIENTS


def test_every_parameter_receives_gradient(model, result):
    check_gradients(model, result[1])


@pytest.mark.slow
def test_every_parameter_of_the_smallest_variant_receives_gradient():
    model = randomise(build(drop_path_rate=0.1))
    _, grads, _ = training_step(model)(draw(4, 64, 64, 3), jax.random.key(0))
    check_gradients(model, grads)


def test_training_updates_every_statistic(model, result):
    before, after = by_path(model, nnx.BatchStat), result[2]
    assert before.keys() == after.keys()
    for path, value in after.items():
        assert np.isfinite(value).all()
        assert (value != before[path]).all(), path
        if path.endswith(".var"):
            assert (value > 0).all()


def test_first_statistics_are_those_of_the_first_convolution(model, result):
    """One of them against NumPy, lest all are updated with something else."""
    after = result[2]
    x = np.pad(draw(4, 64, 48, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(model.stem.convs[0].kernel[...], np.float64)
    y = sum(
        x[:, i : i + 64 : 2, j : j + 48 : 2] @ kernel[i, j] for i, j in np.ndindex(3, 3)
    )
    before = by_path(model, nnx.BatchStat)["stem.norms.0.mean"]
    expected = 0.9 * before + 0.1 * y.mean((0, 1, 2))
    np.testing.assert_allclose(after["stem.norms.0.mean"], expected, atol=1e-5)


def test_drop_path_follows_the_key(step, images, result):
    again, other = (step(images, jax.random.key(seed))[0] for seed in (2, 3))
    np.testing.assert_array_equal(again, result[0])
    assert np.abs(other - result[0]).max() > 0.01


def test_drop_path_grows_linearly_to_its_rate():
    model = build(drop_path_rate=0.3)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 7))


def test_training_with_drop_path_needs_a_key(model, images):
    def forward(images):
        training = nnx.clone(model)
        training.train()
        return training(images)

    with pytest.raises(ValueError, match="needs a key"):
        jax.eval_shape(forward, images)


@pytest.mark.slow
def test_recomputing_changes_no_logit_gradient_or_statistic(images):
    # One ganglion with a BatchNorm inside, and little else to compile.
    few = dict(position_conv=False, mlp_conv=False, head_dim=4, drop_path_rate=0.5)
    few |= dict(connector=dict(stride=(0, 1, 0, 0), start=(0, 0, 0, 0)))
    results = {}
    for remat in ("none", "block", "stage"):
        settings = SHORT | few | dict(dims=(8,) * 4, reductions=(1, 2, 1, 1))
        model = create_model("sparx_swin_nano", **settings, remat=remat)
        results[remat] = training_step(randomise(model))(images, jax.random.key(0))
    assert any("conv_norm" in path for path in results["none"][2])
    before, expected = by_path(model, nnx.BatchStat), results.pop("none")
    assert all((value != before[path]).any() for path, value in expected[2].items())
    for remat, (logits, *trees) in results.items():
        np.testing.assert_allclose(logits, expected[0], atol=TOLERANCE["compiled"])
        for tree, other in zip(trees, expected[1:], strict=True):
            assert tree.keys() == other.keys()
            for path, value in tree.items():
                limit = TOLERANCE["compiled"] * max(1.0, np.abs(other[path]).max())
                np.testing.assert_allclose(
                    value, other[path], atol=limit, err_msg=f"{remat} {path}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "stage"])
def test_recomputing_works_in_transformations_that_have_the_network(images, remat):
    settings = SHORT | dict(dims=(8,) * 4, head_dim=4)
    plain = create_model("sparx_swin_nano", **settings)
    model = create_model("sparx_swin_nano", **settings, remat=remat)
    shape = jax.eval_shape(plain, images)

    def gradient(network):
        return jax.grad(lambda x: network(x).sum())

    assert jax.eval_shape(model, images) == shape == jax.eval_shape(model, images)
    count = [
        str(jax.make_jaxpr(gradient(m))(images)).count("remat") for m in (plain, model)
    ]
    assert count[0] == 0 < count[1]


@pytest.mark.parametrize("remat", ["block", "stage"])
def test_recomputing_works_there_in_training_if_no_statistics_change(images, remat):
    settings = dict(depths=(1,) * 4, dims=(8,) * 4, head_dim=4, num_classes=5)
    model = create_model("swin_t", **settings, drop_path_rate=0.3, remat=remat)
    model.train()
    loss = lambda x: model(x, key=jax.random.key(0)).sum()  # noqa: E731
    for _ in range(2):  # the network is whole afterwards
        assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(images))


def test_where_jit_is_off_the_network_does_not_compile_itself(
    model, images, monkeypatch
):
    def reached(*_):
        raise InterruptedError

    monkeypatch.setattr(type(model.stem), "__call__", reached)
    with jax.disable_jit(), pytest.raises(InterruptedError):
        model(images)


class Counting(nnx.Module):
    """A head of somebody else, which remembers."""

    def __init__(self):
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x


def test_what_a_part_writes_is_kept(model, images):
    model = nnx.clone(model)
    model.head = Counting()
    model(images), model(images)
    assert model.head.calls[...] == 2


class Showing(nnx.Module):
    """A head of somebody else, which shows what it sees."""

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return x


@pytest.mark.slow
def test_intermediates_are_captured(images):
    model = build(depths=(1,) * 4)
    model.head = Showing()
    result, captured = nnx.capture(model, nnx.Intermediate)(images)
    np.testing.assert_array_equal(captured["head"]["seen"][0], result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparx_mamba_nano", "swin_t"])
def test_models_are_made_after_one_was_tabulated(name):
    make = partial(create_model, name, depths=(1,) * 4, dims=(8,) * 4, head_dim=4)
    nnx.tabulate(make(), jnp.zeros((1, 32, 32, 3)))
    nnx.eval_shape(make)


def test_loaded_weights_lie_where_the_model_lay():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    model = build(depths=(1,) * 4)
    arrays = torch_state_dict(model)
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    model.head.kernel.set_value(jax.device_put(model.head.kernel[...], split))
    load_torch_weights(model, arrays)
    assert model.head.kernel[...].sharding == split
    assert not model.head.bias[...].committed


def test_train_and_eval_switch_back_and_forth(model, images, logits):
    model = nnx.clone(model)
    model.train()
    model.eval()
    np.testing.assert_array_equal(model(images), logits)


# -- construction ------------------------------------------------------------------


@pytest.fixture(scope="module")
def initial_weights():
    return by_path(build())


MODES = [dict(mode=mode) for mode in ("none", "dense_ganglion", "densenet")]
FUSIONS = [dict(fusion=kind) for kind in get_args(Fusion) if kind != "dmca"]


@pytest.mark.parametrize("connector", MODES + FUSIONS)
def test_the_connector_leaves_all_other_initial_weights(initial_weights, connector):
    """So an ablation compares equal networks: only the projections are replaced."""
    other = by_path(build(connector=connector))
    different = {
        path
        for path in initial_weights.keys() | other.keys()
        if not np.array_equal(initial_weights.get(path), other.get(path))
    }
    assert different and all(".project." in path for path in different)


def test_layers_and_directions_start_with_different_weights():
    """No two arrays of one shape are equal, unless they are constants."""
    seen = {}
    for path, array in by_path(build(depths=(2, 2, 3, 2))).items():
        if array.size > 8 and array.std() > 0:
            seen.setdefault(array.tobytes(), []).append(path)
    repeated = [p for p in seen.values() if len(p) > 1 and "a_log" not in p[0]]
    assert len(seen) > 50 and not repeated


@pytest.mark.slow
def test_tree_mode_of_nnx_gives_the_same_logits(logits, result, tmp_path):
    """NNX can do without its graph of shared references; so can we."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, test_backbone as t
model = t.randomise(t.build(**t.SHORT, drop_path_rate=0.5))
np.save({str(tmp_path / "logits.npy")!r}, model(t.draw(4, 64, 48, 3)))
trained, *_ = t.training_step(model)(t.draw(4, 64, 48, 3), t.jax.random.key(2))
np.save({str(tmp_path / "trained.npy")!r}, trained)
"""
    environment = os.environ | dict(NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, check=True
    )
    for name, expected in dict(logits=logits, trained=result[0]).items():
        got = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(got, expected, atol=TOLERANCE["compiled"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block", "stage"])
def test_parts_in_training_mode_draw_and_keep_their_statistics(images, remat):
    """Called as it is, and jitted."""
    settings = SHORT | dict(dims=(8,) * 4, head_dim=4, drop_path_rate=0.5)

    def forward(model, images):
        return model(images, key=jax.random.key(1))

    def results(forward):
        model = create_model("sparx_swin_nano", **settings, remat=remat)
        before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        model.stem.train()
        model.stages[3].train()
        logits = forward(model, images)
        return logits, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    logits, before, after = results(forward)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    changed = jax.tree.leaves_with_path(changed)
    assert {path[0].key for path, _ in changed} > {"stem", "stages"}
    found = {path[:2] for path, is_new in changed if is_new}
    assert {path[0].key for path in found} == {"stem", "stages"}
    assert [path[1].key for path in found if path[0].key == "stages"] == [3]
    other, _, jitted = results(nnx.jit(forward))
    np.testing.assert_allclose(logits, other, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), after, jitted)


def test_pooled_features_are_float32_whatever_the_network_computes_in():
    model = create_model("swin_t", num_classes=0, dtype="bfloat16", dims=(32,) * 4)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(model, images).dtype == jnp.float32


class Same(nnx.Module):
    def __call__(self, x):
        return x


def test_every_layer_and_branch_draws_for_itself(monkeypatch):
    """No two images, branches, layers or stages share what decides their drop path."""
    model, seen = build(depths=(2, 1, 3, 1), drop_path_rate=0.5), []

    def call(stage, x, draws):
        seen.append(np.asarray(draws)[: len(stage.blocks)])
        return [x]

    monkeypatch.setattr(backbone.Stage, "__call__", call)
    model.train()
    model.stem, model.downsamples = Same(), nnx.List(Same() for _ in range(3))
    model.forward_layers(jnp.zeros((4, 32, 32, 3)), key=jax.random.key(0))
    draws = np.concatenate([part.ravel() for part in seen])
    assert len(np.unique(draws)) == len(draws) == 7 * 2 * 4
