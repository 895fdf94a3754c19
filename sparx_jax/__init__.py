"""SparX in JAX: sparse cross-layer connections for hierarchical vision backbones."""

import importlib

_HOME = {
    "create_model": "sparx_jax.models",
    "list_models": "sparx_jax.models",
    "load_run": "sparx_jax.training.restore",
    "load_torch_weights": "sparx_jax.interop",
    "read_torch_file": "sparx_jax.interop",
    "torch_state_dict": "sparx_jax.interop",
}

__all__ = [
    "create_model",
    "list_models",
    "load_run",
    "load_torch_weights",
    "read_torch_file",
    "torch_state_dict",
]


def __dir__():
    return [*globals(), *__all__]


def __getattr__(name):
    # Imported when used: a process that only prepares images needs no network, and
    # starts in half the time.
    if name not in _HOME:
        raise AttributeError(f"module 'sparx_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
