"""Loads the authors' weights into a model, and gives a model's weights back."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from sparx_jax.interop.names import from_torch, skeleton, to_torch, torch_name
from sparx_jax.interop.torch_files import read_torch_file

# What follows the last stage, or for dense prediction each of them.
_HEADS = "head.", "head_norm.", "stage_norms."


def load_torch_weights(
    model: nnx.Module,
    weights: str | os.PathLike | Mapping[str, np.ndarray],
    *,
    backbone_only: bool = False,
) -> None:
    """Replaces all parameters and BatchNorm statistics of `model`, where they lie.

    Args:
      model: a network whose torch counterpart saved the weights.
      weights: a file of torch or `.safetensors`, read without running anything from
        it, or arrays by torch name, for Swin timm's or Microsoft's.
      backbone_only: leaves the classifier and the norms of the output as they are, and
        those of `weights` aside: another number of classes or form of the network.

    Raises:
      UserError: the file cannot be read, or weights and network do not match one to
        one; then the model is left as it was.
    """
    if not isinstance(weights, Mapping):
        weights = read_torch_file(weights)
    variables = _variables(model)
    if backbone_only:
        whose = skeleton(variables)
        names = "head.", *(torch_name(part, whose) for part in _HEADS)
        weights = {k: a for k, a in weights.items() if not k.startswith(names)}
        variables = {k: v for k, v in variables.items() if not k.startswith(_HEADS)}
    arrays = from_torch(weights, {path: v.shape for path, v in variables.items()})
    # Copies: a view of the caller's array would change with it, as in torch's steps.
    copies = {path: np.array(arrays[path], v.dtype, order="C")
              for path, v in variables.items()}  # fmt: skip
    for path, variable in variables.items():
        # device_put compiles nothing, unlike jnp.asarray, which does for each shape.
        old = variable.get_value()
        where = old.sharding if getattr(old, "committed", False) else None
        variable.set_value(jax.device_put(copies[path], where))


def torch_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and statistics of `model` by torch name, to be saved."""
    return to_torch({path: np.asarray(v[...]) for path, v in _variables(model).items()})


def _variables(model):
    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in leaves}
