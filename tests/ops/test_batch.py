"""Which branch is traced for which devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from sparx_jax.ops import batch_on
from sparx_jax.ops.batch import by_platform, shard_batch
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


@pytest.mark.parametrize("batch, part", [(8, 2), (6, 6)])
def test_a_batch_is_split_once_and_only_where_it_divides(batch, part):
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    call, x = shard_batch(double, "b", "b"), jax.ShapeDtypeStruct((batch,), "float32")
    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(call, x).shape == (batch,)
    assert set(sizes) == {part}
    # In a shard_map of the caller's own it is a part already.
    spec = PartitionSpec("data")
    own = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    whole = jax.ShapeDtypeStruct((4 * batch,), "float32")
    assert jax.eval_shape(own, whole).shape == whole.shape
    assert set(sizes) == {part, batch}
