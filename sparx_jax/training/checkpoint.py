"""Checkpoints by Orbax: four items a step, the best and the latest step kept."""

from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sparx_jax.errors import UserError
from sparx_jax.training.state import TrainState, Weights, abstract

WeightKind = Literal["raw", "ema"]

# Separate items, so that evaluation reads no more than the weights that it wants.
ITEMS = ("params", "ema", "optimizer", "meta")
# Settings of a model that change no shape: a checkpoint serves all of their values.
_FREE_MODEL_SETTINGS = ("drop_path_rate", "dtype", "scan_method")


class Checkpoints:
    """The checkpoints of a work folder.

    `params` and `ema` hold the network's arrays by path, parameters and BatchNorm
    statistics alike; `optimizer` the moments; `meta` a JSON object with `step`,
    `config` and `metrics`.
    """

    def __init__(self, workdir: str, *, read_only: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        if read_only and not self.path.is_dir():
            raise UserError(
                f"{workdir} holds no checkpoints: give the --workdir of a training run."
            )

        def top1(metrics):
            return metrics["top1"]

        keep = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(
                    get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.path,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                best_fn=top1,  # without it Orbax would not store the metrics
                best_mode="max",
                read_only=read_only,
                preservation_policy=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def save(self, state: TrainState, config: dict, metrics: dict[str, float]) -> None:
        """Starts to write a step; `metrics["top1"]` ranks it."""
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(_as_item(state.weights)),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave(
                {"step": step, "config": config, "metrics": metrics}
            ),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(_as_item(state.ema))
        saved = self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=metrics
        )
        if not saved:  # Orbax says no more than that
            raise RuntimeError(f"Orbax did not save step {step} in {self.path}")

    def wait(self) -> None:
        """Waits for the write in progress."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def find(self, which: str) -> int:
        """The step that "best", "latest" or a number stands for.

        Raises UserError if there is none.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self.path} holds no complete checkpoint: train first.")
        if which == "latest":
            return steps[-1]
        if which == "best":
            return self._manager.best_step() or steps[-1]
        if not which.isdigit() or int(which) not in steps:
            raise UserError(
                f"there is no checkpoint {which!r} in {self.path}: use best, latest or "
                f"one of {', '.join(map(str, steps))}."
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object of a step."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def restore(self, step: int, like: TrainState, model: dict) -> TrainState:
        """The state of a step, with the shapes and shardings of `like`."""
        self._check_model(step, model)
        items = {
            "params": _target(_as_item(like.weights)),
            "optimizer": _target(like.opt_state),
        }
        if like.ema is not None:
            items["ema"] = _target(_as_item(like.ema))
            self._require_ema(step)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        weights = _from_item(restored["params"], like.weights)
        ema = like.ema and _from_item(restored["ema"], like.ema)
        step_array = jax.device_put(
            jax.numpy.asarray(step, like.step.dtype), like.step.sharding
        )
        return TrainState(step_array, weights, ema, restored["optimizer"])

    def restore_weights(
        self, step: int, kind: WeightKind, like: Weights, model: dict
    ) -> Weights:
        """Only the raw or averaged weights of a step."""
        self._check_model(step, model)
        if kind == "ema":
            self._require_ema(step)
        item = "params" if kind == "raw" else "ema"
        args = ocp.args.Composite(**{item: _target(_as_item(like))})
        return _from_item(self._manager.restore(step, args=args)[item], like)

    def has_ema(self, step: int) -> bool:
        """Whether the step holds averaged weights."""
        return (self.path / str(step) / "ema").is_dir()

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.close()

    def _require_ema(self, step):
        if not self.has_ema(step):
            raise UserError(
                f"checkpoint {step} in {self.path} was saved without a moving average: "
                "set config.use_ema=False, and in eval.py --weights=raw."
            )

    def _check_model(self, step, model):
        saved = self.meta(step)["config"]["model"]
        wanted = _plain(model)
        differing = [
            f"{key}={saved.get(key)!r} there, {wanted.get(key)!r} here"
            for key in wanted.keys() | saved.keys()
            if saved.get(key) != wanted.get(key) and key not in _FREE_MODEL_SETTINGS
        ]
        if differing:
            raise UserError(
                f"checkpoint {step} in {self.path} is of another model: "
                f"{'; '.join(sorted(differing))}; use the config it was trained with "
                "or another --workdir."
            )


def _as_item(weights):
    return weights.params | weights.batch_stats


def _from_item(item, like):
    return Weights(*({path: item[path] for path in arrays} for arrays in like))


def _target(tree):
    return ocp.args.StandardRestore(abstract(tree))


def _plain(value):
    """As JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
