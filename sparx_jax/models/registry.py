"""Named variants and how to build them."""

from fnmatch import fnmatch

from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.models.backbone import Backbone
from sparx_jax.models.config import ConnectorConfig, ModelConfig

# Source of T, S, B: the authors' release, which the parity tests compare with.
VARIANTS: dict[str, ModelConfig] = {
    "sparx_mamba_nano": ModelConfig(
        depths=(1, 2, 3, 1),
        dims=(32, 48, 80, 112),
        connector=ConnectorConfig(stride=(0, 1, 2, 1)),
    ),
    "sparx_mamba_t": ModelConfig(
        depths=(2, 2, 7, 2),
        dims=(96, 192, 320, 512),
        connector=ConnectorConfig(stride=(0, 1, 2, 1)),
    ),
    "sparx_mamba_s": ModelConfig(
        depths=(2, 2, 17, 2),
        dims=(96, 192, 328, 544),
        stem_convs=3,
        connector=ConnectorConfig(stride=(0, 1, 3, 1)),
    ),
    "sparx_mamba_b": ModelConfig(
        depths=(2, 2, 21, 3),
        dims=(120, 240, 396, 636),
        stem_convs=3,
        connector=ConnectorConfig(stride=(0, 1, 3, 2), start=(0, 1, 0, 2)),
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell-style `pattern`, sorted."""
    return sorted(name for name in VARIANTS if fnmatch(name, pattern))


def model_config(name: str, **overrides) -> ModelConfig:
    """The configuration of variant `name` with some fields replaced.

    Raises UserError on an unknown name, field or value.
    """
    if name not in VARIANTS:
        raise UserError(
            f"unknown model {name!r}; the models are: {', '.join(list_models())}."
        )
    return VARIANTS[name].replace(**overrides)


def create_model(name: str, *, seed: int = 0, **overrides) -> Backbone:
    """Builds variant `name` in evaluation mode with weights drawn from `seed`.

    `overrides` are fields of `ModelConfig`, for instance `num_classes=10` or
    `connector={"mode": "none"}`.  Raises UserError on an unknown name or field.
    """
    return build(model_config(name, **overrides), seed)


def build(config: ModelConfig, seed: int) -> Backbone:
    """Builds the network of `config` with weights drawn from `seed`."""
    return Backbone(config, rngs=nnx.Rngs(seed))
