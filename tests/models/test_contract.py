"""What every model of the registry promises, whatever family, size and connector."""

import functools
import itertools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.interop import load_torch_weights, torch_state_dict
from sparx_jax.interop.names import from_torch, to_torch
from sparx_jax.models import Backbone, ConnectorConfig, list_models, model_config
from tests.models.test_backbone import randomise

TOLERANCE = {
    # Batches of another size are other compilations of the same arithmetic.
    "compiled": 1e-5,
    # 8 bits of storage through five layers, relative to the largest logit.
    "bfloat16": 0.05,
    # Size of a gradient that is zero, over the median size; others are above.
    "zero": 1e-5,
}
HINTS = get_type_hints(ConnectorConfig)
MODES, FUSIONS = get_args(HINTS["mode"]), get_args(HINTS["fusion"])
STATISTICS = (".mean", ".var")
SIZES = [(32, 32), (33, 47), (97, 131), (224, 160), (1024, 1000)]


def thin(name, **overrides):
    """Variant `name` with few narrow layers: what remains is what makes the family.

    Widths are no multiples of three.  With one layer in every stage and start 0, stages
    2 and 4 have ganglions and stages 1 and 3 have not.
    """
    config = model_config(name)
    windows = config.mixer == "window_attention"
    small = dict(
        depths=(1, 2, 1, 1) if windows else (1, 1, 1, 1),  # one of two is shifted
        dims=(8, 16, 32, 40),
        reductions=(2, 2, 2, 1),
        head_dim=8,
        num_classes=5,
        scan_method="loop",  # "auto" would trace every scan twice
        connector=dict(stride=(0, 1, 0, 1), start=(0, 0, 0, 0)),
    )
    return config.replace(**small | overrides)


# Sizes of a family differ in numbers only, so one of each family stands for all; those
# of the selective scan compile longest.
FAMILIES = {name: thin(name) for name in list_models("*_t")}
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
compiled_families = pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=name, marks=() if "swin" in name else pytest.mark.slow)
        for name, c in FAMILIES.items()
    ],
)


@functools.cache
def abstract(config):
    return nnx.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0)))


def traced(config, method, shape):
    """Shapes of what `method` gives for images of `shape`; nothing is compiled."""
    graphdef, state = nnx.split(abstract(config))
    call = lambda state, x: getattr(nnx.merge(graphdef, state), method)(x)  # noqa: E731
    return jax.eval_shape(call, state, jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.cache
def model(config):
    return randomise(Backbone(config, rngs=nnx.Rngs(0)))


def images(*shape):
    return np.random.default_rng(1).standard_normal((*shape, 3)).astype(np.float32)


@functools.cache
def logits(config):
    return np.asarray(model(config)(images(3, 64, 48)))


def shapes(config):
    leaves = nnx.to_flat_state(nnx.state(abstract(config), (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable.shape for path, variable in leaves}


@families
@pytest.mark.parametrize("size", SIZES)
def test_features_have_the_declared_strides_and_widths(config, size):
    made = abstract(config)
    features = traced(config, "forward_features", (2, *size, 3))
    assert made.feature_strides == (4, 8, 16, 32)
    declared = zip(features, made.feature_strides, made.feature_dims, strict=True)
    for feature, stride, dim in declared:
        assert feature.shape == (2, *(-(-side // stride) for side in size), dim)


def test_without_classes_the_model_gives_what_the_classifier_reads():
    config = FAMILIES["swin_t"]
    headless = config.replace(num_classes=0)
    given = nnx.state(model(config))
    made = Backbone(headless, rngs=nnx.Rngs(0))
    state = nnx.state(made)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(dict(nnx.to_flat_state(given))[path][...])
    nnx.update(made, state)
    pooled = np.asarray(made(images(3, 64, 48)))
    head = model(config).head
    expected = pooled @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...])
    assert pooled.shape == (3, config.dims[-1])
    np.testing.assert_allclose(logits(config), expected, atol=TOLERANCE["compiled"])


@compiled_families
def test_evaluation_repeats_and_a_image_does_not_see_its_batch(config):
    batch = images(3, 64, 48)
    again = np.asarray(model(config)(batch))
    np.testing.assert_array_equal(again, logits(config))
    others = np.asarray(model(config)(np.stack([batch[2], batch[1], -batch[0]])))
    np.testing.assert_array_equal(others[:2], again[[2, 1]])
    assert np.abs(np.diff(again, axis=0)).max() > 0.01


@compiled_families
def test_bfloat16_is_near_and_not_equal(config):
    low = Backbone(config.replace(dtype="bfloat16"), rngs=nnx.Rngs(0))
    nnx.update(low, nnx.state(model(config)))
    got = low(images(3, 64, 48))
    assert got.dtype == jnp.float32
    error = np.abs(got - logits(config)).max() / np.abs(logits(config)).max()
    assert 1e-5 < error < TOLERANCE["bfloat16"]


@compiled_families
def test_every_parameter_receives_gradient(config):
    # Two pictures of 64: the last map has pixels enough to tell biases from shifts.
    graphdef, params, stats = nnx.split(model(config), nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    @jax.jit
    @jax.grad
    def gradient(params, x):
        got = nnx.merge(graphdef, params, stats)(x)
        return (got * jnp.sin(jnp.arange(got.size)).reshape(got.shape)).sum()

    grads = jax.tree_util.tree_leaves_with_path(gradient(params, images(2, 64, 64)))
    size = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.abs(grad).max()
        for path, grad in grads
    }
    limit = TOLERANCE["zero"] * np.median(list(size.values()))
    assert size.keys() == {p for p in shapes(config) if not p.endswith(STATISTICS)}
    assert not {path for path in size if not size[path] > limit}


@pytest.mark.slow
@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_axis_or_dtype_is_left_to_promotion(config, dtype):
    """Programs that forbid it to themselves could not call the network otherwise."""
    config = config.replace(dtype=dtype, drop_path_rate=0.1)
    graphdef, state = nnx.split(abstract(config))

    def loss(state, x):
        made = nnx.merge(graphdef, state)
        made.train()
        return made(x, key=jax.random.key(0)).sum()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        shape = 2, 48, 64, 3
        assert traced(config, "__call__", shape).shape == (2, 5)
        jax.eval_shape(jax.grad(loss), state, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("name", list_models())
def test_torch_names_lead_back_to_the_same_arrays(name):
    config = thin(name)
    rng = np.random.default_rng(3)
    arrays = {
        path: rng.standard_normal(shape).astype(np.float32)
        for path, shape in shapes(config).items()
    }
    exported = to_torch(arrays)
    assert len(exported) == len(arrays)
    returned = from_torch(exported, shapes(config))
    assert returned.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(returned[path], array, err_msg=path)


@pytest.mark.parametrize("backbone_only", [False, True])
def test_swin_is_read_under_the_names_of_its_first_authors(backbone_only):
    """timm made its names of theirs by this rule; the arrays are the same."""
    config = thin("swin_t")
    given = torch_state_dict(Backbone(config, rngs=nnx.Rngs(1)))
    names = {
        "layers.1.downsample.": "layers.0.downsample.",
        "layers.2.downsample.": "layers.1.downsample.",
        "layers.3.downsample.": "layers.2.downsample.",
        "head.fc.": "head.",
    }
    theirs = given
    for name, other in names.items():
        theirs = {key.replace(name, other): array for key, array in theirs.items()}
    assert theirs.keys() != given.keys()
    theirs["layers.0.blocks.1.attn_mask"] = np.zeros(3)
    model = Backbone(config, rngs=nnx.Rngs(2))
    head = np.asarray(model.head.kernel)
    load_torch_weights(model, theirs, backbone_only=backbone_only)
    for name, array in torch_state_dict(model).items():
        if not (backbone_only and name.startswith(("head", "norm."))):
            np.testing.assert_array_equal(array, given[name], err_msg=name)
    assert np.array_equal(head, model.head.kernel) == backbone_only


@families
@pytest.mark.parametrize(
    "form",
    [{"num_classes": 7}, {"num_classes": 0}, {"num_classes": 0, "stage_norms": True}],
)
def test_a_backbone_is_loaded_into_every_form(config, form):
    given = torch_state_dict(Backbone(config, rngs=nnx.Rngs(1)))
    model = Backbone(config.replace(**form), rngs=nnx.Rngs(2))
    before = torch_state_dict(model)
    load_torch_weights(model, given, backbone_only=True)
    heads = "head", "classifier", "norm."
    for name, array in torch_state_dict(model).items():
        expected = before if name.startswith(heads) else given
        np.testing.assert_array_equal(array, expected[name], strict=True, err_msg=name)
    with pytest.raises(UserError, match=r"of another network|of classes"):
        load_torch_weights(model, given)
    other = {f"x.{name}": array for name, array in given.items()}
    with pytest.raises(UserError, match="of another network"):
        load_torch_weights(model, other, backbone_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode, fusion",
    [
        *itertools.product(["swin_t"], MODES, FUSIONS),  # the quickest to trace
        *itertools.product(["sparx_mamba_t", "vmamba_t"], ["densenet"], ["dmca"]),
    ],
)
def test_any_connector_fits_any_model(name, mode, fusion):
    """It builds, runs, and its arrays have one torch name each."""
    connector = dict(mode=mode, fusion=fusion)
    config = thin(name, connector=connector, depths=(2, 2, 3, 2))
    arrays = {p: np.zeros(shape) for p, shape in shapes(config).items()}
    assert len(to_torch(arrays)) == len(arrays)
    assert traced(config, "__call__", (1, 64, 64, 3)).shape == (1, 5)
    projections = {path for path in arrays if ".project." in path}
    plain = {path for path in projections if path.endswith("project.kernel")}
    ganglions = sum(w.is_ganglion for stage in range(4) for w in config.wiring(stage))
    assert len(plain) == 9 - ganglions
    assert (ganglions > 0) == (mode != "none")
