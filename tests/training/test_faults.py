"""Nothing is lost: real processes are killed, stopped, starved, and start again."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparx_jax.training.logging import read_metrics
from tests.training.jobs import CONFIG, ROOT, Job, arrays, free_port, same_bits

BLIND = "--config=tests/training/blind_config.py"
SAVE_OFTEN = "--config.checkpoint_every_steps=1"


def completed(workdir, *flags, **options):
    job = Job(workdir, *flags, **options)
    assert set(job.wait()) == {0}, job.log()
    return job


def steps_on_disk(workdir):
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run of one process, with a profile of two steps."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    completed(workdir, SAVE_OFTEN, "--config.profile_steps=(3,4)")
    return workdir


@pytest.fixture(scope="module")
def straight_two(tmp_path_factory):
    """The uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("straight") / "two"
    completed(workdir, processes=2)
    return workdir


@pytest.mark.slow
def test_kill_at_random_moments_changes_no_bit(straight, tmp_path):
    """Saves follow each other, so most moments are within one."""
    rng, workdir, torn = random.Random(0), tmp_path / "run", 0
    for _ in range(6):
        job = Job(workdir, SAVE_OFTEN)
        job.wait_for("steps")  # the first line; reading the checkpoint is done by then
        time.sleep(rng.uniform(0, 5))
        job.kill()
        torn += any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        if 12 in steps_on_disk(workdir):
            break
    job = completed(workdir, SAVE_OFTEN)
    assert same_bits(arrays(straight), arrays(workdir)) == []
    assert not any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    found = [r["step"] for r in read_metrics(workdir) if "train_loss" in r]
    assert found == [2, 4, 6, 8, 10, 12]
    goodput = json.loads((workdir / "goodput.json").read_text())
    assert goodput["restarts"] >= 1 and 0 < goodput["goodput"] < 1
    print(f"{goodput['restarts']} kills, {torn} during a save, none lost")


@pytest.mark.slow
def test_two_processes_equal_one(straight, straight_two, tmp_path):
    one, two = arrays(straight), arrays(straight_two)
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-5, err_msg=name)
    last, last_two = (read_metrics(w)[-1] for w in (straight, straight_two))
    for name in ("top1", "raw_top1"):
        assert last[name] == last_two[name]
    assert last["eval_loss"] == pytest.approx(last_two["eval_loss"], abs=1e-5)
    # Two processes evaluate what one trained.
    job = completed(straight, "--step=latest", program="eval", processes=2)
    result = json.loads(job.log().splitlines()[-1])
    assert (result["top1"], result["examples"]) == (last["top1"], 360)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_the_same_step_on_both(straight_two, tmp_path):
    """While compiling, training, saving and evaluating; each start resumes."""
    workdir, stopped = tmp_path / "run", []
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    moments = [
        (["12 steps"], cold, 1),  # compiles
        (["step 2/12", "step 4/12"], {}, 0),  # trains
        (["evaluation after step 4"], {}, 1),  # saves
        (["step 8/12", "going on after step 8"], {}, 0),  # evaluates
    ]
    for texts, env, index in moments:
        job = Job(workdir, processes=2, env=env)
        job.wait_for(*texts)
        job.processes[index].terminate()
        assert job.wait() == [17, 17], job.log()
        tellings = [
            line.split("after step ")[1].split(",")[0]
            for line in (job.log() + job.log(1)).splitlines()
            if line.startswith("stopped by a signal")
        ]
        assert len(tellings) == 2 and len(set(tellings)) == 1
        assert steps_on_disk(workdir)[-1] == int(tellings[0])
        stopped.append(int(tellings[0]))
    assert stopped == sorted(stopped) and stopped[0] in (1, 2), stopped
    assert stopped[3] == 8, "it was to be stopped in the evaluation after step 8"
    completed(workdir, processes=2)
    assert same_bits(arrays(straight_two), arrays(workdir)) == []
    evaluated = [r["step"] for r in read_metrics(workdir) if "top1" in r]
    assert evaluated == [4, 8, 12]


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_devices(straight, tmp_path):
    """Two processes, then one with four devices and split weights, then one."""
    workdir = tmp_path / "run"
    for text, options in (
        ("step 2/12", dict(processes=2)),
        ("step 8/12", dict(devices=4)),
    ):
        flags = ["--config.mesh.fsdp=2"] if options.get("devices") else []
        job = Job(workdir, *flags, **options)
        job.wait_for(text)
        job.processes[-1].terminate()
        assert set(job.wait()) == {17}, job.log()
    completed(workdir)
    expected, found = arrays(straight), arrays(workdir)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_damage_that_one_of_two_processes_meets_is_everybodys(straight_two, tmp_path):
    workdir = shutil.copytree(straight_two, tmp_path / "run")
    job = completed(workdir, processes=2, config=BLIND)
    assert "process 1 of this job failed: see its log. Looking for" in job.log()
    assert "12 in" in job.log(1) and "a block of its disk is bad" in job.log(1)
    assert "going on after step 8" in job.log()
    assert same_bits(arrays(straight_two), arrays(workdir)) == []


@pytest.mark.slow
def test_too_many_unreadable_images_end_all_processes_with_the_same_code(tmp_path):
    """Of all bad pictures neither process sees as many as are too many; both save."""
    folder = tmp_path / "data"
    for split, count in (("train", 240), ("test", 24)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(count // 2):
                picture = folder / split / name / f"{i:03}.png"
                Image.new("RGB", (40, 40)).save(picture)
    for picture in sorted((folder / "train/a").iterdir())[:60]:
        os.truncate(picture, 60)
    flags = ["data.name=folder", f"data.root={folder}", "data.max_bad_fraction=0.1"]
    flags = [f"--config.{x}" for x in (*flags, "batch_size=24", "train_epochs=3")]
    job = Job(tmp_path / "run", *flags, processes=2)
    assert job.wait() == [65, 65], job.log() + job.log(1)
    for log in job.log(), job.log(1):
        assert re.search(r"error: \d+ of 240 examples cannot be read", log)
    bad = [set(re.findall(r"a/\d+\.png", log)) for log in (job.log(), job.log(1))]
    assert max(map(len, bad)) <= 24 < len(bad[0] | bad[1])
    steps = sorted(int(step.name) for step in (tmp_path / "run/checkpoints").iterdir())
    assert steps == [3, 4]  # a save was due after 3 only


@pytest.mark.slow
def test_a_coordinator_that_dies_ends_the_job(tmp_path):
    job = Job(tmp_path / "run", "--heartbeat_timeout_s=10", processes=2)
    job.wait_for("step 4/12")
    died = time.monotonic()
    job.processes[0].kill()
    assert job.wait()[1] in (134, -6), job.log(1)
    assert time.monotonic() - died < 25


@pytest.mark.slow
def test_the_launcher_starts_all_again_when_a_process_dies(straight_two, tmp_path):
    """By launch/local.sh, as on a pod; the bits are those of a run without fault."""
    workdir, log = tmp_path / "run", tmp_path / "logs/process-0.log"
    words = ["2", "--restarts=2", f"--logs={log.parent}", "--", "train.py", CONFIG]
    environment = {**os.environ, "PYTHON": sys.executable}
    launcher = subprocess.Popen(
        [ROOT / "launch/local.sh", *words, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 240
        while not log.exists() or "step 4/12" not in log.read_text():
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(process_of(str(workdir), index=1), signal.SIGKILL)
        assert launcher.wait(240) == 0, log.read_text()
    finally:
        launcher.terminate()
        launcher.wait()
    assert log.read_text().count("12 steps") == 2  # it has started twice
    assert same_bits(arrays(straight_two), arrays(workdir)) == []


def process_of(workdir, index):
    """The process id of the trainer with that index in its job."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text()
            env = (folder / "environ").read_text()
        except OSError:
            continue
        if f"--workdir={workdir}" in words and f"JAX_PROCESS_ID={index}\0" in env:
            return int(folder.name)
    raise AssertionError(f"no process {index} of {workdir}")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_peer_that_never_starts_is_told(tmp_path, index):
    env = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    if index == 0:
        env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    job = Job(tmp_path / "run", "--start_timeout_s=3", env=env)
    assert job.wait(60) == [134]
    assert "error: the 2 processes of this job did not all meet" in job.log()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_spares_what_was_saved(straight, tmp_path):
    """A limit on the size of files: the disk of a test cannot be filled everywhere."""
    workdir = tmp_path / "run"
    job = Job(workdir)
    job.wait_for("evaluation after step 4")
    job.processes[0].terminate()
    assert job.wait() == [17], job.log()
    before = {step: arrays(workdir, step) for step in steps_on_disk(workdir)}

    job = Job(workdir, SAVE_OFTEN, stdout=subprocess.PIPE)
    process = job.processes[0]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    told = process.communicate(timeout=240)[0].decode()
    assert job.wait() == [74], told
    assert "error: " in told and "are intact" in told and "Traceback" not in told
    for step, saved in before.items():
        assert same_bits(saved, arrays(workdir, step)) == []
    completed(workdir)
    assert same_bits(arrays(straight), arrays(workdir)) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optimizer.lr=1e30", "--config.optimizer.warmup_lr=1e30"]
    job = Job(workdir, SAVE_OFTEN, "--config.max_skipped_steps=3", *flags)
    assert job.wait() == [70], job.log()
    assert "not finite in 4 steps in a row" in job.log()
    assert re.search(r"learning rate [\d.]+e\+(29|30)\).* checkpoint is", job.log())
    for step in steps_on_disk(workdir):
        bad = [n for n, a in arrays(workdir, step).items() if not np.isfinite(a).all()]
        assert bad == []


@pytest.mark.slow
def test_the_profiler_records_the_steps_it_was_asked_for(straight):
    assert list((straight / "profile").rglob("*.xplane.pb"))
