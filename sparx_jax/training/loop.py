"""The training loop: steps, evaluations, checkpoints, and a figure at the end."""

import time
from contextlib import suppress
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sparx_jax.data import too_many_unreadable, train_batches
from sparx_jax.errors import (
    BadDataError,
    NonFiniteLossError,
    Preempted,
    StorageError,
    TooManyUnreadableError,
    UserError,
)
from sparx_jax.parallel import put_batch
from sparx_jax.parallel.processes import stop_request, together
from sparx_jax.training import state as states
from sparx_jax.training import workdir as workdirs
from sparx_jax.training.checkpoint import Checkpoints, other_class
from sparx_jax.training.config import Config, as_dict, changes_of_run
from sparx_jax.training.evaluate import evaluate_split, write_report
from sparx_jax.training.finetune import start_from
from sparx_jax.training.goodput import Goodput
from sparx_jax.training.logging import MetricsLog, duration, say
from sparx_jax.training.optimizer import learning_rate, make_optimizer, trainable
from sparx_jax.training.setup import prepare, process_share
from sparx_jax.training.step import compile_eval_step, compile_train_step


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
        return left == 0 or (step % every == 0 and left >= every / 2)


def plan(config: Config, num_examples: int) -> Plan:
    """Turns epochs into steps; an epoch need not be a whole number of them."""
    steps_per_epoch = num_examples / config.batch_size
    schedule = max(1, round(config.train_epochs * steps_per_epoch))
    cooldown = round(config.cooldown_epochs * steps_per_epoch)
    warmup = round(config.optimizer.warmup_epochs * steps_per_epoch)
    every = max(1, round(config.eval_every_epochs * steps_per_epoch))
    warmup, total = min(warmup, schedule - 1), schedule + cooldown
    return Plan(total, warmup, schedule, every, steps_per_epoch)


def train(
    settings: ConfigDict, workdir: str, *, allow_config_change: bool = False
) -> None:
    """Trains until the last step, from the latest checkpoint in `workdir` if any.

    A resumed run repeats what the uninterrupted one would have done, bit for bit on
    the same mesh: the order of the data and all randomness are functions of the step.
    Leaves `config.json`, `metrics.jsonl`, `goodput.json`, `checkpoints/` and
    `report.png`.

    Args:
      settings: the config.
      workdir: of this run; one trainer at a time.
      allow_config_change: goes on from a checkpoint of other settings, as long as the
        network's arrays are the same.

    Raises:
      UserError: bad input, before a step is compiled; its subclasses as they say.
      Preempted: after SIGTERM, with the state saved.
    """
    goodput = Goodput(workdir)
    setup = together(lambda: prepare(settings))
    with workdirs.held(workdir), stop_request() as stop:
        checkpoints = Checkpoints(workdir)
        try:
            _train(setup, workdir, checkpoints, goodput, stop, allow_config_change)
        except BaseException:
            with suppress(Exception):  # which would hide what ended the run
                checkpoints.close()  # when the write in progress is finished
            raise
        checkpoints.close()


def _train(setup, workdir, checkpoints, goodput, stop, allow_config_change):
    config, train_source, eval_source, mesh = setup
    settings = as_dict(config)
    lengths = plan(config, len(train_source))
    schedule = learning_rate(
        config.optimizer, lengths.warmup_steps, lengths.schedule_steps
    )
    optimizer = make_optimizer(config.optimizer)
    network, state = states.init(
        config.model, optimizer, seed=config.seed, use_ema=config.use_ema, mesh=mesh
    )
    num_params = _size(state.weights.params)
    num_trained = _size(trainable(state.weights.params, config.optimizer.frozen))
    state, evaluated = _begin(setup, checkpoints, state, allow_config_change)
    start = int(state.step)
    unevaluated = start > 0 and lengths.is_eval(start) and evaluated is None
    # After the checks: a refused run leaves all as it was.
    log = MetricsLog(
        workdir,
        start_step=start,
        evaluated=evaluated,
        tensorboard=config.tensorboard,
    )
    if start >= lengths.total_steps and not unevaluated:
        say(
            f"nothing to do: {workdir} has reached step {start:,}; eval.py draws "
            "report.png anew"
        )
        return

    workdirs.write_config(workdir, config, num_params)
    lost = goodput.start(start)
    trained = f" ({num_trained:,} trained)" if num_trained < num_params else ""
    say(
        f"{config.model_name}, {num_params:,} parameters{trained}, "
        f"{len(train_source):,} images of {len(train_source.class_names)} classes, "
        f"{mesh.size} {jax.devices()[0].device_kind} device(s), "
        f"{lengths.total_steps:,} steps"
        + (f"; going on after step {start:,}" if start else "")
        + (f"; {lost}" if lost else "")
    )
    goodput.lap("initialisation")
    goodput.write(start)  # a session counts even if it is killed at once
    train_step = compile_train_step(network, config, optimizer, schedule, state, mesh)
    eval_step = compile_eval_step(network, config, state.weights, mesh)
    batches = train_batches(
        config.data,
        train_source,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        **process_share(),
    )
    window = _Window(config, lengths, checkpoints, train_source)
    profiler = _Profiler(config.profile_steps, workdir)

    compiled = False

    def polled_eval_step(weights, batch):
        nonlocal compiled
        if stop.poll():
            raise _Stopped
        if compiled:
            return eval_step(weights, batch)
        goodput.lap("evaluation")
        answers = jax.block_until_ready(eval_step(weights, batch))
        goodput.lap("compilation")
        compiled = True
        return answers

    def save(metrics):
        jax.block_until_ready(state.step)  # what was dispatched is no part of saving
        goodput.lap("steps")
        checkpoints.save(
            state,
            settings,
            metrics,
            class_names=train_source.class_names,
            train_examples=len(train_source),
        )
        goodput.lap("checkpoints")

    step = done = start
    try:
        if unevaluated:
            step -= 1  # of this step only the evaluation is left
        while step < lengths.total_steps:
            step += 1
            if step > start:
                batch = put_batch(next(batches), mesh)
                # While the device is busy with the last step nothing waits for data.
                idle = window.is_idle()
                waited = goodput.lap("data" if idle else "steps") * idle
                profiler.before(step)
                with jax.transfer_guard("disallow"):  # nothing may wait for the device
                    state, metrics = train_step(state, batch)
                done = step
                window.add(step, metrics, waited)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    goodput.lap("compilation")
                    window.restart()
                goodput.lap("steps")
                if profiler.after(step, metrics):
                    goodput.lap("report")
                stopped, due = stop.poll(), step % config.log_every_steps == 0
                if stopped or due or lengths.is_eval(step):
                    log.write(window.close())
                    goodput.lap("steps")
                    goodput.write(step)
                if stopped:
                    raise _Stopped
            if lengths.is_eval(step):
                evaluation, record = _evaluate_state(
                    polled_eval_step, state, config, eval_source, mesh
                )
                record = {
                    "step": step,
                    "epoch": step / lengths.steps_per_epoch,
                } | record
                log.write(record)
                say(_eval_line(record))
                goodput.lap("evaluation")
                save(record)
                window.restart()
            elif (every := config.checkpoint_every_steps) and step % every == 0:
                save(None)
        checkpoints.wait()
        goodput.lap("checkpoints")
        weights = "raw" if state.ema is None else "ema"
        title = f"{config.model_name} after step {step:,}, {weights} weights"
        report = write_report(workdir, config, evaluation, eval_source, title=title)
        goodput.lap("report")
    except _Stopped:
        if checkpoints.latest_step() != step:
            save(None)
        checkpoints.wait()
        goodput.lap("checkpoints")
        raise Preempted(
            f"stopped by a signal after step {step:,}, which is saved: the same "
            "command goes on from there."
        ) from None
    except BadDataError as error:  # files can be repaired
        step = done  # the one before, if it was this batch
        new = step > (checkpoints.latest_step() or 0)
        everywhere = isinstance(error, TooManyUnreadableError)
        if new and (everywhere or jax.process_count() == 1):
            save(None)
            checkpoints.wait()
        raise
    finally:
        batches.close()  # or its workers' shared memory outlives them
        profiler.stop(done)  # if the last step to record did not come
        with suppress(StorageError):  # which would hide what ended the run
            goodput.write(done)
    say(f"{report} shows the run ({goodput.sentence()})")


def _begin(setup, checkpoints, fresh, allow_config_change):
    """The state of the latest checkpoint and its evaluation, if any; else a new run's.

    Raises UserError if it is of other settings and they are not allowed.
    """
    config, source = setup.config, setup.train_source
    settings, names = as_dict(config), source.class_names
    state = checkpoints.restore_latest(fresh, settings["model"])
    if state is None:
        return start_from(config.init_from, fresh, names), None
    step = int(state.step)
    meta = checkpoints.meta(step)
    differing = changes_of_run(meta["config"], settings)
    if other := other_class(meta, names):
        differing.append(other)
    examples, saved = len(source), meta.get("train_examples")
    if saved not in (None, examples):
        differing.append(f"{saved:,} training images there, {examples:,} here")
    text = "; ".join(differing)
    if differing and not allow_config_change:
        raise UserError(
            f"the checkpoint of step {step} was trained with other settings: {text}; "
            "use those, another --workdir, or --allow_config_change to go on anyway."
        )
    if differing:
        say(f"going on after step {step:,} with changed settings: {text}")
    return state, meta["metrics"]


def _size(arrays):
    return sum(array.size for array in arrays.values())


class _Stopped(Exception):  # noqa: N818
    pass


class _Profiler:
    """Records the steps first to last in `profile/` of the work folder."""

    def __init__(self, steps, workdir):
        self._first, self._last = steps or (None, None)
        self._path, self._on = f"{workdir}/profile", False

    def before(self, step):
        """A run that goes on between them records what is left."""
        wanted = self._last is not None and self._first <= step <= self._last
        if wanted and not self._on and jax.process_index() == 0:
            jax.profiler.start_trace(self._path)
            self._first, self._on = step, True

    def after(self, step, metrics):
        """Whether the record was written."""
        if last := step == self._last:
            jax.block_until_ready(metrics)
            self.stop(step)
        return last

    def stop(self, step):
        if not self._on:
            return
        self._on = False
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # no reason to lose a run
            reason = str(error).splitlines()[0]
            say(f"steps {self._first} to {step} are not recorded: {reason}")
        else:
            say(f"steps {self._first} to {step} are recorded in {self._path}")


class _Window:
    """Collects metrics between two log lines without waiting for the device.

    The metrics of a step are read when the next step has been dispatched.
    """

    def __init__(self, config, lengths, checkpoints, source):
        self._config, self._lengths = config, lengths
        self._checkpoints, self._source = checkpoints, source
        self._epoch = self._unreadable_in_epoch = 0
        self._pending, self._step, self._skipped_in_a_row = None, 0, 0
        self.restart()

    def restart(self):
        self._start, self._waited, self.steps = time.perf_counter(), 0.0, 0
        self._losses, self._skipped, self._unreadable = [], 0, 0

    def is_idle(self):
        """Whether the device has done all that was dispatched."""
        return self._pending is None or self._pending["train_loss"].is_ready()

    def add(self, step, metrics, waited):
        pending, self._pending = self._pending, metrics
        if pending is not None:
            self._read(pending, step - 1)
        self._step, self.steps = step, self.steps + 1
        self._waited += waited

    def _read(self, metrics, step):
        metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
        self._count_unreadable(metrics["unreadable"], step)
        if metrics["skipped"]:
            self._skipped += 1
            self._skipped_in_a_row += 1
        else:
            self._losses.append(metrics["train_loss"])
            self._skipped_in_a_row = 0
        if self._skipped_in_a_row > self._config.max_skipped_steps:
            saved = self._checkpoints.latest_step()
            last = f"the last checkpoint is that of step {saved}"
            raise NonFiniteLossError(
                f"loss or gradient was not finite in {self._skipped_in_a_row} steps in "
                f"a row, up to step {step:,} (loss {metrics['train_loss']}, gradient "
                f"norm {metrics['grad_norm']}, learning rate "
                f"{metrics['learning_rate']:.3g}): lower the learning rate or look at "
                f"the data; {last if saved else 'there is no checkpoint yet'}."
            )
        return metrics

    def _count_unreadable(self, count, step):
        """Of all processes, which therefore stop after the same step if they must."""
        self._unreadable += count
        size, batch_size = len(self._source), self._config.batch_size
        epoch = (step * batch_size - 1) // size
        if epoch != self._epoch:
            self._epoch, self._unreadable_in_epoch = epoch, 0
        epochs = epoch - (step - 1) * batch_size // size + 1
        if epochs == 1:  # or an example may have come several times
            self._unreadable_in_epoch += count
        for_sure = max(self._unreadable_in_epoch, count // epochs)
        if error := too_many_unreadable(for_sure, self._source, self._config.data):
            raise error

    def close(self):
        """The record of the window, which is also printed."""
        pending, self._pending = self._pending, None
        metrics = self._read(pending, self._step)
        elapsed = time.perf_counter() - self._start
        # Of the first step, which compiles, none: its time would say nothing.
        rate = self.steps * self._config.batch_size / elapsed or float("nan")
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        record = {
            "step": self._step,
            "epoch": self._step / self._lengths.steps_per_epoch,
            "train_loss": loss,
            "learning_rate": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            "skipped_steps": self._skipped,
            "unreadable": self._unreadable,
            "images_per_s": rate,
            "data_wait": self._waited / elapsed,
        }
        left = (self._lengths.total_steps - self._step) * self._config.batch_size
        left = duration(left / rate) if self.steps else "?"
        speed = f"{rate:,.0f}" if self.steps else "?"
        say(
            f"step {self._step:,}/{self._lengths.total_steps:,}  epoch "
            f"{record['epoch']:.1f}  loss {loss:.4f}  lr "
            f"{record['learning_rate']:.1e}  {speed} images/s  {left} left  "
            f"waiting for data {record['data_wait']:.0%}"
            + (f"  skipped {self._skipped} step(s)" if self._skipped else "")
            + (f"  {self._unreadable} unreadable" if self._unreadable else "")
        )
        self.restart()
        return record


def _evaluate_state(eval_step, state, config, source, mesh):
    """The evaluation that counts (EMA if kept), and the record of all."""
    weights = [state.weights] + [state.ema] * (state.ema is not None)
    found = evaluate_split(eval_step, weights, config, source, mesh)
    raw, main = found[0], found[-1]
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
