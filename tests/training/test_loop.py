"""Laws of whole runs: resuming, checkpoints, evaluation, what stands in the files."""

import contextlib
import dataclasses
import itertools
import json
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.profiler import _profile_state as profiler_state
from tensorboardX.proto.event_pb2 import Event

from sparx_jax import sweep
from sparx_jax.errors import (
    BadDataError,
    NonFiniteLossError,
    Preempted,
    StorageError,
    UserError,
)
from sparx_jax.training import evaluate, loop
from sparx_jax.training.checkpoint import Checkpoints, _Manager
from sparx_jax.training.config import as_dict
from sparx_jax.training.evaluate import (
    evaluate_checkpoint,
    evaluate_split,
    wrong_answers,
)
from sparx_jax.training.goodput import read_sessions
from sparx_jax.training.logging import MetricsLog, read_metrics
from tests.training.conftest import digest, tiny_settings

TIMES = ("images_per_s", "data_wait")


class Killed(Exception):  # noqa: N818
    pass


def killed_after(steps):
    """A source of batches that fails, as a run does when it is killed."""
    real = loop.train_batches

    def batches(*args, **kwargs):
        for count, batch in enumerate(real(*args, **kwargs)):
            if count == steps:
                raise Killed
            yield batch

    return batches


def metrics_of(**values):
    """What a step hands to the window, zeros where nothing is given."""
    names = "train_loss", "learning_rate", "grad_norm", "skipped", "unreadable"
    return {k: jnp.asarray(v) for k, v in (dict.fromkeys(names, 0.0) | values).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 12 steps with evaluations after 4, 8 and 12."""
    workdir = str(tmp_path_factory.mktemp("finished"))
    loop.train(tiny_settings(), workdir)
    return workdir


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, killed after step 6 and again after step 10."""
    workdir = str(tmp_path_factory.mktemp("resumed"))
    with pytest.MonkeyPatch.context() as patch:
        for steps in (6, 6):  # from step 0, then from the checkpoint of step 4
            with patch.context() as inner, pytest.raises(Killed):
                inner.setattr(loop, "train_batches", killed_after(steps))
                loop.train(tiny_settings(), workdir)
    loop.train(tiny_settings(), workdir)
    return workdir


def restored(run, workdir, step="latest"):
    checkpoints = Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(
        checkpoints.find(step), run.init(), as_dict(run.config)["model"]
    )
    checkpoints.close()
    return state


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    run, finished, resumed
):
    one, other = (digest(restored(run, folder)) for folder in (finished, resumed))
    assert one.keys() == other.keys()
    assert [path for path in one if one[path] != other[path]] == []


def test_metrics_hold_every_step_once_and_equal_those_of_an_uninterrupted_run(
    finished, resumed
):
    def records(folder):
        return [
            {k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder)
        ]

    expected, found = records(finished), records(resumed)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert found == expected
    losses = [r for r in expected if "train_loss" in r]
    assert [r["step"] for r in losses] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in expected if "top1" in r] == [4, 8, 12]
    assert {"eval_loss", "top1", "top5", "raw_top1"} <= expected[-1].keys()


def test_the_best_and_the_two_latest_checkpoints_are_kept(finished):
    scores = {r["step"]: r["top1"] for r in read_metrics(finished) if "top1" in r}
    checkpoints = Checkpoints(finished, read_only=True)
    best, latest = checkpoints.find("best"), checkpoints.find("latest")
    assert latest == 12 and scores[best] == max(scores.values())
    kept = {int(p.name) for p in checkpoints.path.iterdir() if p.name.isdigit()}
    assert kept == {best, 8, latest}
    assert checkpoints.meta(best)["metrics"]["top1"] == scores[best]
    with pytest.raises(UserError, match=r"no checkpoint '7' in .* use best, latest or"):
        checkpoints.find("7")


def test_a_finished_run_says_that_there_is_nothing_to_do(finished, capsys):
    """And takes a last evaluation that a power cut has torn from its checkpoint."""
    metrics = Path(finished) / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-9])
    loop.train(tiny_settings(), finished)
    assert "nothing to do" in capsys.readouterr().out
    assert metrics.read_bytes() == whole


def test_evaluation_of_a_checkpoint_equals_what_training_measured(finished, capsys):
    record = read_metrics(finished)[-1]
    for weights, prefix in (("ema", ""), ("raw", "raw_")):
        result = evaluate_checkpoint(
            tiny_settings(), finished, step="latest", weights=weights
        )
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        assert result["step"] == 12 and result["examples"] == 360
        assert result["top1"] == record[f"{prefix}top1"]
        assert result["loss"] == pytest.approx(record[f"{prefix}eval_loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [360, 7])
def test_every_example_counts_once_whatever_the_batch_size(run, batch_size):
    """Against a count by hand; 7 does not divide 360."""
    setup, weights = run.setup, run.init().weights
    config = setup.config.__class__(
        **vars(setup.config) | {"eval_batch_size": batch_size}
    )
    answers, labels = [], []

    def eval_step(weights, batch):  # predicts the brightness of the picture
        guess = batch["image"].astype(np.float32).mean((1, 2, 3)).astype(int) % 10
        right = (guess == batch["label"]) * batch["weight"]
        answers.extend(guess[batch["weight"] > 0])
        labels.extend(np.asarray(batch["label"])[batch["weight"] > 0])
        return {
            "loss": right.sum(), "top1": right.sum(), "top5": right.sum(),
            "examples": batch["weight"].sum(), "index": batch["index"],
            "label": batch["label"], "predicted": guess, "probability": guess / 10,
        }  # fmt: skip

    (result,) = evaluate_split(
        eval_step, [weights], config, setup.eval_source, setup.mesh
    )
    source = setup.eval_source
    truth = [source[i]["label"] for i in range(len(source))]
    assert result.examples == len(answers) == len(source) == 360
    np.testing.assert_array_equal(result.label, truth)
    np.testing.assert_array_equal(result.predicted, answers)
    assert result.top1 == pytest.approx(100 * np.mean(np.equal(answers, truth)))


class Damaged:
    """A source some of whose examples cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad, self.class_names = source, bad, source.class_names
        self.name = source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {"image": b"", "label": 0} if index in self.bad else self.source[index]


def test_evaluation_leaves_out_what_cannot_be_read_and_says_so(run, capsys):
    setup, weights = run.setup, run.init().weights
    (whole,), (part,) = (
        evaluate_split(run.eval_step, [weights], setup.config, source, setup.mesh)
        for source in (setup.eval_source, Damaged(setup.eval_source, {7, 100, 359}))
    )
    assert "left out: 3 of 360 examples" in capsys.readouterr().out
    assert (part.examples, part.unreadable, whole.unreadable) == (357, 3, 0)
    read = part.label >= 0
    assert np.flatnonzero(~read).tolist() == [7, 100, 359]
    right = (whole.predicted == whole.label)[read]
    assert part.top1 == pytest.approx(100 * right.mean())
    data = setup.config.data
    names = {wrong.name for wrong in wrong_answers(part, setup.eval_source, data, 360)}
    assert len(names) == np.sum(~right) and "digits test #7" not in names


def test_too_many_unreadable_of_all_processes_end_an_evaluation(run, monkeypatch):
    """Each process counts its own, against the whole split."""
    answers = {name: np.zeros(8, np.float32) for name in ("predicted", "probability")}
    counts = dict.fromkeys(("loss", "top1", "top5"), 0.0) | {"examples": 4.0}
    answers |= counts | {"index": np.arange(8), "label": np.repeat([-1, 0], 4)}
    monkeypatch.setattr(evaluate, "eval_batches", lambda *_, **__: [{}])

    def evaluated(limit):
        data = dataclasses.replace(run.config.data, max_bad_fraction=limit)
        config = dataclasses.replace(run.config, data=data)
        mesh = run.setup.mesh
        return evaluate_split(lambda *_: answers, [None], config, range(8), mesh)

    assert evaluated(0.5)[0].unreadable == 4
    with pytest.raises(BadDataError, match="4 of 8 examples cannot be read"):
        evaluated(0.4)


def test_too_many_unreadable_in_an_epoch_end_training(run):
    """Each picture comes once an epoch, and an epoch may end within a batch."""
    data = dataclasses.replace(run.config.data, max_bad_fraction=0.25)
    config = dataclasses.replace(run.config, data=data, batch_size=4)

    def steps(*unreadable):
        window = loop._Window(config, None, None, range(10))
        for step, count in enumerate(unreadable, start=1):
            window._read(metrics_of(unreadable=count), step)

    steps(1, 1, 2, 1, 1, 1, 1, 2)  # the third and last have examples of two epochs
    with pytest.raises(BadDataError, match="3 of 10 examples cannot be read"):
        steps(1, 1, 2, 1, 2)
    config = dataclasses.replace(config, batch_size=16)  # each a part of two epochs
    steps(5, 5)
    with pytest.raises(BadDataError, match="3 of 10 examples cannot be read"):
        steps(6)


def test_the_step_that_compiles_tells_no_speed(run, capsys):
    window = loop._Window(run.config, loop.plan(run.config, 360), None, range(360))
    window.add(1, metrics_of(), 0.0)
    window.restart()
    assert np.isnan(window.close()["images_per_s"])
    assert "? left" in capsys.readouterr().out


@pytest.mark.slow
def test_images_that_are_prepared_otherwise_are_told(finished, capsys):
    evaluate_checkpoint(tiny_settings(**{"data.mean": (0.5, 0.4, 0.4)}), finished)
    first = capsys.readouterr().out.splitlines()[0]
    there = "[0.485, 0.456, 0.406] there, [0.5, 0.4, 0.4] here"
    assert first == f"images are prepared otherwise than in training: data.mean={there}"
    evaluate_checkpoint(tiny_settings(), finished)
    assert "otherwise" not in capsys.readouterr().out


def test_results_are_printed_before_anything_is_written(finished, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluate, "write_results", refuse)
    with pytest.raises(StorageError, match=r"cannot be written .*Permission denied"):
        evaluate_checkpoint(tiny_settings(), finished)
    assert "top1" in json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_a_step_that_training_replaces_meanwhile_is_looked_for_again(
    finished, monkeypatch
):
    found = iter(["12", "999", "latest"])  # 999 is gone when it is read
    find = Checkpoints.find
    monkeypatch.setattr(
        Checkpoints,
        "find",
        lambda self, which: 999 if (n := next(found)) == "999" else find(self, n),
    )
    assert evaluate_checkpoint(tiny_settings(), finished, step="latest")["step"] == 12


@pytest.mark.slow
def test_what_was_trained_is_saved_when_the_test_images_cannot_be_read(
    tmp_path, monkeypatch, capsys
):
    def evaluate_split(*_):
        raise BadDataError("3 of 80 examples cannot be read")

    settings = tiny_settings(eval_every_epochs=0.13)
    with monkeypatch.context() as patch, pytest.raises(BadDataError):
        patch.setattr(loop, "evaluate_split", evaluate_split)
        loop.train(settings, str(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")] == ["12"]
    assert "top1" not in read_metrics(str(tmp_path))[-1]
    loop.train(settings, str(tmp_path))  # mended: only the evaluation is left
    assert "going on after step 12" in capsys.readouterr().out
    assert "top1" in read_metrics(str(tmp_path))[-1]


@pytest.mark.slow
def test_a_step_without_a_batch_is_no_step(tmp_path, monkeypatch):
    train_batches = loop.train_batches

    def two_batches(*args, **kwargs):
        with contextlib.closing(train_batches(*args, **kwargs)) as batches:
            yield from itertools.islice(batches, 2)
        raise BadDataError("3 of 10 examples cannot be read")

    monkeypatch.setattr(loop, "train_batches", two_batches)
    with pytest.raises(BadDataError):
        loop.train(tiny_settings(), str(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")] == ["2"]
    (session,) = read_sessions(str(tmp_path))
    assert session["to_step"] == 2


@pytest.mark.parametrize(
    "saved, told", [(40, "is that of step 40"), (None, "there is no checkpoint yet")]
)
def test_a_run_that_diverges_tells_what_is_saved(run, saved, told):
    checkpoints = types.SimpleNamespace(latest_step=lambda: saved)
    config = dataclasses.replace(run.config, max_skipped_steps=0)
    window = loop._Window(config, None, checkpoints, range(10))
    with pytest.raises(NonFiniteLossError, match=told):
        window._read(metrics_of(skipped=True), 1)


@pytest.mark.slow
def test_another_number_of_training_images_is_told(tmp_path, run):
    checkpoints = Checkpoints(str(tmp_path))
    settings = as_dict(run.setup.config)
    checkpoints.save(
        run.init()._replace(step=jnp.int32(4)), settings, None, train_examples=80
    )
    checkpoints.close()
    with pytest.raises(UserError, match="80 training images there, 1,437 here; use"):
        loop.train(tiny_settings(), str(tmp_path))


def test_a_profile_is_kept_if_the_run_ends_before_its_last_step(tmp_path, capsys):
    profiler = loop._Profiler((1, 9), str(tmp_path))
    profiler.before(1)
    profiler.after(1, jnp.ones(()))
    profiler.stop(1)
    assert "steps 1 to 1 are recorded" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("first", [None, NonFiniteLossError("loss")])
def test_a_save_that_fails_at_the_end_hides_no_earlier_error(
    first, tmp_path, monkeypatch
):
    class Manager(_Manager):
        def close(self):
            super().close()
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    def train(*_):
        if first:
            raise first

    monkeypatch.setattr("sparx_jax.training.checkpoint._Manager", Manager)
    monkeypatch.setattr(loop, "_train", train)
    with pytest.raises(type(first) if first else StorageError):
        loop.train(tiny_settings(), str(tmp_path))


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "profile").touch()
    profiler = loop._Profiler((1, 2), str(tmp_path))
    profiler.before(1)
    profiler.stop(1)
    assert "steps 1 to 1 are not recorded: " in capsys.readouterr().out
    profiler.stop(1)
    assert capsys.readouterr().out == ""
    profiler_state.reset()  # for other tests; a run has one profile


def test_a_run_that_goes_on_records_what_is_left_of_a_profile(tmp_path, capsys):
    profiler = loop._Profiler((1, 3), str(tmp_path))
    profiler.before(2)
    assert not profiler.after(2, jnp.ones(()))
    profiler.before(3)
    assert profiler.after(3, jnp.ones(()))
    profiler.before(4)
    assert "steps 2 to 3 are recorded" in capsys.readouterr().out


def test_tensorboard_holds_the_metrics_that_a_run_goes_on_from(tmp_path):
    """Though the process was killed before tensorboardX had written the last one."""
    records = [{"step": step, "top1": float(step), "loss": None} for step in (2, 4, 6)]
    log = MetricsLog(str(tmp_path), start_step=0)
    for record in records:
        log.write(record)
    log = MetricsLog(
        str(tmp_path), start_step=4, evaluated=records[1], tensorboard=True
    )
    log.write({"step": 5, "top1": 5.0})
    log._board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        end = 12 + int.from_bytes(content[:8], "little")
        event, content = Event.FromString(content[12:end]), content[end + 4 :]
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert found == [(step, "top1", step) for step in (2, 4, 5)]


def test_an_evaluation_that_is_repeated_stands_in_the_metrics_once(tmp_path):
    log = MetricsLog(str(tmp_path), start_step=0)
    for record in ({"step": 4, "train_loss": 1.0}, {"step": 4, "top1": 9.0}):
        log.write(record)
    MetricsLog(str(tmp_path), start_step=4, evaluated={"step": 4, "top1": 9.0})
    assert len(read_metrics(str(tmp_path))) == 2
    MetricsLog(str(tmp_path), start_step=4)
    assert read_metrics(str(tmp_path)) == [{"step": 4, "train_loss": 1.0}]


def test_damaged_lines_of_the_metrics_cost_no_others(tmp_path):
    damaged = b'{"st\xe5p": 2}', b'{"step": 3', b"7", b'{"step": null}'
    lines = b'{"step": 1}', *damaged, b'{"step": 4}', b'{"ste'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [record["step"] for record in read_metrics(str(tmp_path))] == [1, 4]


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(finished):
    other = tiny_settings(**{"model.dims": (8, 8, 12, 20)})
    message = r"another model: dims=\[8, 8, 12, 16\] there, \[8, 8, 12, 20\] here"
    with pytest.raises(UserError, match=message):
        evaluate_checkpoint(other, finished)
    with pytest.raises(UserError, match=message):
        loop.train(other, finished)


def test_a_run_without_average_is_evaluated_raw(finished, tmp_path, run):
    checkpoints = Checkpoints(str(tmp_path))
    state = run.init()._replace(ema=None)
    checkpoints.save(state, as_dict(run.config), {"top1": 1.0})
    checkpoints.wait()
    model = as_dict(run.config)["model"]
    assert checkpoints.restore_weights(0, "auto", state.weights, model)[0] == "raw"
    with pytest.raises(UserError, match="without a moving average"):
        checkpoints.restore_weights(0, "ema", state.weights, model)
    checkpoints.close()


def test_the_report_is_a_picture(finished):
    from PIL import Image

    with Image.open(f"{finished}/report.png") as picture:
        assert min(picture.size) > 500


def test_a_sweep_knows_a_finished_run_from_its_files(finished, run):
    point = sweep.Point({}, Path(finished), [], tiny_settings())
    last = read_metrics(finished)[-1]
    found = sweep.result(point)
    assert (found.top1, found.raw_top1) == (last["top1"], last["raw_top1"])
    params = run.init().weights.params.values()
    assert found.parameters == sum(array.size for array in params)
    longer = tiny_settings(train_epochs=0.2)
    with pytest.raises(UserError, match=r"train_epochs=0\.13 there, 0\.2 here"):
        sweep.result(point._replace(settings=longer))


def test_the_seed_decides_the_order_of_the_images(tmp_path, monkeypatch):
    def train_batches(*_, seed, **__):
        raise Killed(seed)

    monkeypatch.setattr(loop, "train_batches", train_batches)
    with pytest.raises(Killed, match="3"):
        loop.train(tiny_settings(seed=3), str(tmp_path))


def test_the_rate_is_at_its_end_when_the_cooldown_begins(run, tmp_path, monkeypatch):
    def learning_rate(config, warmup_steps, total_steps):
        raise Killed(f"{warmup_steps} {total_steps}")

    monkeypatch.setattr(loop, "learning_rate", learning_rate)
    with pytest.raises(Killed, match=r"^2 12$"):
        loop.train(tiny_settings(cooldown_epochs=0.1), str(tmp_path))


def test_epochs_are_counted_in_images_and_the_warm_up_ends_before_the_last(run):
    long = dataclasses.replace(run.config, train_epochs=300.0)
    lengths = loop.plan(long, 1437)  # 89.8 steps an epoch
    assert lengths.total_steps == 26944
    assert lengths.steps_per_epoch == pytest.approx(1437 / 16)
    short = dataclasses.replace(run.config, train_epochs=0.021)
    lengths = loop.plan(short, 1437)
    assert (lengths.warmup_steps, lengths.schedule_steps) == (1, 2)


def test_no_evaluation_is_due_shortly_before_the_last():
    lengths = loop.Plan(14, 0, 14, 4, 4.0)
    assert [step for step in range(1, 15) if lengths.is_eval(step)] == [4, 8, 12, 14]
    lengths = loop.Plan(13, 0, 13, 4, 4.0)
    assert [step for step in range(1, 14) if lengths.is_eval(step)] == [4, 8, 13]


def test_only_skipped_steps_in_a_row_end_a_run(run):
    checkpoints = types.SimpleNamespace(latest_step=lambda: None)
    config = dataclasses.replace(run.config, max_skipped_steps=1)
    window = loop._Window(config, None, checkpoints, range(10))

    def read(*skipped):
        for step, value in enumerate(skipped, start=1):
            window._read(metrics_of(skipped=value), step)

    read(True, False, True, False, True)
    with pytest.raises(NonFiniteLossError, match="in 2 steps in a row"):
        read(False, True, True)


def test_unreadable_images_count_for_the_epoch_of_their_own_step(run):
    """Although the metrics of a step are read one step later."""
    data = dataclasses.replace(run.config.data, max_bad_fraction=0.25)
    config = dataclasses.replace(run.config, data=data, batch_size=4)
    window = loop._Window(config, None, None, range(8))
    for step, count in enumerate((0, 2, 1, 0, 0), start=1):  # two steps an epoch
        window.add(step, metrics_of(unreadable=count), 0.0)


def test_sessions_begin_at_the_step_they_go_on_from(resumed):
    sessions = read_sessions(resumed)
    assert [s["from_step"] for s in sessions] == [0, 4, 8]
    assert [s["lost_steps"] for s in sessions] == [0, 2, 2]


def stopped_after(polls):
    """A request to stop that is seen after so many times that it was not."""
    answers = iter([False] * polls)

    @contextlib.contextmanager
    def stop_request():
        yield types.SimpleNamespace(poll=lambda: next(answers, True))

    return stop_request


@pytest.mark.slow
def test_a_stopped_run_logs_the_steps_since_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stop_request", stopped_after(1))
    with pytest.raises(Preempted, match="after step 2"):
        loop.train(tiny_settings(log_every_steps=50), str(tmp_path))
    (record,) = read_metrics(str(tmp_path))
    assert record["step"] == 2 and record["train_loss"] > 0


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_evaluation_repeats_none(
    tmp_path, monkeypatch
):
    settings = tiny_settings(train_epochs=0.03)  # 3 steps
    workdir = str(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 3"):
        patch.setattr(loop, "stop_request", stopped_after(2))
        loop.train(settings, workdir)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # killed before the save
        file.write('{"step": 3, "top1": 1.0}\n')
    loop.train(settings, workdir)
    assert sum("top1" in record for record in read_metrics(workdir)) == 1


@pytest.mark.slow
def test_bad_data_after_an_evaluation_cost_no_checkpoint_its_metrics(
    tmp_path, monkeypatch
):
    train_batches = loop.train_batches

    def four_batches(*args, **kwargs):
        with contextlib.closing(train_batches(*args, **kwargs)) as batches:
            for _ in range(4):
                yield next(batches)
        raise BadDataError("3 of 10 examples cannot be read")

    monkeypatch.setattr(loop, "train_batches", four_batches)
    with pytest.raises(BadDataError):
        loop.train(tiny_settings(), str(tmp_path))
    with contextlib.closing(Checkpoints(str(tmp_path), read_only=True)) as checkpoints:
        assert "top1" in checkpoints.meta(4)["metrics"]


def test_a_run_tells_its_classes_to_what_it_starts_from(tmp_path, monkeypatch):
    """Or a head of as many other classes would be taken."""

    def start_from(source, state, class_names=()):
        raise Killed(f"{source} {class_names}")

    monkeypatch.setattr(loop, "start_from", start_from)
    with pytest.raises(Killed, match=r"x\.pth \('0', '1'"):
        loop.train(tiny_settings(init_from="x.pth"), str(tmp_path))


def test_a_line_tells_the_mean_of_its_steps_and_counts_what_was_left_out(run):
    window = loop._Window(run.config, loop.plan(run.config, 1437), None, range(1437))
    for step, (loss, skipped, unreadable) in enumerate(
        ((1.0, False, 0), (9.0, True, 0), (3.0, False, 2), (5.0, False, 1)), start=1
    ):
        told = metrics_of(train_loss=loss, skipped=skipped, unreadable=unreadable)
        window.add(step, told, 0.0)
    record = window.close()
    assert (record["step"], record["train_loss"]) == (4, 3.0)
    assert (record["skipped_steps"], record["unreadable"]) == (1, 3)
