"""Named variants and how to build them."""

from fnmatch import fnmatch

from flax import nnx

from sparx_jax.errors import UserError
from sparx_jax.models.backbone import Backbone
from sparx_jax.models.config import ConnectorConfig, ModelConfig

# A family is a skeleton and its mixer; a size is a few numbers.
_SPARX_SWIN = dict(mixer="window_attention")
_VMAMBA = dict(
    downsample="conv_layer_norm",
    norm="layer",
    position_conv=False,
    mlp_conv=False,
    conv_size=3,
    mixer_bias=False,
    scaled_residual_stages=(),
    connector=ConnectorConfig(mode="none"),
)
_SWIN = dict(
    mixer="window_attention",
    downsample="patch",
    norm="layer",
    position_conv=False,
    mlp_conv=False,
    scaled_residual_stages=(),
    connector=ConnectorConfig(mode="none"),
)

VARIANTS: dict[str, ModelConfig] = {
    # Source of T, S, B: the authors' release, which the parity tests compare with.
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
    # The sizes are ours: the authors have not released SparX-Swin.
    "sparx_swin_nano": ModelConfig(
        **_SPARX_SWIN,
        depths=(1, 2, 3, 1),
        dims=(32, 48, 80, 112),
        head_dim=16,
        connector=ConnectorConfig(stride=(0, 1, 2, 1)),
    ),
    "sparx_swin_t": ModelConfig(
        **_SPARX_SWIN,
        depths=(2, 2, 7, 2),
        dims=(96, 192, 320, 512),
        connector=ConnectorConfig(stride=(0, 1, 2, 1)),
    ),
    "sparx_swin_s": ModelConfig(
        **_SPARX_SWIN,
        depths=(2, 2, 18, 2),
        dims=(96, 192, 320, 544),
        stem_convs=3,
        connector=ConnectorConfig(stride=(0, 1, 3, 1)),
    ),
    "sparx_swin_b": ModelConfig(
        **_SPARX_SWIN,
        depths=(2, 2, 20, 3),
        dims=(128, 256, 416, 672),
        stem_convs=3,
        connector=ConnectorConfig(stride=(0, 1, 3, 2), start=(0, 1, 0, 2)),
    ),
    # Source: MzeroMiko/VMamba, the checkpoints s1l8, s2l15 and s2l15 of its README.
    "vmamba_t": ModelConfig(
        **_VMAMBA, depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), inner_ratio=1
    ),
    "vmamba_s": ModelConfig(**_VMAMBA, depths=(2, 2, 15, 2), dims=(96, 192, 384, 768)),
    "vmamba_b": ModelConfig(
        **_VMAMBA, depths=(2, 2, 15, 2), dims=(128, 256, 512, 1024)
    ),
    # Source: Liu et al., "Swin Transformer", arXiv:2103.14030, table 7.
    "swin_t": ModelConfig(**_SWIN, depths=(2, 2, 6, 2), dims=(96, 192, 384, 768)),
    "swin_s": ModelConfig(**_SWIN, depths=(2, 2, 18, 2), dims=(96, 192, 384, 768)),
    "swin_b": ModelConfig(**_SWIN, depths=(2, 2, 18, 2), dims=(128, 256, 512, 1024)),
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
