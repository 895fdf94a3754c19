"""Deterministic costs stay what benchmarks/costs.json says, or are put on record."""

import json

import jax
import pytest

from benchmarks import costs

RECORD = json.loads(costs.RECORD.read_text())
on_record = pytest.mark.skipif(
    RECORD["jax"] != jax.__version__, reason="another JAX's costs are on record"
)


def check(found):
    assert not (names := costs.changed(found, RECORD)), (
        f"{names} changed: python -m benchmarks.costs shows how, --write accepts it",
        {name: (RECORD.get(name), found[name]) for name in names},
    )


@on_record
def test_temporaries_of_operations():
    check(costs.operation_costs())


@pytest.mark.slow
@on_record
@pytest.mark.parametrize("name", costs.NETWORKS)
def test_operations_and_instructions_of_the_training_step(name):
    check(costs.network_costs(name))


def test_a_change_is_noticed():
    assert (
        costs.changed({"a": 1.03}, {"a": 1.0}) == ["a"] == costs.changed({"a": 1.0}, {})
    )
    assert costs.changed({"a": 1.01, "b": 0.0}, {"a": 1.0, "b": 0.0}) == []
