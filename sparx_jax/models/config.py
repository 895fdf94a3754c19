"""Frozen, validated description of a network: a variant is a value of `ModelConfig`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sparx_jax.checks import check_each, check_types, require
from sparx_jax.errors import UserError
from sparx_jax.layers.aggregator import Fusion
from sparx_jax.models.wiring import LayerWiring, densenet_wiring, stage_wiring
from sparx_jax.ops.ss2d import MapScanMethod

NUM_STAGES = 4


def _stages(least):
    """The test and its words for settings of a number for each stage."""
    test = lambda v: len(v) == NUM_STAGES and min(v) >= least  # noqa: E731
    return test, f"{NUM_STAGES} numbers of at least {least}"


# What settings must be, each by itself: names, the test, and its words.
_CONSTRAINTS = (
    ("depths reductions", *_stages(1)),
    ("dims", *_stages(4)),
    ("connector.stride connector.start", *_stages(0)),
    ("connector.window",
     lambda v: len(v) == NUM_STAGES and all(n is None or n >= 0 for n in v),
     f"{NUM_STAGES} numbers of at least 0, or None for no limit"),
    # The filters are one wider than their stride and must be odd.
    ("reductions", lambda v: all(n == 1 or n % 2 == 0 for n in v), "1 or even numbers"),
    ("state_dim inner_ratio attention_groups in_channels window_size head_dim",
     lambda v: v >= 1, "at least 1"),
    ("conv_size", lambda v: v >= 1 and v % 2 == 1, "positive and odd"),
    ("stem_convs", lambda v: v in (2, 3), "2 or 3"),
    ("drop_path_rate", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("scaled_residual_stages", lambda v: all(0 <= n < NUM_STAGES for n in v),
     "stages from 0 to 3"),
    ("num_classes", lambda v: v >= 0, "at least 0"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Where the ganglion layers of the four stages stand and what they read."""

    mode: Literal["sparx", "dense_ganglion", "densenet", "none"] = "sparx"
    """`sparx`: by stride, start and window; `dense_ganglion`: every layer a ganglion,
    no window; `densenet`: every layer reads all before it; `none`: none reads another.
    In all modes a stage of stride 0 has no connector."""
    fusion: Fusion = "dmca"
    """How a ganglion fuses what it reads, see `layers.aggregator.make_fusion`."""
    stride: tuple[int, ...] = (0, 1, 1, 1)
    """Layers from one ganglion to the next; 0: the stage has none."""
    start: tuple[int, ...] = (0, 1, 0, 0)
    """First layer that may be a ganglion; where the stage has fewer, none is."""
    window: tuple[int | None, ...] = (None, None, 3, None)
    """How many earlier ganglions a ganglion reads; None: all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hierarchical backbone with its cross-layer connector and classifier."""

    depths: tuple[int, ...]
    """Layers of each of the four stages."""
    dims: tuple[int, ...]
    """Channels of each stage, divisible by `attention_groups` (and by `head_dim`)."""
    mixer: Literal["ss2d", "window_attention"] = "ss2d"
    """What mixes tokens: VMamba's selective scans or Swin's shifted windows."""
    downsample: Literal["conv_batch_norm", "conv_layer_norm", "patch"] = (
        "conv_batch_norm"
    )
    """Stem and steps between stages: 3 x 3 convolutions (SparX; VMamba) or patches of 4
    and 2 pixels (Swin)."""
    stem_convs: int = 2
    """3 x 3 convolutions of the stem: 2 (the paper's v1) or 3 (v2)."""
    norm: Literal["group", "layer"] = "group"
    """In blocks and head: over the whole map (SparX) or per pixel (VMamba, Swin)."""
    position_conv: bool = True
    """A residual 3 x 3 depthwise convolution opens every block."""
    mlp_conv: bool = True
    """A residual 3 x 3 depthwise convolution in the feed-forward network."""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    """Spatial reduction of query and key in the stages' aggregators: 1 or even."""
    attention_groups: int = 4
    """Groups of the aggregator's channel attention."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward network over that of the stage."""
    inner_ratio: int = 2
    """Inner width of the selective-scan mixer over that of the stage."""
    state_dim: int = 1
    """States per inner channel of the recurrence."""
    conv_size: int = 5
    """Filter of the selective-scan mixer's depthwise convolution: odd."""
    mixer_bias: bool = True
    """Biases in the mixer's projections and convolution."""
    window_size: int = 7
    """Pixels along each side of an attention window."""
    head_dim: int = 32
    """Channels of an attention head; the width of a stage is a multiple of it."""
    shifted_layers: Literal["odd", "even"] = "odd"
    """Which layers of a stage, counted from 0, shift their windows."""
    scaled_residual_stages: tuple[int, ...] = (2, 3)
    """Stages (from 0) whose residual paths carry a learnable scale and bias."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; it grows linearly from 0."""
    num_classes: int = 1000
    """Width of the classifier; 0: none, the model returns pooled features."""
    stage_norms: bool = False
    """LayerNorm on each output of `forward_features` (dense prediction)."""
    in_channels: int = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, norms, scan state and logits stay float32."""
    scan_method: MapScanMethod = "auto"
    remat: Literal["none", "block", "stage"] = "none"
    """What the backward pass computes a second time rather than keep in memory:
    nothing, the inside of each block, or of each stage."""

    def __post_init__(self):
        check_types(self, "model.")
        check_each(self, "model.", _CONSTRAINTS)
        divisors = {"attention_groups": self.attention_groups}
        if self.mixer == "window_attention":
            divisors["head_dim"] = self.head_dim
        for name, divisor in divisors.items():
            ok = all(dim % divisor == 0 for dim in self.dims)
            require("model.dims", self.dims, ok, f"divisible by {name}={divisor}")
        ratio, classes = self.mlp_ratio, self.num_classes
        ok = all(int(ratio * dim) >= 1 for dim in self.dims)
        constraint = "positive, for a hidden width of at least 1"
        require("model.mlp_ratio", ratio, ok, constraint)
        ok = not (self.stage_norms and classes)
        constraint = "0 where stage_norms is set: that form has no classifier"
        require("model.num_classes", classes, ok, constraint)

    def wiring(self, stage: int) -> tuple[LayerWiring, ...]:
        """The connector's table for `stage` (from 0)."""
        connector, depth = self.connector, self.depths[stage]
        stride, reads_input = connector.stride[stage], dict(reads_stage_input=stage > 0)
        if connector.mode == "none" or stride == 0:
            return (LayerWiring(),) * depth
        if connector.mode == "densenet":
            return densenet_wiring(depth, **reads_input)
        start, window = connector.start[stage], connector.window[stage]
        ganglions = {
            "sparx": dict(stride=stride, start=start, window=window),
            "dense_ganglion": dict(stride=1, start=0, window=None),
        }
        return stage_wiring(depth, **ganglions[connector.mode], **reads_input)

    def replace(self, **overrides) -> "ModelConfig":
        """A validated copy; `connector` may be a dict of the fields to change.

        Raises UserError, naming the valid fields, on an unknown one.
        """
        return _replace(self, overrides, prefix="")


def _replace(config, overrides, prefix):
    names = [f.name for f in dataclasses.fields(config)]
    changes = {}
    for name, value in overrides.items():
        if name not in names:
            raise UserError(
                f"unknown model setting {prefix + name!r}; the settings are: "
                f"{', '.join(prefix + n for n in names)}."
            )
        old = getattr(config, name)
        if dataclasses.is_dataclass(old) and isinstance(value, dict):
            value = _replace(old, value, prefix=f"{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, np.generic):
            value = value.item()
        changes[name] = value
    return dataclasses.replace(config, **changes)
