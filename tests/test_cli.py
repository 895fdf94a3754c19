"""Bad input ends with one sentence that names the value and the remedy."""

import importlib
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DIGITS = "--config=configs/digits.py"

# (program, flags, what the sentence says); DATA is a folder with an empty class.
BAD_INPUT = {
    "unknown model": ("train", "--config.model.name=sparx_mamba_x", "unknown model"),
    "unknown key": ("train", "--config.model.drop_pth=0.3", "drop_path_rate"),
    "unknown flag": ("train", "--confg.seed=3", "Unknown command line flag"),
    "wrong type": ("train", "--config.batch_size=abc", "batch_size=abc"),
    "space for equals": ("train", "--config.use_ema False", "unexpected argument"),
    "bad tuple": ("train", "--config.model.depths=(2,2,x,2)", "not a tuple of numbers"),
    "short tuple": ("train", "--config.model.depths=(2,2)", "depths=(2, 2)"),
    "bad choice": ("train", "--config.model.connector.mode=dense", "connector.mode"),
    "bad value": ("train", "--config.label_smoothing=1.5", "label_smoothing=1.5"),
    "tiny pictures": ("train", "--config.data.image_size=8", "image_size=8"),
    "batch and devices": ("train", "--config.mesh.data=3", "does not fit 1 device"),
    "batch and parts": ("train", "--config.accumulation_steps=7", "7 accumulation"),
    "no data folder": (
        "train",
        "--config.data.name=folder --config.data.root=/nowhere",
        "'/nowhere', which is not a folder",
    ),
    "empty class": (
        "train",
        "--config.data.name=folder --config.data.root=DATA",
        "holds no image",
    ),
    "too few classes": ("train", "--config.model.num_classes=4", "at least 10"),
    "workdir at a URL": ("train", "--workdir=gs://bucket/run", "is a URL"),
    "brackets in the workdir": ("train", "--workdir=/tmp/[x]/run", "[x]/run"),
    "empty workdir": ("train", "--workdir=", "--workdir= is empty"),
    "argument for a config that takes none": (
        "train",
        "--config=configs/digits.py:t",
        "error: get_config() of the config file takes no argument: leave out",
    ),
    "config file with an error": ("train", "--config=DATA/config.py", "SyntaxError"),
    "config file with a typo": (
        "train",
        "--config=DATA/typo.py",
        'Did you mean "optimizer" instead of "optimiser"?\' (',
    ),
    "config file of nothing": ("train", "--config=DATA/nothing.py", "must return"),
    "a whole group": ("train", "--config.optimizer={'lr':1.}", "set its parts"),
    "part of a tuple": ("train", "--config.data.mean[1]=0.1", "config.data.mean[1]"),
    "given twice with spaces": (
        "train",
        "--config.seed 1 --config.seed 2 --config.use_ema=x",
        "use_ema=x",
    ),
    "a tuple given twice": (
        "train",
        "--config.model.dims=(8,8,8,8) --config.model.dims=(16,8,8)",
        "model.dims=(16, 8, 8)",
    ),
    "negative seed": ("train", "--config.seed=-1", "seed=-1"),
    "endless": ("train", "--config.eval_every_epochs=inf", "eval_every_epochs=inf"),
    "mean of 255": ("train", "--config.data.mean=(123.,116.,103.)", "data.mean=(123"),
    "rate below its end": ("train", "--config.optimizer.lr=1e-6", "at most optimizer"),
    "no checkpoints": ("eval", "", "holds no checkpoints"),
    "no sets": ("eval", "--datasets=", "--datasets= names no set"),
    "missing workdir": ("eval", None, "--workdir is missing"),
}


def start(program, *flags, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, f"{ROOT}/{program}.py", *flags],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit code and stderr of all bad commands."""
    data = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (data / split / name).mkdir(parents=True)
            if name == "cat":
                Image.new("RGB", (40, 40)).save(data / split / name / "0.png")

    (data / "config.py").write_text("def get_config(:\n")
    (data / "nothing.py").write_text("def get_config():\n    pass\n")
    (data / "typo.py").write_text(
        "from sparx_jax.training.config import default_config\n"
        "def get_config():\n    default_config().optimiser = 3\n"
    )

    def command(program, flags, _):
        work = tmp_path_factory.mktemp("work")
        words = [] if flags is None else [f"--workdir={work}/run", *flags.split()]
        words = [word.replace("DATA", str(data)) for word in words]
        return f"{program}.py", [DIGITS, *words]

    found = subprocess.run(
        [sys.executable, "-m", "tests.forked"],
        input=json.dumps([command(*case) for case in BAD_INPUT.values()]),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return dict(zip(BAD_INPUT, json.loads(found.stdout), strict=True))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_sentence(outcomes, case):
    (code, stderr), expected = outcomes[case], BAD_INPUT[case][2]
    assert code == 78, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], stderr
    assert "Traceback" not in stderr


def test_training_never_imports_tensorflow():
    code = (
        "import sys, sparx_jax.training.loop, sparx_jax.training.cli, sparx_jax.plots;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_too_many_bad_images_end_training_with_65_and_five_names(tmp_path):
    for split, name, count in (("train", "a", 9), ("train", "b", 9), ("test", "a", 1)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
            if i % 3:
                os.truncate(folder / f"{i}.png", 60)
    words = "batch_size=16 data.name=folder data.workers=1 data.max_bad_fraction=0.3"
    result = start(
        "train",
        DIGITS,
        f"--workdir={tmp_path}/run",
        f"--config.data.root={tmp_path}/data",
        *(f"--config.{word}" for word in words.split()),
    )  # which also waits for the worker, as it shares the pipe
    assert result.returncode == 65, result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert line.count(".png (") == 5 and "of 18 examples cannot be read" in line


@pytest.mark.slow
def test_a_folder_of_images_trains_and_evaluates(tmp_path):
    """Two colours, in files, from the two commands of the README."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 9)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-30, 30, (40, 48, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    flags = [
        DIGITS,
        f"--workdir={tmp_path}/run",
        "--config.data.name=folder",
        f"--config.data.root={tmp_path}/data",
        "--config.batch_size=8",
        "--config.eval_batch_size=8",
        "--config.train_epochs=5",
        "--config.optimizer.warmup_epochs=1",
        "--config.use_ema=False",
        "--config.model.depths=(1,1,1,1)",
        "--config.model.dims=(8,8,12,16)",
    ]
    trained = start("train", *flags)
    assert trained.returncode == 0, trained.stderr
    evaluated = start("eval", *flags)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["examples"] == 18 and result["top1"] == 100.0
    assert result["weights"] == "raw"


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(tmp_path):
    trained = start("train", DIGITS, f"--workdir={tmp_path}/digits", XLA_FLAGS="")
    assert trained.returncode == 0, trained.stderr
    evaluated = start("eval", DIGITS, f"--workdir={tmp_path}/digits", XLA_FLAGS="")
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["examples"] == 360 and result["top1"] >= 97.5
    assert (tmp_path / "digits/report.png").stat().st_size > 10_000


@pytest.mark.parametrize("program", ["train", "eval"])
def test_ctrl_c_while_importing_is_no_traceback(program, tmp_path):
    (tmp_path / "absl.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    command = [sys.executable, f"{ROOT}/{program}.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # Ignored in a shell's background, it would be so there too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = subprocess.run(command, env=environment, capture_output=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("program", ["train", "eval"])
def test_programs_hand_on_what_their_flags_say(program, monkeypatch):
    module, given = importlib.import_module(program), {}
    called = {"train": "train", "eval": "evaluate_checkpoint"}[program]
    monkeypatch.setattr(module, called, lambda *_, **options: given.update(options))
    said = {
        "train": {"ALLOW": True},
        "eval": {
            "STEP": "7",
            "WEIGHTS": "raw",
            "DATASETS": ["a"],
            "RESOLUTIONS": ["64"],
        },
    }[program]
    for name, value in said.items():
        monkeypatch.setattr(module, name, types.SimpleNamespace(value=value))
    module.main("config", "workdir")
    assert (
        given
        == {
            "train": {"allow_config_change": True},
            "eval": dict(step="7", weights="raw", datasets=["a"], resolutions=[64]),
        }[program]
    )
