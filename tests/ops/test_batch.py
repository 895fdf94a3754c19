"""Which branch is traced for which devices."""

import jax
import jax.numpy as jnp

from sparx_jax.ops import batch_on
from sparx_jax.ops.batch import by_platform
from sparx_jax.parallel import make_mesh


def test_named_devices_trace_their_branch_alone():
    traced = []

    def branch(name, factor):
        def times(x):
            traced.append(name)
            return factor * x

        return times

    def choose(x):
        branches = dict(cpu=branch("cpu", 2), tpu=branch("tpu", 3))
        return by_platform(x, default=branch("default", 5), **branches)

    named = batch_on(make_mesh(1, 1, jax.devices()[:1]), choose)
    assert jax.jit(named)(jnp.ones(())) == 2
    assert traced == ["cpu"]
    traced.clear()
    assert jax.jit(choose)(jnp.ones(())) == 2
    assert set(traced) == {"cpu", "tpu", "default"}
