"""Networks: configuration, wiring, backbone and the registry of variants."""

from sparx_jax.models.backbone import TOTAL_STRIDE, Backbone
from sparx_jax.models.config import ConnectorConfig, ModelConfig
from sparx_jax.models.registry import build, create_model, list_models, model_config
from sparx_jax.models.wiring import LayerWiring, stage_wiring

__all__ = [
    "TOTAL_STRIDE",
    "Backbone",
    "ConnectorConfig",
    "LayerWiring",
    "ModelConfig",
    "build",
    "create_model",
    "list_models",
    "model_config",
    "stage_wiring",
]
