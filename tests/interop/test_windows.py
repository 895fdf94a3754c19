"""Relative position biases move to windows of another size."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.interop import load_torch_weights, torch_state_dict
from sparx_jax.interop.windows import resize_position_bias
from sparx_jax.models import create_model

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), head_dim=4, num_classes=3)
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


def draw(window, heads=2):
    span = 2 * window - 1
    return np.random.default_rng(0).standard_normal((span, span, heads))


def grid(window):
    offsets = np.linspace(-1, 1, 2 * window - 1)
    return np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1)


def test_the_same_window_keeps_its_bias():
    np.testing.assert_allclose(resize_position_bias(draw(7), 7), draw(7), atol=1e-12)


@pytest.mark.parametrize("old, new", [(7, 12), (7, 3), (2, 7), (4, 8)])
def test_a_bias_linear_in_the_offset_stays_linear(old, new):
    found = resize_position_bias(1 + grid(old) @ [[2.0, -1], [0, 3]], new)
    np.testing.assert_allclose(found, 1 + grid(new) @ [[2.0, -1], [0, 3]], atol=1e-12)


@pytest.mark.parametrize("new", [4, 9, 12])
def test_corners_and_centre_keep_their_bias_and_there_is_no_jump(new):
    table = draw(7)
    found, middle = resize_position_bias(table, new), new - 1
    np.testing.assert_allclose(found[middle, middle], table[6, 6], atol=1e-12)
    np.testing.assert_allclose(found[:: 2 * middle, 0], table[::12, 0], atol=1e-12)
    assert np.abs(found).max() < 2 * np.abs(table).max()


def test_weights_load_into_a_network_with_other_windows():
    small = create_model("swin_t", window_size=3, **TINY)
    large = create_model("swin_t", window_size=5, **TINY)
    weights = torch_state_dict(small)
    weights[TABLE] = draw(3).reshape(25, 2).astype(np.float32)
    given = {name: np.array(array) for name, array in weights.items()}
    load_torch_weights(large, given)
    for array in given.values():
        array += 1  # as torch's optimizers do, which is none of the network's business
    found = np.asarray(large.stages[0].blocks[0].mixer.position_bias[...])
    np.testing.assert_allclose(found, resize_position_bias(draw(3), 5), atol=1e-6)
    others = torch_state_dict(large)
    for name in weights.keys() - {n for n in weights if n.endswith("bias_table")}:
        np.testing.assert_array_equal(others[name], weights[name], err_msg=name)


@pytest.mark.parametrize(
    "name, array",
    [
        (TABLE, np.zeros((24, 2), np.float32)),  # of no square window
        (TABLE, np.zeros((16, 2), np.float32)),  # of an even number of offsets
        ("head.fc.bias", np.array([0, np.nan, 0], np.float32)),
        (7, np.zeros(3, np.float32)),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(name, array):
    model = create_model("swin_t", window_size=3, **TINY)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    with pytest.raises(UserError, match=str(name)):
        load_torch_weights(model, torch_state_dict(model) | {name: array})
    for old, leaf in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(old, leaf)


def test_weights_get_the_dtype_of_the_network_and_leave_it_in_one_piece():
    """Files may hold half precision, and their writers take bytes as they lie."""
    model = create_model("swin_t", window_size=3, **TINY)
    weights = torch_state_dict(model)
    assert [name for name, a in weights.items() if not a.flags.c_contiguous] == []
    load_torch_weights(model, {k: a.astype(np.float16) for k, a in weights.items()})
    assert {str(a.dtype) for a in jax.tree.leaves(nnx.state(model))} == {"float32"}
