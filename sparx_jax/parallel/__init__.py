"""Device meshes and where arrays lie on them."""

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
    "batch_sharding",
    "check_rules",
    "leaf_name",
    "make_mesh",
    "put_batch",
    "replicated",
    "state_shardings",
]
