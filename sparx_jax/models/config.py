"""Frozen, validated description of a network: a variant is a value of `ModelConfig`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from sparx_jax.errors import UserError
from sparx_jax.models.wiring import LayerWiring, ganglion_layers, stage_wiring
from sparx_jax.ops.scan import ScanMethod

NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Where the ganglion layers of the four stages stand and what they read."""

    mode: Literal["sparx", "none"] = "sparx"
    """`none` turns the connector off: every layer is a normal one."""
    stride: tuple[int, ...] = (0, 1, 1, 1)
    """Layers from one ganglion to the next; 0: the stage has none."""
    start: tuple[int, ...] = (0, 1, 0, 0)
    """First layer that may be a ganglion."""
    window: tuple[int | None, ...] = (None, None, 3, None)
    """How many earlier ganglions a ganglion reads; None: all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hierarchical backbone with its cross-layer connector and classifier."""

    depths: tuple[int, ...]
    """Layers of each of the four stages."""
    dims: tuple[int, ...]
    """Channels of each stage, divisible by `attention_groups`."""
    stem_convs: int = 2
    """3 x 3 convolutions of the stem: 2 (the paper's v1) or 3 (v2)."""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    """Spatial reduction of query and key in the aggregators of each stage."""
    attention_groups: int = 4
    """Groups of the aggregator's channel attention."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward network over that of the stage."""
    inner_ratio: int = 2
    """Inner width of the selective-scan mixer over that of the stage."""
    state_dim: int = 1
    """States per inner channel of the recurrence."""
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
    scan_method: ScanMethod = "auto"

    def __post_init__(self):
        _check_types(self)
        for name in ("depths", "dims", "reductions"):
            _require_stages(name, getattr(self, name), minimum=1)
        connector = self.connector
        for name, minimum in (("stride", 0), ("start", 0), ("window", 0)):
            values = getattr(connector, name)
            numbers = tuple(0 if v is None else v for v in values)
            _require_stages(f"connector.{name}", numbers, minimum, shown=values)
        for name in ("state_dim", "inner_ratio", "attention_groups", "in_channels"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("num_classes", self.num_classes, self.num_classes >= 0, "at least 0")
        rate = self.drop_path_rate
        _require("drop_path_rate", rate, 0 <= rate < 1, "in [0, 1)")
        _require("mlp_ratio", self.mlp_ratio, self.mlp_ratio > 0, "positive")
        _require("stem_convs", self.stem_convs, self.stem_convs in (2, 3), "2 or 3")
        _require(
            "num_classes",
            self.num_classes,
            not (self.stage_norms and self.num_classes),
            "0 where stage_norms is set (that form has no classifier)",
        )
        groups = self.attention_groups
        _require(
            "dims",
            self.dims,
            all(dim % groups == 0 for dim in self.dims),
            f"divisible by attention_groups={groups}",
        )
        stages = self.scaled_residual_stages
        _require(
            "scaled_residual_stages",
            stages,
            all(0 <= stage < NUM_STAGES for stage in stages),
            "stage indices from 0 to 3",
        )

    def wiring(self, stage: int) -> tuple[LayerWiring, ...]:
        """The connector's table for `stage` (from 0)."""
        connector, depth = self.connector, self.depths[stage]
        if connector.mode == "none":
            return (LayerWiring(),) * depth
        return stage_wiring(
            depth,
            stride=connector.stride[stage],
            start=connector.start[stage],
            window=connector.window[stage],
            reads_stage_input=stage > 0,
        )

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
        changes[name] = value
    return dataclasses.replace(config, **changes)


def _check_types(config, prefix=""):
    """One-sentence errors for the annotated types (int, float, bool, str, tuples)."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint):
            _require(prefix + name, value, isinstance(value, hint), hint.__name__)
            _check_types(value, f"{prefix}{name}.")
        elif get_origin(hint) is Literal:
            choices = get_args(hint)
            _require(prefix + name, value, value in choices, f"one of {choices}")
        elif get_origin(hint) is tuple:
            element = get_args(hint)[0]
            ok = isinstance(value, tuple) and all(_is(v, element) for v in value)
            kind = getattr(element, "__name__", str(element))
            _require(prefix + name, value, ok, f"a tuple of {kind}")
        else:
            _require(prefix + name, value, _is(value, hint), f"of type {hint.__name__}")


def _is(value, kind):
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _require(name, value, ok, constraint):
    if not ok:
        raise UserError(f"model setting {name}={value!r} must be {constraint}.")


def _require_stages(name, values, minimum, shown=None):
    ok = len(values) == NUM_STAGES and all(v >= minimum for v in values)
    shown = values if shown is None else shown
    _require(name, shown, ok, f"{NUM_STAGES} numbers of at least {minimum}")


__all__ = ["ConnectorConfig", "ModelConfig", "ganglion_layers"]
