"""Weights from and to PyTorch."""

from sparx_jax.interop.torch_files import read_torch_file
from sparx_jax.interop.torch_weights import load_torch_weights, torch_state_dict

__all__ = ["load_torch_weights", "read_torch_file", "torch_state_dict"]
