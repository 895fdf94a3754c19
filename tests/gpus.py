"""GPUs that need not be there, for what is lowered for them."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

H100 = "NVIDIA H100 80GB HBM3"


def named(kind):
    """As `batch_on` names a GPU; from JAX 0.12 on Triton's lowering needs it, too."""
    device = AbstractDevice(kind, None, "gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
