"""Laws of the schedule and of the weight-decay rule."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparx_jax.interop.names import torch_name
from sparx_jax.training import state as states
from sparx_jax.training.config import OptimizerConfig
from sparx_jax.training.optimizer import is_decayed, learning_rate

MANIFESTS = Path(__file__).parents[1] / "parity/manifests"


def test_the_rate_rises_linearly_and_falls_as_a_half_cosine():
    config = OptimizerConfig(lr=1.0, warmup_lr=0.1, min_lr=0.2)
    schedule = learning_rate(config, warmup_steps=10, total_steps=110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0.1, 0.55, 1.0, 0.6, 0.2, 0.2], rtol=1e-5)


def test_a_run_without_warm_up_starts_at_the_full_rate():
    assert float(learning_rate(OptimizerConfig(lr=1.0), 0, 10)(0)) == 1.0


@pytest.mark.parametrize("size", ["t"])
def test_weight_decay_acts_on_what_the_authors_trainer_decays(size):
    """timm exempts tensors of one axis and names that end in ".bias"."""
    manifest = json.loads((MANIFESTS / f"sparx_mamba_{size}.json").read_text())
    shapes = {entry["key"]: entry["shape"] for entry in manifest["tensors"]}
    import sparx_jax

    model = sparx_jax.create_model(f"sparx_mamba_{size}")
    params = states.split(model)[1].params
    for path in params:
        name = torch_name(path)
        expected = len(shapes[name]) > 1 and not name.endswith(".bias")
        assert is_decayed(path) == expected, path


def test_a_parameter_without_rule_is_an_error():
    with pytest.raises(ValueError, match="no weight-decay rule"):
        is_decayed("stages.0.new_thing")
