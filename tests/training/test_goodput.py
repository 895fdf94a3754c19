"""Laws of the time that a run tells of."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.training import loop
from sparx_jax.training.goodput import ACTIVITIES, Goodput, read_sessions, summary
from tests.training.conftest import tiny_settings


def session(begin, end, lost, **seconds):
    seconds = dict.fromkeys(ACTIVITIES, 0.0) | seconds
    return {
        "from_step": begin,
        "to_step": end,
        "lost_steps": lost,
        "seconds": seconds,
    }


def test_goodput_is_the_share_of_steps_that_were_not_lost():
    """Of 2 s each, then a kill that lost 25 of 100; then of 1 s."""
    sessions = [
        session(0, 100, 0, steps=200.0, compilation=20.0),
        session(75, 155, 25, steps=80.0, checkpoints=20.0, evaluation=5.0),
    ]
    found = summary(sessions)
    assert found["goodput"] == pytest.approx((150 + 80) / 325)
    assert (found["lost_steps"], found["restarts"]) == (25, 1)
    assert found["seconds"]["steps"] == 280


def test_every_second_is_counted_once_and_restarts_are_remembered(tmp_path):
    first, second = Goodput(str(tmp_path)), Goodput(str(tmp_path))  # which waits
    begin = first._last
    assert first.start(0) == ""
    for activity in ("steps", "data", "steps", "checkpoints"):
        first.lap(activity)
    first.write(30)
    assert sum(first.seconds.values()) == pytest.approx(first._last - begin)
    assert second.start(20) == "10 steps were lost with the last session"
    second.write(40)
    kept = [(s["from_step"], s["to_step"]) for s in read_sessions(str(tmp_path))]
    assert kept == [(0, 30), (20, 40)]


@pytest.mark.parametrize(
    "text", ["", '{"goodput": 0.9, "sess', "{}", "[]", '{"sessions": [{"to_step": 3}]}']
)
def test_a_torn_file_is_no_reason_to_lose_a_run(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    goodput = Goodput(str(tmp_path))
    assert goodput.start(4) == ""
    goodput.write(6)
    (found,) = read_sessions(str(tmp_path))
    assert (found["from_step"], found["to_step"]) == (4, 6)


@pytest.mark.slow
def test_compiling_the_evaluation_counts_as_compilation(tmp_path, monkeypatch):
    """Steps that do nothing; the first evaluation takes 3 s."""
    names = "train_loss", "grad_norm", "learning_rate", "skipped", "unreadable"

    def train_step(state, batch):
        metrics = dict.fromkeys(names, batch["weight"].sum() * 0)
        return state._replace(step=state.step + 1), metrics

    rests = iter([3.0])

    def eval_step(weights, batch):
        time.sleep(next(rests, 0))
        sums = dict.fromkeys(
            ("loss", "top1", "top5", "examples"), batch["weight"].sum()
        )
        answers = {"predicted": batch["label"], "probability": batch["weight"]}
        return batch | sums | answers

    monkeypatch.setattr(loop, "compile_train_step", lambda *_: jax.jit(train_step))
    monkeypatch.setattr(loop, "compile_eval_step", lambda *_: eval_step)
    loop.train(tiny_settings(), str(tmp_path))
    (session,) = read_sessions(str(tmp_path))
    assert session["seconds"]["compilation"] > 3


def test_nothing_in_a_step_may_wait_for_the_device(tmp_path, monkeypatch):
    """A step that moves an array without being asked to is an error in the loop."""
    real = loop.compile_train_step

    def careless(*args):
        step = real(*args)

        def run(state, batch):
            jax.jit(jnp.sin)(np.ones(3, np.float32))
            return step(state, batch)

        return run

    monkeypatch.setattr(loop, "compile_train_step", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(tiny_settings(), str(tmp_path))
