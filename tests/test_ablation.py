"""The ablation compares networks of equal size that differ in the connector alone."""

import importlib.util
import math

import jax
import pytest
from flax import nnx

from sparx_jax import models
from sparx_jax.errors import UserError
from sparx_jax.training.config import from_config_dict
from tests.test_cli import ROOT

MODES = ("sparx", "none", "dense_ganglion", "densenet")
NAMES = [f"{family}_{mode}" for family in ("mamba", "swin") for mode in MODES]

spec = importlib.util.spec_from_file_location("ablation", ROOT / "configs/ablation.py")
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)


def config_of(variant):
    return from_config_dict(ablation.get_config(variant), num_classes=10)


def parameters(variant):
    model = nnx.eval_shape(lambda: models.build(config_of(variant).model, 0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_there_are_four_connectors_of_two_families():
    assert list(ablation.DIMS) == NAMES
    with pytest.raises(UserError, match="unknown variant 'mamba'"):
        ablation.get_config("mamba")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "swin"])
def test_the_networks_of_a_family_have_equally_many_parameters(family):
    counts = [parameters(f"{family}_{mode}") for mode in MODES]
    assert counts == pytest.approx([counts[0]] * 4, rel=0.01)


@pytest.mark.parametrize("family", ["mamba", "swin"])
def test_the_runs_of_a_family_differ_in_widths_and_connector_alone(family):
    def rest(variant):
        settings = ablation.get_config(variant).to_dict()
        del settings["model"]["dims"], settings["model"]["connector"]["mode"]
        return settings

    assert all(rest(f"{family}_{m}") == rest(f"{family}_sparx") for m in MODES)


@pytest.mark.parametrize("variant", NAMES)
def test_only_stage_three_is_wired_and_by_the_mode(variant):
    model = config_of(variant).model
    sources = [[layer.sources for layer in model.wiring(stage)] for stage in range(4)]
    assert not any(any(sources[stage]) for stage in (0, 1, 3))
    read = {"sparx": 4, "none": 0, "dense_ganglion": 7, "densenet": 7}
    mode = variant.partition("_")[2]
    assert sum(map(bool, sources[2])) in (read[mode], read[mode] - 1)
