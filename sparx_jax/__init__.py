"""SparX in JAX: sparse cross-layer connections for hierarchical vision backbones."""

from sparx_jax.interop import load_torch_weights
from sparx_jax.models import create_model, list_models

__all__ = ["create_model", "list_models", "load_torch_weights"]
