"""The training loop: steps, evaluations, checkpoints, and a picture at the end."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sparx_jax.data import train_batches
from sparx_jax.errors import UserError
from sparx_jax.parallel import put_batch
from sparx_jax.training import state as states
from sparx_jax.training.checkpoint import Checkpoints
from sparx_jax.training.config import Config, as_dict
from sparx_jax.training.evaluate import Evaluation, evaluate_split, write_report
from sparx_jax.training.finetune import start_from
from sparx_jax.training.logging import MetricsLog, Stopwatch, duration, say
from sparx_jax.training.optimizer import learning_rate, make_optimizer
from sparx_jax.training.setup import prepare, process_share
from sparx_jax.training.step import compile_eval_step, compile_train_step

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Plan(NamedTuple):
    """The lengths of a run in steps."""

    total_steps: int
    warmup_steps: int
    schedule_steps: int
    """Until the learning rate is at its end; the rest is the cooldown."""
    eval_every_steps: int
    steps_per_epoch: float

    def is_eval(self, step: int) -> bool:
        """Whether an evaluation is due; not shortly before that of the last step."""
        every, left = self.eval_every_steps, self.total_steps - step
        return step % every == 0 and left >= every / 2


def plan(config: Config, num_examples: int) -> Plan:
    """Turns epochs into steps; an epoch need not be a whole number of them."""
    steps_per_epoch = num_examples / config.batch_size
    schedule = max(1, round(config.train_epochs * steps_per_epoch))
    cooldown = round(config.cooldown_epochs * steps_per_epoch)
    warmup = round(config.optimizer.warmup_epochs * steps_per_epoch)
    every = max(1, round(config.eval_every_epochs * steps_per_epoch))
    warmup, total = min(warmup, schedule - 1), schedule + cooldown
    return Plan(total, warmup, schedule, every, steps_per_epoch)


def train(settings: ConfigDict, workdir: str) -> None:
    """Trains until the last step, from the latest checkpoint in `workdir` if any.

    A resumed run repeats what the uninterrupted one would have done, bit for bit on
    the same mesh: the order of the data and all randomness are functions of the step.
    Leaves `config.json`, `metrics.jsonl`, `checkpoints/` and `report.png`.

    Raises UserError on bad input, before anything is compiled.
    """
    watch = Stopwatch()
    setup = prepare(settings)
    _make_folder(workdir)
    checkpoints = Checkpoints(workdir)
    try:
        _train(setup, workdir, checkpoints, watch)
    finally:  # also after an error: the write in progress is finished
        checkpoints.close()


def _train(setup, workdir, checkpoints, watch):
    config, train_source, eval_source, mesh = setup
    lengths = plan(config, len(train_source))
    schedule = learning_rate(
        config.optimizer, lengths.warmup_steps, lengths.schedule_steps
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    network, state = states.init(
        config.model, optimizer, seed=config.seed, use_ema=config.use_ema, mesh=mesh
    )
    num_params = sum(array.size for array in state.weights.params.values())
    start = checkpoints.latest_step() or 0
    if start:
        state = checkpoints.restore(start, state, as_dict(config)["model"])
    else:
        state = start_from(config.init_from, state)
    _write_config(workdir, config, num_params)  # last: a refused run writes nothing
    say(
        f"{config.model_name}, {num_params:,} parameters, {len(train_source):,} "
        f"pictures of {len(train_source.class_names)} classes, {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s), {lengths.total_steps:,} steps"
        + (f"; going on after step {start:,}" if start else "")
    )
    watch.lap("initialisation")
    if start >= lengths.total_steps:
        say(f"nothing to do: {workdir} has reached step {start:,}")
        return

    train_step = compile_train_step(network, config, optimizer, schedule, state, mesh)
    eval_step = compile_eval_step(network, config, state.weights, mesh)
    log = MetricsLog(workdir, start_step=start, tensorboard=config.tensorboard)
    batches = train_batches(
        config.data,
        train_source,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        **process_share(),
    )
    window = _Window(config, lengths)
    evaluation = None
    for step in range(start + 1, lengths.total_steps + 1):
        wait_start = time.perf_counter()
        batch = put_batch(next(batches), mesh)
        waited = time.perf_counter() - wait_start
        state, metrics = train_step(state, batch)
        window.add(step, metrics, waited)
        if step == start + 1:
            jax.block_until_ready(metrics)
            watch.lap("compilation")
            window.restart()
        last = step == lengths.total_steps
        if last or step % config.log_every_steps == 0:
            log.write(window.close())
        if last or lengths.is_eval(step):
            jax.block_until_ready(metrics)
            watch.lap("training")
            evaluation, record = _evaluate_state(
                eval_step, state, config, eval_source, mesh
            )
            record = {"step": step, "epoch": step / lengths.steps_per_epoch} | record
            log.write(record)
            say(_eval_line(record))
            watch.lap("evaluation")
            checkpoints.save(state, as_dict(config), record)
            watch.lap("checkpoints")
            window.restart()
    checkpoints.wait()
    watch.lap("checkpoints")
    report = write_report(
        workdir, config, evaluation, eval_source, step=lengths.total_steps
    )
    watch.lap("report")
    parts = ", ".join(f"{k} {duration(v)}" for k, v in watch.seconds.items())
    say(f"{report} shows the run ({parts})")


class _Window:
    """Collects metrics between two log lines without waiting for the device.

    The metrics of a step are read when the next step has been dispatched.
    """

    def __init__(self, config, lengths):
        self._config, self._lengths = config, lengths
        self._pending, self._step = None, 0
        self.restart()

    def restart(self):
        self._start, self._waited, self._steps, self._losses = (
            time.perf_counter(),
            0.0,
            0,
            [],
        )

    def add(self, step, metrics, waited):
        pending, self._pending = self._pending, metrics
        if pending is not None:
            self._losses.append(jax.device_get(pending)["train_loss"])
        self._step, self._steps = step, self._steps + 1
        self._waited += waited

    def close(self):
        """The record of the window, which is also printed."""
        metrics, self._pending = jax.device_get(self._pending), None
        self._losses.append(metrics["train_loss"])
        elapsed = time.perf_counter() - self._start
        rate = self._steps * self._config.batch_size / elapsed
        record = {
            "step": self._step,
            "epoch": self._step / self._lengths.steps_per_epoch,
            "train_loss": float(np.mean(self._losses, dtype=np.float64)),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "images_per_s": rate,
            "data_wait": self._waited / elapsed,
        }
        left = (self._lengths.total_steps - self._step) * self._config.batch_size
        left = duration(left / rate) if rate else "?"
        say(
            f"step {self._step:,}/{self._lengths.total_steps:,}  epoch "
            f"{record['epoch']:.1f}  loss {record['train_loss']:.4f}  lr "
            f"{record['learning_rate']:.1e}  {rate:,.0f} images/s  {left} left  "
            f"waiting for data {record['data_wait']:.0%}"
        )
        self.restart()
        return record


def _evaluate_state(eval_step, state, config, source, mesh):
    """The evaluation that counts (EMA if kept), and the record of all."""

    def run(weights) -> Evaluation:
        return evaluate_split(eval_step, weights, config, source, mesh)

    main = raw = run(state.weights)
    if state.ema is not None:
        main = run(state.ema)
    record = {"eval_loss": main.loss, "top1": main.top1, "top5": main.top5}
    if state.ema is not None:
        record |= {
            "raw_eval_loss": raw.loss,
            "raw_top1": raw.top1,
            "raw_top5": raw.top5,
        }
    return main, record


def _eval_line(record):
    raw = f", raw {record['raw_top1']:.2f} %" if "raw_top1" in record else ""
    return (
        f"evaluation after step {record['step']:,}: top-1 {record['top1']:.2f} %{raw}, "
        f"loss {record['eval_loss']:.4f}"
    )


def _make_folder(workdir):
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made ({error.strerror}): give the path of "
            "a folder that may be written."
        ) from error


def _write_config(workdir, config, num_params):
    if jax.process_index() == 0:
        versions = {name: version(name) for name in PACKAGES}
        content = {
            "config": as_dict(config),
            "parameters": num_params,
            "versions": versions | {"python": platform.python_version()},
            "devices": [str(device) for device in jax.devices()],
        }
        path = Path(workdir) / "config.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
