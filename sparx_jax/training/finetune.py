"""Weights of another run or file as the start of a run on other images."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sparx_jax.errors import UserError
from sparx_jax.interop.names import from_torch, skeleton, torch_name
from sparx_jax.interop.torch_files import read_torch_file
from sparx_jax.interop.windows import resize_position_bias
from sparx_jax.parallel.processes import together
from sparx_jax.training.checkpoint import other_class
from sparx_jax.training.logging import say
from sparx_jax.training.restore import restore_run
from sparx_jax.training.state import TrainState, Weights

HEAD = ("head.kernel", "head.bias")

Arrays = dict[str, np.ndarray]


def start_from(
    source: str, state: TrainState, class_names: Sequence[str] = ()
) -> TrainState:
    """A fresh state with the parameters and BatchNorm statistics of `source`.

    The classifier keeps its own initial weights where `source` has another number of
    classes, others as far as their names are known, or none; biases of other windows
    are stretched; the moving average starts at what was loaded. Says what it did.

    Args:
      source: a run's folder, for its best checkpoint, or one of its checkpoints,
        `FOLDER/checkpoints/STEP`, of which the average counts if there is one; or a
        `.pth` or `.safetensors` file under the names of the torch networks. If empty,
        nothing happens.
      state: of the new run.
      class_names: of the new run, to be compared with those of `source`.

    Raises:
      UserError: there is no such source, or it is of another network.
    """
    if not source:
        return state
    own = state.weights.params | state.weights.batch_stats
    path = together(lambda: _existing(source))
    if path.is_dir():
        arrays, what, meta = _from_run(path, state.step.sharding)
        other = other_class(meta, class_names)
    else:
        arrays, what, other = together(lambda: _from_torch(path, own)), source, ""
    fitted, new_head = _fit(arrays, own, source, other)
    there = arrays["head.bias"].size if "head.bias" in arrays else "no"
    why = other or f"{there} classes there, {own['head.bias'].size} here"
    say(f"starting from {what}" + (f"; a new head: {why}" if new_head else ""))

    def placed():
        return Weights(
            *(
                {p: _place(fitted[p], a) if p in fitted else a.copy() for p, a in group}
                for group in map(dict.items, state.weights)
            )
        )

    return state._replace(weights=placed(), ema=placed() if state.ema else None)


def _existing(source):
    path = Path(source).absolute()
    if not path.exists():
        raise UserError(
            f"config.init_from is {source!r}, which does not exist: give a run's "
            "folder, one of its checkpoints, or a .pth or .safetensors file."
        )
    return path


def _from_run(path, sharding):
    """Arrays of a run's folder or one of its checkpoints, what they are, and meta."""
    is_step = path.name.isdigit() and path.parent.name == "checkpoints"
    workdir, which = (path.parents[1], path.name) if is_step else (path, "best")
    found = restore_run(str(workdir), which, "auto", sharding)
    what = f"step {found.step:,} of {workdir} ({found.kind} weights)"
    params, statistics = jax.device_get(found.weights)
    return params | statistics, what, found.meta


def _from_torch(path, own):
    """Arrays of a torch file, whatever the number of its classes."""
    weights, shapes = read_torch_file(path), {p: a.shape for p, a in own.items()}
    whose = skeleton(shapes)
    for ours in HEAD:
        name = torch_name(ours, whose)
        if name in weights:
            shapes[ours] = weights[name].shape[::-1]
        else:
            del shapes[ours]
    return from_torch(weights, shapes)


def _fit(
    arrays: Arrays, own: Arrays, source: str, other_classes: str = ""
) -> tuple[Arrays, bool]:
    """What of `arrays` goes where in `own`, and whether the head stays new."""
    given, needed = dict(arrays), dict(own)
    new_head = bool(other_classes) or any(
        _shape(given, path) != _shape(needed, path) for path in HEAD
    )
    for path in HEAD if new_head else ():
        given.pop(path, None)
        del needed[path]
    for path in given.keys() & needed.keys():
        span = needed[path].shape[:1]
        if path.endswith("position_bias") and given[path].shape[:1] != span:
            given[path] = resize_position_bias(given[path], span[0] // 2 + 1)
    differing = [
        f"{path} ({_shape(given, path)} there, {_shape(needed, path)} here)"
        for path in sorted(given.keys() | needed.keys())
        if _shape(given, path) != _shape(needed, path)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"config.init_from={source} is of another network: "
            f"{', '.join(differing[:5])}{more}; set config.model as it was there "
            "(the number of classes may differ)."
        )
    return given, new_head


def _shape(arrays, path):
    return tuple(arrays[path].shape) if path in arrays else "absent"


def _place(array, like):
    """On the devices as `like` lies there; each process gives its own part."""
    array = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: array[index]
    )
