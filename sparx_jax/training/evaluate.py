"""Evaluation of a whole split: every example counts once, whatever the batch size."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sparx_jax import models
from sparx_jax.data import (
    UNREADABLE,
    DataConfig,
    EvalSet,
    Source,
    decode_image,
    eval_batches,
    eval_transform,
    open_eval_set,
    too_many_unreadable,
)
from sparx_jax.errors import UserError
from sparx_jax.parallel import put_batch, state_shardings
from sparx_jax.parallel.processes import together
from sparx_jax.training import state as states
from sparx_jax.training.checkpoint import Checkpoints, other_class
from sparx_jax.training.config import Config, as_dict, changes
from sparx_jax.training.logging import (
    Stopwatch,
    duration,
    read_metrics,
    say,
    without_nan,
)
from sparx_jax.training.results import Result, table, write_results
from sparx_jax.training.setup import prepare, process_share
from sparx_jax.training.state import Weights
from sparx_jax.training.step import compile_eval_step
from sparx_jax.training.workdir import storage_errors

# How images are prepared: a network sees others than it was trained for.
_IMAGE_SETTINGS = tuple(
    f"data.{name}" for name in ("image_size", "crop", "crop_ratio", "mean", "std")
)


class Evaluation(NamedTuple):
    """Means over what could be read of a split, and all answers in its order."""

    loss: float
    """Cross entropy in nats, without label smoothing."""
    top1: float
    """Percent of the examples whose label has the highest score."""
    top5: float
    """The same among the five highest scores."""
    examples: int
    unreadable: int
    """Examples that the means leave out."""
    label: np.ndarray
    """-1 where the example could not be read."""
    predicted: np.ndarray
    probability: np.ndarray
    """That of the predicted class."""


def evaluate_split(
    eval_step: Callable[[Weights, dict], dict],
    weights: Sequence[Weights],
    config: Config,
    source: Source,
    mesh: Mesh,
) -> list[Evaluation]:
    """Runs the compiled `eval_step` over the whole of `source`, once for all `weights`.

    Raises BadDataError if too much of it is unreadable.
    """
    batches = eval_batches(
        config.data, source, batch_size=config.eval_batch_size, **process_share()
    )
    results = [[] for _ in weights]
    for batch in batches:
        batch = put_batch(batch, mesh)
        for found, each in zip(results, weights, strict=True):
            found.append(eval_step(each, batch))
            if len(found) > 1:  # the device is one batch behind, not the whole split
                found[-2] = jax.device_get(found[-2])
    results = jax.device_get(results)
    unreadable = sum(np.sum(result["label"] == UNREADABLE) for result in results[0])
    if error := too_many_unreadable(unreadable, source, config.data):
        raise error
    if unreadable:
        say(f"left out: {unreadable} of {len(source):,} examples, which are unreadable")
    return [_evaluation(found, unreadable) for found in results]


def _evaluation(results, unreadable):
    """That of the sums and answers of all batches."""

    def total(name):
        return float(sum(np.float64(result[name]) for result in results))

    def answers(name):
        return np.concatenate([result[name] for result in results])[order]

    examples = total("examples")
    index = np.concatenate([result["index"] for result in results])
    order = np.argsort(index, kind="stable")[np.count_nonzero(index < 0) :]
    return Evaluation(
        total("loss") / examples,
        100 * total("top1") / examples,
        100 * total("top5") / examples,
        int(examples),
        int(unreadable),
        *(answers(name) for name in ("label", "predicted", "probability")),
    )


def evaluate_checkpoint(
    settings: ConfigDict,
    workdir: str,
    *,
    step: str = "best",
    weights: str = "auto",
    datasets: Sequence[str] = ("val",),
    resolutions: Sequence[int] = (),
) -> dict[str, Any]:
    """Restores a checkpoint onto whatever mesh there is, evaluates it and reports.

    Args:
      settings: the config that the run was trained with.
      workdir: of the run.
      step: "best", "latest" or a number.
      weights: "raw", "ema", or "auto" for the average if it was saved.
      datasets: of `data.eval_sets`, in the order of the rows of the table.
      resolutions: pixels of the square images; none: that of the config.  Each
        compiles anew; the crop ratio stays, and memory may ask for a smaller
        `eval_batch_size`.

    Returns:
      What is printed as one line of JSON: `step`, `weights`, `model`, `workdir`, and
      `results`, the fields of each `Result`; those of the first are there once more on
      their own.

    Raises UserError if there is no such checkpoint, it is of another model, or a set or
    resolution cannot be evaluated; StorageError if only the results cannot be written.
    """
    watch = Stopwatch()
    with closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        checkpoints.find(step)  # or the folder is told before the data set
        config, _, source, mesh = together(lambda: prepare(settings, training=False))
        network, like = states.split(models.build(config.model, config.seed))
        like = jax.device_put(like, state_shardings(like, mesh))
        number, weights, restored = checkpoints.read(
            step, lambda n: _restore(checkpoints, n, weights, config, source, like)
        )
    sizes = resolutions or (config.data.image_size,)
    configs = [_at_resolution(config, size) for size in sizes]
    sets = together(
        lambda: {name: open_eval_set(name, config.data, source) for name in datasets}
    )
    watch.lap("restoring")
    results, to_draw = [], None
    for at_size in configs:
        eval_step = compile_eval_step(network, at_size, restored, mesh)
        rows, evaluation = evaluate_sets(eval_step, restored, at_size, sets, mesh)
        results += rows
        watch.lap("evaluation, compilation included,")
        if at_size == config:
            to_draw = evaluation
    title = f"{config.model_name} after step {number:,}, {weights} weights"
    summary = {
        "model": config.model_name,
        "workdir": str(workdir),
        "step": number,
        "weights": weights,
        **without_nan(results[0]._asdict()),
        "results": [without_nan(result._asdict()) for result in results],
    }
    parts = ", ".join(f"{k} {duration(v)}" for k, v in watch.seconds.items())
    say(f"{title}:\n{table(results)}\nalso in {workdir} ({parts})")
    say(json.dumps(summary, allow_nan=False))
    if jax.process_index() == 0:  # last: what cannot be written costs no number
        with storage_errors(workdir):
            write_results(workdir, title, results, summary)
    if to_draw:
        write_report(workdir, config, to_draw, source, title=title)
    return summary


def _restore(checkpoints, step, weights, config, source, like):
    """Number of the step, kind of the weights, and the weights themselves."""
    meta = checkpoints.meta(step)
    if other := other_class(meta, source.class_names):
        raise UserError(
            f"step {step} of {checkpoints.path.parent} was trained on other classes, "
            f"{other}: give the data set of the same classes, the folders by the same "
            "names."
        )
    settings = as_dict(config)
    kind, restored = checkpoints.restore_weights(step, weights, like, settings["model"])
    differing = changes(meta["config"], settings)
    if texts := [differing[key] for key in _IMAGE_SETTINGS if key in differing]:
        say(f"images are prepared otherwise than in training: {'; '.join(texts)}")
    return step, kind, restored


def evaluate_sets(
    eval_step: Callable[[Weights, dict], dict],
    weights: Weights,
    config: Config,
    sets: Mapping[str, EvalSet],
    mesh: Mesh,
) -> tuple[list[Result], Evaluation | None]:
    """A result for each set, and the evaluation of the evaluation split, if any.

    Sets that differ only in what is right share one pass over the images.
    """
    results, passes = [], {}
    for name, (source, classes, answers) in sets.items():
        if id(source) not in passes:
            allowed = weights if classes is None else restrict(weights, classes)
            (passes[id(source)],) = evaluate_split(
                eval_step, [allowed], config, source, mesh
            )
        evaluation = passes[id(source)]
        row = Result(name, config.data.image_size, *evaluation[:5])
        results.append(
            row if answers is None else _by_answers(row, evaluation, answers)
        )
    val = sets.get("val") or sets.get("real")
    return results, val and passes[id(val.source)]


def restrict(weights: Weights, classes: np.ndarray) -> Weights:
    """Weights of a network that gives all but `classes` no chance.

    The logits of `classes` keep their bits, so that the highest of them, and the
    softmax over them, are those of a network without the other classes.
    """
    bias = weights.params["head.bias"]
    allowed = np.isin(np.arange(len(bias)), classes)
    # Finite, since a logit of minus infinity times a target of 0 would be NaN.
    bias = jax.jit(partial(jnp.where, allowed), out_shardings=bias.sharding)(bias, -1e9)
    return weights._replace(params=weights.params | {"head.bias": bias})


def _by_answers(row, evaluation, answers):
    """ReaL: right is any of several labels; images without one count for nothing."""
    right = [
        predicted in labels
        for predicted, label, labels in zip(
            evaluation.predicted, evaluation.label, answers, strict=True
        )
        if labels and label >= 0  # -1: could not be read
    ]
    top1 = 100 * float(np.mean(right)) if right else float("nan")
    return row._replace(examples=len(right), top1=top1, top5=None, loss=None)


def _at_resolution(config, size):
    data = dataclasses.replace(config.data, image_size=size)
    return dataclasses.replace(config, data=data)


def write_report(
    workdir: str, config: Config, evaluation: Evaluation, source: Source, *, title: str
) -> Path:
    """Draws `report.png`: curves, wrong answers, wiring of the network.

    `title` says of what `evaluation` is: network, step, kind of weights.
    """
    from sparx_jax import plots  # matplotlib takes a second that pods need not spend

    path = Path(workdir) / "report.png"
    if jax.process_index() == 0:
        right = f"{evaluation.top1:.2f} % of {evaluation.examples:,} images right"
        title = f"{title}: {right}"
        figure = plots.report_figure(
            history=read_metrics(workdir),
            wrong=wrong_answers(evaluation, source, config.data),
            model=config.model,
            title=title,
        )
        with storage_errors(path):
            plots.write_figure(figure, path, title)
    return path


def wrong_answers(
    evaluation: Evaluation, source: Source, data: DataConfig, limit: int = 16
) -> list:
    """The most confident mistakes, as images for a report."""
    from sparx_jax.plots import WrongAnswer

    transform, names = eval_transform(data), source.class_names
    read = evaluation.label != UNREADABLE
    wrong = np.flatnonzero(read & (evaluation.predicted != evaluation.label))
    wrong = wrong[np.argsort(-evaluation.probability[wrong], kind="stable")][:limit]
    return [
        WrongAnswer(
            image=transform(decode_image(source[int(i)]["image"])),
            # A network may have more classes than the data set.
            predicted=dict(enumerate(names)).get(
                int(evaluation.predicted[i]), f"class {evaluation.predicted[i]}"
            ),
            true=names[evaluation.label[i]],
            probability=float(evaluation.probability[i]),
            name=source.name(int(i)),
        )
        for i in wrong
    ]
