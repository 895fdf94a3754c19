"""Named variants and their seeds."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.models import create_model, list_models, model_config

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=3)


def parameters(**kwargs):
    model = create_model("sparx_mamba_nano", **kwargs)
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: np.array(variable[...]) for path, variable in leaves}


def num_parameters(name, **overrides):
    model = nnx.eval_shape(lambda: create_model(name, **overrides))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def test_names_match_patterns_and_are_sorted():
    released = [f"sparx_mamba_{size}" for size in "bst"]
    assert {*released, "sparx_mamba_nano"} <= set(list_models())
    assert list_models() == sorted(list_models())
    assert list_models("sparx_mamba_?") == released
    assert list_models("sparx_mamba_t") == ["sparx_mamba_t"]
    assert list_models("resnet*") == []


def test_an_unknown_model_is_told_with_the_known_ones():
    with pytest.raises(UserError) as error:
        create_model("sparx_mamba_xl")
    sentence = str(error.value)
    assert all(name in sentence for name in ("'sparx_mamba_xl'", *list_models()))
    assert sentence.endswith(".") and "\n" not in sentence


def test_wrong_overrides_are_told():
    with pytest.raises(UserError, match="unknown model setting 'classes'"):
        create_model("sparx_mamba_t", classes=10)
    with pytest.raises(UserError, match="num_classes=-1 must be"):
        create_model("sparx_mamba_t", num_classes=-1)


def test_the_seed_decides_all_drawn_weights():
    first, again, other = (parameters(seed=seed, **TINY) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for path, array in first.items():
        drawn = array.std() > 0 and path[-1] != "a_log"
        assert np.array_equal(array, other[path]) != drawn, path


def test_overrides_shape_the_network():
    arrays = parameters(**TINY | dict(num_classes=7, in_channels=1))
    assert arrays["head", "kernel"].shape == (20, 7)
    assert arrays["stem", "convs", 0, "kernel"].shape == (3, 3, 1, 4)
    assert model_config("sparx_mamba_t", drop_path_rate=0.2).drop_path_rate == 0.2


def test_nano_is_small_and_has_every_kind_of_layer():
    assert num_parameters("sparx_mamba_nano", num_classes=10) < 1_000_000
    config = model_config("sparx_mamba_nano")
    kinds = [[w.is_ganglion for w in config.wiring(stage)] for stage in range(4)]
    assert kinds == [[False], [False, True], [True, False, True], [True]]
