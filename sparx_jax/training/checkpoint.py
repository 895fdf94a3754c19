"""Checkpoints by Orbax, four items a step, with fingerprints of every array."""

import contextlib
import functools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sparx_jax.errors import DamagedError, StorageError, UserError
from sparx_jax.parallel import leaf_name
from sparx_jax.parallel.processes import together
from sparx_jax.training.config import changes
from sparx_jax.training.fingerprint import differing, fingerprints
from sparx_jax.training.logging import say
from sparx_jax.training.state import TrainState, Weights, abstract

WeightKind = Literal["raw", "ema"]

# Separate items, so that evaluation reads no more than the weights that it wants.
ITEMS = ("params", "ema", "optimizer", "meta")
# Settings of a model that change no shape: a checkpoint serves all of their values.
_FREE_MODEL_SETTINGS = ("drop_path_rate", "dtype", "scan_method", "remat")
# How Orbax and TensorStore tell of a disk that is full or must not be written.
_STORAGE_SIGNS = (
    "No space left",
    "RESOURCE_EXHAUSTED",
    "Error writing",
    "File too large",
    "Disk quota",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
)


class _Manager(ocp.CheckpointManager):
    """Reads metrics from `meta`: a damaged file of them would close the folder."""

    def metrics(self, step):
        try:
            path = self.directory / str(step) / "meta" / "metadata"
            return {"top1": float(json.loads(path.read_text())["metrics"]["top1"])}
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or not evaluated
            return None


def _while_others_delete(function):
    """Its result, though a step that it looks at may vanish: training goes on."""
    for _ in range(3):
        with contextlib.suppress(FileNotFoundError):
            return function()
    return function()


@functools.cache
def _silence_what_is_abandoned():
    """Where one array fails, Orbax abandons the others: each would show a traceback."""
    show = sys.unraisablehook

    def hook(unraisable):
        name = getattr(unraisable.object, "__name__", "")
        ended = str(unraisable.exc_value) == "Event loop is closed"
        if not ended and name != "_read_array_index_and_device_put":
            show(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of a work folder: the best, the two latest.

    `params` and `ema` hold the network's arrays by path, parameters and BatchNorm
    statistics alike; `optimizer` the moments; `meta` a JSON object with `step`,
    `config`, `class_names`, `train_examples`, `metrics` and `fingerprints`.
    """

    def __init__(self, workdir: str, *, read_only: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        if read_only and not self.path.is_dir():
            raise UserError(
                f"{workdir} holds no checkpoints: give the folder of a training run; a "
                "bucket has to be mounted."
            )

        def top1(metrics):
            return metrics["top1"]

        keep = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(2),  # one to fall back to
                preservation_policy.BestN(
                    get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._replaced = self.path.parent / "replaced"
        _silence_what_is_abandoned()
        if not read_only:
            self._put_back()
        with self._storage_errors():
            options = ocp.CheckpointManagerOptions(
                best_fn=top1,  # without it Orbax knows no best step
                best_mode="max",
                read_only=read_only,
                preservation_policy=None if read_only else keep,
                cleanup_tmp_directories=not read_only,
            )
            self._manager = _while_others_delete(
                lambda: _Manager(self.path, item_names=ITEMS, options=options)
            )
        # Each process reads by itself: the manager's restore would leave the others
        # waiting for one that fails.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={jax.process_index()}
        )
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
            ),
            multiprocessing_options=alone,
        )

    def save(
        self,
        state: TrainState,
        config: dict,
        metrics: dict[str, float] | None,
        *,
        class_names: Sequence[str] = (),
        train_examples: int | None = None,
    ) -> None:
        """Starts to write a step; `metrics["top1"]`, if known by now, ranks it.

        What else is given, of the run and its data, becomes part of `meta`.

        Raises StorageError if this or the write before it fails.
        """
        step = int(state.step)
        items = {
            "params": _as_item(state.weights),
            "ema": state.ema and _as_item(state.ema),
            "optimizer": state.opt_state,
        }
        items = {name: item for name, item in items.items() if item is not None}
        meta = {
            "step": step,
            "config": config,
            "class_names": list(class_names),
            "train_examples": train_examples,
            "metrics": metrics,
            "fingerprints": {k: fingerprints(item) for k, item in items.items()},
        }
        meta["checksum"] = _checksum(meta)
        args = {k: ocp.args.StandardSave(item) for k, item in items.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)
        self.wait()
        with self._storage_errors():
            if step in self._manager.all_steps():  # now its metrics are known
                self._set_aside([step], self._replaced)
            saved = self._manager.save(step, args=args, metrics=metrics)
        if not saved:  # Orbax says no more than that
            raise RuntimeError(f"Orbax did not save step {step} in {self.path}")

    def wait(self) -> None:
        """Waits for the write in progress.

        Raises StorageError on all processes if it failed on one.
        """

        def finish():
            with self._storage_errors():
                self._manager.wait_until_finished()

        together(finish)
        if jax.process_index() == 0:  # what it replaces is no longer needed
            shutil.rmtree(self._replaced, ignore_errors=True)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def find(self, which: str) -> int:
        """The step that "best", "latest" or a number stands for.

        Raises UserError if there is none.
        """
        _while_others_delete(self._manager.reload)  # a training beside this may save
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(
                f"{self.path} holds no complete checkpoint: train first, or wait for "
                "the first save."
            )
        if which == "latest":
            return steps[-1]
        if which == "best":
            return self._manager.best_step() or steps[-1]
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(
                f"there is no checkpoint {which!r} in {self.path}: use best, latest or "
                f"one of {', '.join(map(str, steps))}."
            )
        return int(which)

    def read(self, which: str, function: Callable[[int], Any]) -> Any:
        """`function` of the step that `which` stands for, see `find`.

        Where that is damaged it may just be deleted by a training beside this, and then
        "best" and "latest" soon stand for another.
        """
        failed = None
        while True:
            step = self.find(which)
            try:
                return function(step)
            except DamagedError:
                if which.isdecimal() or step == failed:
                    raise
            failed = step
            time.sleep(1)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object of a step.  Raises DamagedError."""
        return together(lambda: self._meta(step))

    def restore(self, step: int, like: TrainState, model: dict) -> TrainState:
        """The state of a step, with the shapes and shardings of `like`.

        Raises UserError if it is of another model, DamagedError if it is not what was
        saved.
        """
        targets = {"params": _as_item(like.weights), "optimizer": like.opt_state}
        if like.ema is not None:
            targets["ema"] = _as_item(like.ema)
        restored = self._restore(step, targets, model)
        weights = _from_item(restored["params"], like.weights)
        ema = like.ema and _from_item(restored["ema"], like.ema)
        number = np.asarray(step, like.step.dtype)
        step_array = jax.device_put(number, like.step.sharding)
        return TrainState(step_array, weights, ema, restored["optimizer"])

    def restore_latest(self, like: TrainState, model: dict) -> TrainState | None:
        """The newest state that is undamaged, or None if nothing was saved.

        Damaged steps are moved to `damaged/` in the work folder, and reported.

        Raises UserError if all are damaged, or as `restore`.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self.restore(step, like, model)
            except DamagedError as error:
                print(f"{error} Looking for an earlier one.", flush=True)  # on each
                damaged.append(step)
                continue
            if damaged:
                folder = self.path.parent / "damaged"
                self._set_aside(damaged, folder, f"-{time.time_ns()}")
                say(f"moved damaged checkpoint(s) {damaged} to {folder}")
            return state
        if damaged:
            raise DamagedError(
                f"no checkpoint in {self.path} can be used, all of {damaged} are "
                "damaged: restore the folder from a copy or give another --workdir."
            )
        return None

    def restore_weights(
        self,
        step: int,
        kind: WeightKind | Literal["auto"],
        like: Weights,
        model: dict,
    ) -> tuple[WeightKind, Weights]:
        """Only the raw or averaged weights of a step, and which; auto: averaged if any.

        Raises as `restore`.
        """
        if kind == "auto":
            kind = "ema" if "ema" in self.meta(step)["fingerprints"] else "raw"
        item = "params" if kind == "raw" else "ema"
        restored = self._restore(step, {item: _as_item(like)}, model)
        return kind, _from_item(restored[item], like)

    def close(self) -> None:
        """Waits for the write in progress and frees all resources.

        Raises StorageError if the write fails.
        """
        self._reader.close()
        with self._storage_errors():
            self._manager.close()

    def _restore(self, step, targets, model):
        """The items `targets` of a step, on all processes; all fail alike."""
        args = {k: ocp.args.StandardRestore(abstract(v)) for k, v in targets.items()}

        def read():
            saved = self._checked(step, targets, model)
            with self._damage(step):
                return saved, self._read(step, **args)

        saved, restored = together(read)
        for name in targets:
            if wrong := differing(saved[name], fingerprints(restored[name])):
                more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
                raise self._damaged(
                    step, f"{name} {wrong[0]}{more} differs from what was saved"
                )
        return restored

    def _checked(self, step, targets, model):
        """Fingerprints by item, once it is known that `targets` fit the step."""
        meta = self._meta(step)
        self._check_model(step, meta, model)
        if "ema" in targets and "ema" not in meta["fingerprints"]:
            raise UserError(
                f"checkpoint {step} in {self.path} was saved without a moving average: "
                "set config.use_ema=False, and in eval.py --weights=raw."
            )
        with self._damage(step):
            saved = {name: dict(meta["fingerprints"][name]) for name in targets}
        self._check_arrays(step, saved, targets)
        return saved

    def _meta(self, step):
        with self._damage(step):
            meta = dict(self._read(step, meta=ocp.args.JsonRestore())["meta"])
            # Checkpoints of older versions have none.
            if meta.pop("checksum", None) not in (None, _checksum(meta)):
                raise ValueError("meta differs from what was saved")
            if meta["step"] != step:
                raise ValueError(f"it is that of step {meta['step']}")
            dict(meta["fingerprints"])  # or it is damaged
            return meta

    def _read(self, step, **args):
        path = self.path / str(step)
        return self._reader.restore(path, args=ocp.args.Composite(**args))

    @contextlib.contextmanager
    def _damage(self, step) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises errors of every kind
            first = error
            while first.__cause__:
                first = first.__cause__
            reason = str(first).splitlines() or ["no reason given"]
            why = f"it cannot be read ({type(first).__name__}: {reason[0][:200]})"
            raise self._damaged(step, why) from error

    def _damaged(self, step, why):
        return DamagedError(
            f"checkpoint {step} in {self.path} is damaged: {why}; use another step "
            "or a copy."
        )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            signs = [sign for sign in _STORAGE_SIGNS if sign in str(error)]
            if not isinstance(error, OSError) and not signs:
                raise
            reason = signs[0] if signs else error
            raise StorageError(
                f"{self.path} cannot be written ({reason}): make room or give another "
                "--workdir, then start again; the checkpoints before are intact."
            ) from error

    def _set_aside(self, steps, folder, suffix=""):
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            for step in steps:
                os.replace(self.path / str(step), folder / f"{step}{suffix}")
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()

    def _put_back(self):
        """What was to be replaced when the run was killed."""
        if jax.process_index() == 0 and self._replaced.is_dir():
            for step in self._replaced.iterdir():
                if not (self.path / step.name).exists():  # else it is complete
                    os.replace(step, self.path / step.name)
            shutil.rmtree(self._replaced)
        multihost_utils.sync_global_devices("checkpoints put back")

    def _check_model(self, step, meta, model):
        differing = [
            text
            for key, text in changes(meta["config"]["model"], model).items()
            if key not in _FREE_MODEL_SETTINGS
        ]
        if differing:
            raise UserError(
                f"checkpoint {step} in {self.path} is of another model: "
                f"{'; '.join(differing)}; use the config it was trained with "
                "or another --workdir."
            )

    def _check_arrays(self, step, saved, targets):
        for name, item in targets.items():
            leaves = jax.tree_util.tree_leaves_with_path(item)
            if other := saved[name].keys() ^ {leaf_name(path) for path, _ in leaves}:
                raise UserError(
                    f"checkpoint {step} in {self.path} has other arrays in {name} than "
                    f"this run, {len(other)} such as {min(other)}: it is of another "
                    "config.optimizer or version of sparx_jax. Give another --workdir, "
                    "and this one as config.init_from to start from its weights."
                )


def other_class(meta: dict[str, Any], names: Sequence[str]) -> str:
    """The first class that a checkpoint's `meta` has by another name; "" if none.

    Where either has no names at all, nothing is known.
    """
    saved = meta.get("class_names")
    for i, (there, here) in enumerate(zip_longest(saved or (), names)):
        if saved and names and there != here:
            return f"class {i} is {there!r} there, {here!r} here"
    return ""


def _checksum(meta):
    """Of the one item that no fingerprint covers."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _as_item(weights):
    return weights.params | weights.batch_stats


def _from_item(item, like):
    return Weights(*({path: item[path] for path in arrays} for arrays in like))
