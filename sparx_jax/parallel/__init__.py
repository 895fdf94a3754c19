"""Device meshes and where arrays lie on them."""

from sparx_jax.parallel.batch import batch_on, shard_batch
from sparx_jax.parallel.mesh import (
    batch_sharding,
    check_rules,
    leaf_name,
    make_mesh,
    put_batch,
    replicated,
    state_shardings,
)

__all__ = [
    "batch_on",
    "batch_sharding",
    "check_rules",
    "leaf_name",
    "make_mesh",
    "put_batch",
    "replicated",
    "shard_batch",
    "state_shardings",
]
