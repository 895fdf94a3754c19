"""Configurations: frozen, and every mistake is told in one sentence."""

import dataclasses

import jaxtyping
import numpy as np
import pytest
from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.models import ConnectorConfig, ModelConfig, build, model_config

BASE = dict(depths=(1, 2, 3, 1), dims=(8, 16, 24, 32))
NAN = float("nan")

# Field, wrong value, what the sentence says of the constraint.
MISTAKES = [
    ("depths", (2, 2, 7), "4 numbers of at least 1"),
    ("depths", (2, 2, 0, 2), "4 numbers of at least 1"),
    ("depths", (2, 2, 7.0, 2), "a tuple of int"),
    ("depths", (2, 2, True, 2), "a tuple of int"),
    ("depths", "2272", "a tuple of int"),
    ("depths", 2, "a tuple of int"),
    ("dims", (96, 192, 320), "4 numbers of at least 4"),
    ("dims", (96, 192, -4, 512), "4 numbers of at least 4"),
    ("dims", (96, 192, 322, 512), "divisible by attention_groups=4"),
    ("mixer", "attention", "one of ss2d, window_attention"),
    ("downsample", "conv", "one of conv_batch_norm, conv_layer_norm, patch"),
    ("norm", "batch", "one of group, layer"),
    ("position_conv", 1, "of type bool"),
    ("mlp_conv", 1, "of type bool"),
    ("stem_convs", 4, "2 or 3"),
    ("stem_convs", True, "of type int"),
    ("stem_convs", "2", "of type int"),
    ("connector", None, "ConnectorConfig"),
    ("connector.mode", "dense", "one of sparx, dense_ganglion"),
    ("connector.mode", None, "one of sparx, dense_ganglion, densenet, none"),
    ("connector.fusion", "add", "one of dmca, dmca_spatial, dmca_no_attention, concat"),
    ("connector.fusion", None, "one of dmca, dmca_spatial, dmca_no_attention, concat"),
    ("connector.stride", (1, 2), "4 numbers of at least 0"),
    ("connector.stride", (0, 1, -2, 1), "4 numbers of at least 0"),
    ("connector.stride", (0, 1, None, 1), "a tuple of int"),
    ("connector.start", (0, 0, 0), "4 numbers of at least 0"),
    ("connector.start", (0, -1, 0, 0), "4 numbers of at least 0"),
    ("connector.window", (None, None, 3), "4 numbers of at least 0, or None"),
    ("connector.window", (None, None, -1, None), "4 numbers of at least 0, or None"),
    ("connector.window", (None, None, "3", None), "a tuple of"),
    ("connector.window", (None, None, False, None), "a tuple of"),
    ("reductions", (8, 4, 2), "4 numbers of at least 1"),
    ("reductions", (8, 4, 2, 0), "4 numbers of at least 1"),
    ("reductions", (8, 4, 3, 1), "1 or even"),
    ("attention_groups", 0, "at least 1"),
    ("attention_groups", 5, "divisible by attention_groups=5"),
    ("mlp_ratio", 0.0, "positive"),
    ("mlp_ratio", 0.01, "positive"),
    ("mlp_ratio", -4.0, "positive"),
    ("mlp_ratio", NAN, "finite"),
    ("mlp_ratio", float("inf"), "finite"),
    ("mlp_ratio", "4", "of type float"),
    ("inner_ratio", 0, "at least 1"),
    ("inner_ratio", 1.5, "of type int"),
    ("state_dim", 0, "at least 1"),
    ("conv_size", 4, "positive and odd"),
    ("conv_size", -1, "positive and odd"),
    ("conv_size", 3.0, "of type int"),
    ("mixer_bias", None, "of type bool"),
    ("window_size", 0, "at least 1"),
    ("head_dim", 0, "at least 1"),
    ("shifted_layers", "all", "one of odd, even"),
    ("scaled_residual_stages", (2, 4), "stages from 0 to 3"),
    ("scaled_residual_stages", (-1,), "stages from 0 to 3"),
    ("drop_path_rate", 1.0, "in [0, 1)"),
    ("drop_path_rate", -0.1, "in [0, 1)"),
    ("drop_path_rate", NAN, "finite"),
    ("drop_path_rate", False, "of type float"),
    ("num_classes", -1, "at least 0"),
    ("num_classes", 10.0, "of type int"),
    ("stage_norms", 1, "of type bool"),
    ("in_channels", 0, "at least 1"),
    ("dtype", "float16", "one of float32, bfloat16"),
    ("dtype", np.float32, "one of float32, bfloat16"),
    ("scan_method", "fast", "one of auto, associative, sequential, loop"),
    ("remat", "layer", "one of none, block, stage"),
]


@pytest.fixture(autouse=True)
def nobody_checks_types_but_the_configuration(monkeypatch):
    """The suite's type checker would raise first; users do not run it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def overrides(name, value):
    parent, _, field = name.rpartition(".")
    return {parent: {field: value}} if parent else {name: value}


@pytest.mark.parametrize("name, value, constraint", MISTAKES)
def test_a_wrong_value_is_told_in_one_sentence(name, value, constraint):
    config = ModelConfig(**BASE)
    with pytest.raises(UserError) as error:
        config.replace(**overrides(name, value))
    sentence = str(error.value)
    for part in (name, repr(value), constraint):
        assert part in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_stage_norms_and_a_classifier_exclude_each_other():
    with pytest.raises(UserError, match=r"num_classes=1000 must be 0.*stage_norms"):
        ModelConfig(**BASE, stage_norms=True)
    assert ModelConfig(**BASE, stage_norms=True, num_classes=0).stage_norms


def test_heads_divide_the_widths_where_there_are_heads():
    base = dict(BASE, head_dim=16)  # stage 3 has 24 channels
    with pytest.raises(UserError, match=r"dims=\(8, 16, 24, 32\) .*head_dim=16"):
        ModelConfig(**base, mixer="window_attention")
    assert ModelConfig(**base, mixer="ss2d").head_dim == 16


@pytest.mark.parametrize(
    "wrong, listed",
    [
        ({"dephts": (1, 1, 1, 1)}, "'dephts'.*depths, dims"),
        ({"connector": {"strides": 2}}, "'connector.strides'.*connector.mode"),
    ],
)
def test_an_unknown_setting_is_told_with_the_known_ones(wrong, listed):
    with pytest.raises(UserError, match=f"unknown model setting {listed}"):
        ModelConfig(**BASE).replace(**wrong)


def test_numbers_of_numpy_are_numbers():
    config = ModelConfig(**BASE).replace(num_classes=np.int64(3))
    assert type(config.num_classes) is int and config.num_classes == 3


def test_lists_are_taken_for_tuples():
    """Configuration files and command lines give lists."""
    config = ModelConfig(**BASE).replace(
        depths=[2, 2, 2, 2], connector={"window": [None, 1, 2, None]}
    )
    assert config.depths == (2, 2, 2, 2)
    assert config.connector.window == (None, 1, 2, None)


def test_an_override_of_the_connector_keeps_its_other_settings():
    config = model_config("sparx_mamba_t", connector={"window": (None, None, 1, None)})
    default = model_config("sparx_mamba_t").connector
    assert config.connector == dataclasses.replace(
        default, window=(None, None, 1, None)
    )
    whole = ConnectorConfig(mode="none")
    assert model_config("sparx_mamba_t", connector=whole).connector == whole


def test_configurations_are_frozen_values():
    config = ModelConfig(**BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depths = (1, 1, 1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.connector.mode = "none"
    copy = config.replace(num_classes=10)
    assert copy != config and config.num_classes == 1000
    assert hash(copy.replace(num_classes=1000)) == hash(config)


def test_a_start_beyond_the_stage_means_no_ganglion():
    """So that fewer layers, or a connector for deeper stages, need no other setting."""
    config = ModelConfig(**BASE, connector=ConnectorConfig(start=(0, 2, 9, 1)))
    assert not any(w.is_ganglion for stage in (1, 2, 3) for w in config.wiring(stage))


def test_integers_pass_for_floats():
    assert ModelConfig(**BASE, mlp_ratio=4, drop_path_rate=0).mlp_ratio == 4


@pytest.mark.parametrize(
    "name, changes",
    [("mixer", {"mixer": "new"}), ("mode", {"connector": {"mode": "new"}})],
)
def test_a_name_that_nothing_was_written_for_builds_no_other_network(
    monkeypatch, name, changes
):
    """As where a mixer is added to the names alone: it became the selective scan."""
    monkeypatch.setattr("sparx_jax.models.config.check_types", lambda *_: None)
    config = model_config("sparx_mamba_nano").replace(**changes)
    with pytest.raises(KeyError, match="new"):
        nnx.eval_shape(lambda: build(config, 0))
