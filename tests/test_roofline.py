"""The roofline counts what the summary counts, and gives each stage its part."""

from math import prod

import pytest

from benchmarks.roofline import PARTS, bounds, by_part, operations
from sparx_jax import summary
from sparx_jax.chips import CHIPS
from sparx_jax.models import model_config


@pytest.mark.slow
def test_operations_are_those_of_the_summary_stage_by_stage():
    config = model_config("sparx_mamba_nano")
    found = operations(config, 2, 64)
    total = sum(operation.macs for operation in found)
    for operation in found:
        if operation.kernel == "four_scans":
            total += 4 * prod(operation.shape) * (9 * config.state_dim + 1)
        elif operation.kernel:
            total += prod(operation.shape) * int(operation.kernel[-1]) ** 2
    assert total == 2 * summary.macs(config, (64, 64))
    parts = by_part(found, 64)
    assert list(parts) == list(PARTS)
    scans = [
        [o.shape[1] for o in parts[part] if o.kernel == "four_scans"] for part in PARTS
    ]
    sides = zip(config.depths, (16, 8, 4, 2), strict=True)
    assert scans == [[], *([side] * depth for depth, side in sides)]
    for operation in found:
        forward = bounds(operation, CHIPS["v5e"], "inference")
        both = bounds(operation, CHIPS["v5e"], "training")
        assert all(2 * one <= two for one, two in zip(forward, both, strict=True))
