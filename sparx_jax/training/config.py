"""The settings of a run: what config files set, validated once into frozen values."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

from sparx_jax import models
from sparx_jax.checks import check_each, check_types, require
from sparx_jax.data import DataConfig, rand_augment
from sparx_jax.errors import UserError

# Settings that change nothing of what a run computes, patterns of their paths.
_FREE_SETTINGS = (
    r"data\.(root|workers|max_bad_fraction)|mesh\..*|model\.(scan_method|remat)|tensorboard|"
    r"eval_batch_size|eval_every_epochs|log_every_steps|checkpoint_every_steps|"
    r"max_skipped_steps|profile_steps"
)
# What settings must be, each by itself: names, the test, and its words.
_CONSTRAINTS = (
    ("train_epochs batch_size eval_batch_size log_every_steps eval_every_epochs "
     "accumulation_steps optimizer.lr optimizer.eps", lambda v: v > 0, "positive"),
    ("cooldown_epochs checkpoint_every_steps max_skipped_steps optimizer.warmup_lr "
     "optimizer.min_lr optimizer.warmup_epochs optimizer.weight_decay "
     "data.crop_padding data.workers", lambda v: v >= 0, "at least 0"),
    ("mixing.mixup mixing.cutmix optimizer.clip_norm",
     lambda v: v >= 0, "at least 0 (0: off)"),
    ("label_smoothing ema_decay optimizer.beta1 optimizer.beta2 "
     "data.max_bad_fraction", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("mixing.probability mixing.switch mixing.erasing",
     lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("optimizer.layer_decay data.crop_ratio", lambda v: 0 < v <= 1, "in (0, 1]"),
    ("seed", lambda v: 0 <= v < 2**32, "in [0, 2^32)"),
    ("profile_steps", lambda v: not v or (len(v) == 2 and 0 < v[0] <= v[1]),
     "() or (first, last), from 1"),
    ("data.image_size", lambda v: v >= models.TOTAL_STRIDE,
     f"at least {models.TOTAL_STRIDE}, the smallest image that the network can reduce"),
    ("data.scale", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
     "(least, greatest) in (0, 1]"),
    ("data.mean", lambda v: len(v) == 3 and 0 <= min(v) <= max(v) <= 1,
     "three numbers in [0, 1]"),
    ("data.std", lambda v: len(v) == 3 and min(v) > 0, "three positive numbers"),
    ("model.in_channels", lambda v: v == 3, "3 (images)"),
    ("model.stage_norms", lambda v: not v, "False: it has no classifier"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then a cosine to the end."""

    lr: float = 1e-3
    """Highest learning rate, for the batch size as it is: nothing is scaled."""
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    clip_norm: float = 5.0
    """Largest global norm of the gradient; 0: no clipping."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    layer_decay: float = 1.0
    """For fine-tuning: the rate of a layer over that of the layer after it, in (0, 1];
    see `optimizer.layer_numbers`."""
    frozen: str = ""
    """For fine-tuning: a regular expression; parameters whose paths begin with a match
    stay as they are, such as "stem|stages.0|downsamples.0"; their BatchNorm uses its
    averages."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """What is done to training batches on the device; see `training/mixing.py`."""

    mixup: float = 0.0
    """Both parameters of the beta distribution of an image's share; 0: off."""
    cutmix: float = 0.0
    """The same of an image's share around the box that its partner fills; 0: off."""
    probability: float = 1.0
    """That a batch is mixed, from 0 to 1."""
    switch: float = 0.5
    """Where both are on: that a batch gets cutmix rather than mixup, from 0 to 1."""
    erasing: float = 0.0
    """Probability that a box of an image becomes noise; 0: off."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per axis; -1: the rest.  See `parallel.make_mesh` and its `RULES`."""

    data: int = -1
    fsdp: int = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run.  Epochs may be fractions; a step is one global batch."""

    model: models.ModelConfig
    model_name: str
    """The variant that `model` started from, for display."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_from: str = ""
    """For fine-tuning: a run's folder, FOLDER/checkpoints/STEP, .pth or .safetensors;
    see `finetune.start_from`."""
    seed: int = 0
    train_epochs: float = 300.0
    """Until the learning rate has fallen to `optimizer.min_lr`."""
    cooldown_epochs: float = 0.0
    """After them, at `optimizer.min_lr`."""
    batch_size: int = 1024
    """Images per step over all devices."""
    accumulation_steps: int = 1
    """Parts of the batch whose gradients are added up, one after the other, where the
    memory is short; BatchNorm's batch is then a part."""
    eval_batch_size: int = 1024
    label_smoothing: float = 0.1
    use_ema: bool = True
    """Keeps a moving average of weights and statistics; it is evaluated too."""
    ema_decay: float = 0.9998
    eval_every_epochs: float = 1.0
    """Every evaluation is followed by a checkpoint."""
    checkpoint_every_steps: int = 0
    """More checkpoints, between evaluations; 0: none."""
    max_skipped_steps: int = 10
    """In a row, because loss or gradient was not finite; one more ends the run."""
    profile_steps: tuple[int, ...] = ()
    """(first, last) step that the profiler records, for TensorBoard or XProf."""
    log_every_steps: int = 50
    tensorboard: bool = False
    """Writes the scalars of metrics.jsonl for TensorBoard too."""

    def __post_init__(self):
        check_types(self, "config.")
        check_each(self, "config.", _CONSTRAINTS)
        data, optimizer = self.data, self.optimizer
        for name in ("warmup_lr", "min_lr"):
            value, most = getattr(optimizer, name), optimizer.lr
            ok, text = value <= most, f"at most optimizer.lr={most}"
            require(f"config.optimizer.{name}", value, ok, text)
        value, epochs = optimizer.warmup_epochs, self.train_epochs
        ok, text = value < epochs, f"less than train_epochs={epochs}"
        require("config.optimizer.warmup_epochs", value, ok, text)
        try:
            re.compile(optimizer.frozen)
        except re.error as error:
            raise UserError(
                f"config.optimizer.frozen={optimizer.frozen!r} is no regular "
                f"expression ({error}): write it like 'stem|stages.0'."
            ) from error
        ok = data.decode == "exact" or data.crop == "resized"
        require("config.data.decode", data.decode, ok, "exact for padded crops")
        if data.rand_augment:
            rand_augment.parse(data.rand_augment)


def default_config() -> ConfigDict:
    """What a config file starts from: every setting, at its default.

    `config.model.name` is the variant; its other settings are the fields of
    `ModelConfig`, None for the variant's own value.  If left at None,
    `config.model.num_classes` is that of the data set.
    """
    name = "sparx_mamba_t"
    settings = as_dict(Config(model=models.model_config(name), model_name=name))
    del settings["model_name"]
    settings["model"] = {"name": name} | _placeholders(models.ModelConfig)
    config = ConfigDict(settings)
    config.lock()
    return config


def from_config_dict(config: ConfigDict, *, num_classes: int | None = None) -> Config:
    """The validated settings.

    Args:
      config: made by `default_config`, changed by a config file and overrides.
      num_classes: of the data set; used where the model's is not set.

    Raises:
      UserError: a setting has a wrong type or value.
    """
    values = config.to_dict()
    # No shell does it in --config.data.root=~/images.
    for folders, key in ((values, "init_from"), (values.get("data", {}), "root")):
        if isinstance(folders.get(key), str):
            folders[key] = os.path.expanduser(folders[key])
    overrides = _without_none(values.pop("model", {}))
    name = overrides.pop("name", None)
    if num_classes is not None:
        classes = overrides.setdefault("num_classes", num_classes)
        require(
            "config.model.num_classes",
            classes,
            classes >= num_classes,
            f"at least {num_classes}, the classes of the data set",
        )
    model = models.model_config(name, **overrides)
    for key, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind) and key in values:
            values[key] = kind(**values[key])
    return Config(model=model, model_name=name, **values)


def as_dict(config: Config) -> dict[str, Any]:
    """Plain values, for JSON."""
    return dataclasses.asdict(config)


def changes(saved: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What two results of `as_dict` do not share: "a.b=1 there, 2 here" by "a.b".

    A setting that `saved` does not know, since it is of an older version, is no change.
    """
    there, here = _flat(saved), _flat(new)
    return {
        key: f"{key}={there[key]!r} there, {here[key]!r} here"
        for key in sorted(there.keys() & here.keys())
        if there[key] != here[key]
    }


def changes_of_run(saved: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The texts of those `changes` that alter what a run computes."""
    found = changes(saved, new).items()
    return [text for key, text in found if not re.fullmatch(_FREE_SETTINGS, key)]


def _flat(values, prefix=""):
    """By dotted path, with lists for tuples, as JSON gives them back."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _placeholders(kind):
    """Typed None for every field of a model configuration, nested ones too."""
    settings = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            settings[name] = _placeholders(hint)
        elif get_origin(hint) is Literal:
            settings[name] = config_dict.placeholder(type(get_args(hint)[0]))
        else:
            settings[name] = config_dict.placeholder(get_origin(hint) or hint)
    return settings


def _without_none(values):
    nested = {
        k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items()
    }
    return {k: v for k, v in nested.items() if v is not None and v != {}}
