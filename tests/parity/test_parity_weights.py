"""The authors' weights and ours are the same arrays under a two-way table of names."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparx_jax.interop import torch_state_dict
from sparx_jax.interop.names import IGNORED
from tests.parity import generate
from tests.parity.reference import empty_model, load, manifest, weights

PARAMETERS = {
    "sparx_mamba_t": 27_051_794,
    "sparx_mamba_s": 47_444_712,
    "sparx_mamba_b": 83_536_168,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "vmambav2v_tiny_224": 30_249_064,
}
large = pytest.mark.slow
VARIANTS = [
    "sparx_mamba_t",
    pytest.param("sparx_mamba_s", marks=large),
    pytest.param("sparx_mamba_b", marks=large),
    "swin_tiny_patch4_window7_224",
    "vmambav2v_tiny_224",
]
SEG_FORM = pytest.param("sparx_mamba_t_seg", marks=large)
SEG = dict(num_classes=0, stage_norms=True)


def sizes(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_statistics_are_as_many_as_the_authors(name):
    model, expected = empty_model(name), manifest(name)
    assert sizes(nnx.state(model, nnx.Param)) == PARAMETERS[name] == expected["params"]
    counters = sum(bool(IGNORED.search(e["key"])) for e in expected["tensors"])
    statistics = sizes(nnx.state(model, nnx.BatchStat))
    assert statistics + counters == expected["buffer_elements"]


@pytest.mark.parametrize("name", [*VARIANTS, SEG_FORM])
def test_generated_weights_are_those_of_the_reference(name):
    assert generate.digest(weights(name)) == manifest(name)["weights_sha256"]


@pytest.mark.parametrize("name", [*VARIANTS, SEG_FORM])
def test_weights_return_from_the_model_bit_for_bit(name):
    given = weights(name)
    overrides = SEG if name.endswith("_seg") else {}
    model = empty_model(name.removesuffix("_seg"), **overrides)
    returned = torch_state_dict(nnx.merge(nnx.graphdef(model), load(model, given)))
    assert returned.keys() == {key for key in given if not IGNORED.search(key)}
    for key, array in returned.items():
        np.testing.assert_array_equal(array, given[key], strict=True, err_msg=key)
