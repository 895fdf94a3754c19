"""Laws of sweeps: the grid, names, what is skipped, what a failure does, the table."""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from sparx_jax import sweep
from sparx_jax.errors import Preempted, StorageError, UserError
from sparx_jax.plots_sweep import Group, spread, sweep_figure
from sparx_jax.training.config import as_dict, from_config_dict
from sparx_jax.training.goodput import Goodput
from tests.test_cli import ROOT

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DIGITS = str(ROOT / "configs/digits.py")
STRIDES = "model.connector.stride=(0,1,1,1),(0,1,2,1)"


def points_of(tmp_path, *sweeps, fixed=(), config=DIGITS):
    grid = sweep.parse_grid(sweeps)
    return sweep.make_points(config, dict(fixed), grid, str(tmp_path)), grid


def fabricate(point, folder, *top1, step=360, **about):
    """What train.py leaves of a run whose last evaluation is after `step` of 359."""
    (folder / f"checkpoints/{step}").mkdir(parents=True)
    config = as_dict(from_config_dict(point.settings, num_classes=10))
    content = {"config": config, "parameters": 878_486} | about
    (folder / "config.json").write_text(json.dumps(content))
    steps = [step * (i + 1) // len(top1) for i in range(len(top1))]
    records = [
        {"step": s, "epoch": s * 64 / 1437, "top1": t, "raw_top1": t - 1}
        for s, t in zip(steps, top1, strict=True)
    ]
    losses = [{"step": s, "epoch": s * 64 / 1437, "train_loss": 1.0} for s in steps]
    lines = [json.dumps(r) + "\n" for pair in zip(losses, records) for r in pair]  # noqa: B905
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_the_grid_is_the_product_and_the_last_key_changes_fastest(tmp_path):
    points, _ = points_of(tmp_path, "seed=0,1", STRIDES)
    assert [tuple(point.values.values()) for point in points] == [
        ("0", "(0,1,1,1)"),
        ("0", "(0,1,2,1)"),
        ("1", "(0,1,1,1)"),
        ("1", "(0,1,2,1)"),
    ]
    assert points[3].settings.seed == 1
    assert points[3].settings.model.connector.stride == (0, 1, 2, 1)


def test_commas_inside_of_brackets_separate_no_values():
    text = "frozen=a{1,2},((1,2),(3,4)),[5,6]"
    assert sweep.parse_grid([text]) == {"frozen": ["a{1,2}", "((1,2),(3,4))", "[5,6]"]}


@pytest.mark.parametrize(
    "sweeps, name",
    [
        (["optimizer.lr=1e-3", "seed=0"], "lr=0.001,seed=0"),
        (["seed=0", "optimizer.lr=1e-3"], "lr=0.001,seed=0"),
        (["optimizer.lr=1E-5"], "lr=1e-05"),
        ([STRIDES], "stride=0-1-1-1"),
        (["model.name=sparx_mamba_nano"], "name=sparx_mamba_nano"),
        (
            ["model.name=sparx_mamba_t", "data.name=folder"],
            "data.name=folder,model.name=sparx_mamba_t",
        ),
        (["data.root=/a b/c"], "root=-a-b-c"),
        (["use_ema=False"], "use_ema=False"),
        (["optimizer.frozen=''"], "frozen="),
    ],
)
def test_a_folder_is_called_by_its_values_in_safe_characters(tmp_path, sweeps, name):
    points, _ = points_of(tmp_path, *sweeps)
    assert points[0].folder == tmp_path / name


def test_the_command_gives_the_settings_that_were_validated(tmp_path):
    fixed = {"train_epochs": 2.0, "optimizer.warmup_epochs": 0.5}
    (point,), _ = points_of(tmp_path, "seed=3", fixed=fixed)
    assert point.command[1:] == [
        str(ROOT / "train.py"),
        f"--config={DIGITS}",
        "--config.train_epochs=2.0",
        "--config.optimizer.warmup_epochs=0.5",
        "--config.seed=3",
        f"--workdir={tmp_path}/seed=3",
    ]
    assert point.settings.train_epochs == 2.0 and point.settings.seed == 3


def test_variant_is_the_argument_of_the_config_file(tmp_path):
    file = tmp_path / "config.py"
    text = (ROOT / "configs/digits.py").read_text()
    text = text.replace("get_config()", "get_config(variant)")
    file.write_text(text.replace("= 64\n", "= int(variant)\n"))
    points, _ = points_of(tmp_path, "variant=32,16", config=str(file))
    assert [point.settings.batch_size for point in points] == [32, 16]
    assert points[1].words == [f"--config={file}:16"]
    assert points[1].folder.name == "variant=16"
    with pytest.raises(UserError, match="variant is both swept and given"):
        points_of(tmp_path, "variant=32", config=f"{file}:16")


@pytest.mark.parametrize(
    "sweeps, fixed, sentence",
    [
        ([], {}, "--sweep is missing"),
        (["seed"], {}, "--sweep seed must have the form"),
        (["seed=0,"], {}, "--sweep seed=0, must have the form"),
        (["seed=0", "seed=1"], {}, "names seed twice"),
        (["optimizer.lr=1e-3,0.001"], {}, "would be called lr=0.001"),
        (["use_ema=True,true"], {}, "would be called use_ema=True"),
        (["seed=1,01"], {}, "are the same, seed=1 and seed=01"),
        ([f"init_from={'a' * 250}"], {}, "too long a name for a folder"),
        (["seed=0"], {"seed": 1}, "seed is both swept and set by --config.seed"),
        (["optimizer.rate=1"], {}, "unknown setting config.optimizer.rate"),
        (["batch_size=8,abc"], {}, "batch_size=abc"),
        (["label_smoothing=0.1,1.5"], {}, "label_smoothing=1.5 must be"),
        (["model.depths=(1,1,1,1),(1,1)"], {}, r"depths=\(1, 1\)"),
        (["model.depths=(1,x,1,1)"], {}, "not a tuple of numbers"),
    ],
)
def test_a_bad_grid_is_told_before_anything_starts(tmp_path, sweeps, fixed, sentence):
    with pytest.raises(UserError, match=sentence):
        points_of(tmp_path, *sweeps, fixed=fixed)


def test_a_run_is_finished_when_its_last_checkpoint_is_there(tmp_path):
    points, _ = points_of(tmp_path, "seed=0,1,2,3")
    done, half, unsaved, absent = points
    fabricate(done, done.folder, 90.0, 80.0, step=359)
    for seconds in (4.0, 8.5):  # two starts
        session = Goodput(str(done.folder))
        session.start(0)
        session.seconds["steps"] = seconds
        session.write(359)
    fabricate(half, half.folder, 70.0, step=180)
    fabricate(unsaved, unsaved.folder, 70.0, step=359)
    (unsaved.folder / "checkpoints/359").rename(unsaved.folder / "checkpoints/359.tmp")
    assert sweep.result(done) == (80.0, 90.0, 79.0, 878_486, 12.5)
    assert [sweep.result(p) for p in (half, unsaved, absent)] == [None] * 3
    (unsaved.folder / "report.png").touch()  # by eval.py
    assert sweep.result(unsaved) is None
    shutil.rmtree(done.folder / "checkpoints")
    assert sweep.result(done) is None
    (done.folder / "report.png").touch()
    assert sweep.result(done).top1 == 80.0  # its checkpoints were deleted
    (half.folder / "config.json").write_text('{"config": {"mod')
    with pytest.raises(UserError, match=r"config.json is damaged .*: delete "):
        sweep.result(half)


def test_a_run_with_other_settings_is_not_taken_for_a_point(tmp_path):
    (point,), _ = points_of(tmp_path, "seed=0")
    fabricate(point, point.folder, 90.0, step=359)
    (other,), _ = points_of(tmp_path, "seed=0", fixed={"batch_size": 32})
    with pytest.raises(UserError, match="other settings: batch_size=64 there, 32 here"):
        sweep.result(other)
    (moved,), _ = points_of(tmp_path, "seed=0", fixed={"data.workers": 3})
    assert sweep.result(moved).top1 == 90.0  # which changes nothing of the run


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A train.py that fails for seed 1, and otherwise moves a made-up run in place."""
    program = tmp_path / "train.py"
    program.write_text(
        "import os, pathlib, shutil, sys\n"
        "work = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
        "print('cores', len(os.sched_getaffinity(0)))\n"
        "if work.name == 'seed=1': sys.exit('error: no luck')\n"
        f"shutil.copytree('{tmp_path}/made/' + work.name, work, dirs_exist_ok=True)\n"
    )
    monkeypatch.setattr(sweep, "TRAIN", program)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_point_stops_no_other_and_is_tried_again(
    tmp_path, trainer, capsys, jobs
):
    points, _ = points_of(tmp_path / "runs", "seed=0,1,2")
    for point in points:
        made = tmp_path / "made" / point.folder.name
        fabricate(point, made, 90.0, step=359)
    failed = sweep.train_all(points, jobs)
    assert [point.folder.name for point in failed] == ["seed=1"]
    assert [bool(sweep.result(point)) for point in points] == [True, False, True]
    assert "seed=1: FAILED with exit code 1: error: no luck" in capsys.readouterr().out
    again = sweep.train_all(points, jobs)
    out = capsys.readouterr().out
    assert again == failed and "seed=0: finished before" in out
    assert out.count("training, see") == 1
    logs = [(point.folder / "train.log").read_text() for point in points]
    assert logs[1].count("no luck") == 2 and logs[0].count("cores") == 1
    cores = len(os.sched_getaffinity(0))  # all of them for the last point
    assert logs[1].splitlines()[-2] == f"cores {cores}"


def test_a_point_that_another_process_trains_is_skipped(tmp_path, monkeypatch, capsys):
    """Told by what this attempt has printed, not by an earlier one."""
    program = tmp_path / "train.py"
    program.write_text(
        "import os, sys\n"
        "if sys.argv[-1].endswith('seed=0'): sys.exit(75)\n"
        "print(sorted(os.sched_getaffinity(0)))\n"
        "sys.exit(1)\n"
    )
    monkeypatch.setattr(sweep, "TRAIN", program)
    points, _ = points_of(tmp_path / "runs", "seed=0,1")
    points[0].folder.mkdir(parents=True)
    (points[0].folder / "train.log").write_text("from before\n")
    assert sweep.train_all(points, 2) == points
    out = capsys.readouterr().out
    assert "seed=0: SKIPPED with exit code 75: it printed nothing\n" in out
    cores = sorted(os.sched_getaffinity(0))
    shares = [f"FAILED with exit code 1: {cores[job::2] or cores}\n" for job in (0, 1)]
    assert any(share in out for share in shares)


def test_a_folder_that_cannot_be_made_stops_no_other_point(tmp_path, trainer, capsys):
    points, _ = points_of(tmp_path / "runs", "seed=0,2,3")
    for point in points:
        fabricate(point, tmp_path / "made" / point.folder.name, 90.0, step=359)
    (tmp_path / "runs").mkdir()
    points[0].folder.touch()
    assert sweep.train_all(points, 1) == points[:1]
    assert "seed=0: FAILED: [Errno " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_points_once_they_have_saved(
    tmp_path, monkeypatch, capsys, number
):
    program, runs = tmp_path / "train.py", tmp_path / "runs"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "work = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
        "def save(*_):\n"
        "    (work / 'saved').touch()\n"
        "    if work.name == 'seed=1': sys.exit('error: but no best')\n"
        "    sys.exit(17)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(work / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sweep, "TRAIN", program)
    points, _ = points_of(runs, "seed=0,1,2")

    def send():
        while len(list(runs.glob("*/ready"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="the same command goes on"):
        sweep.train_all(points, 2)
    assert signal.getsignal(number) == before
    assert [(p.folder / "saved").exists() for p in points] == [True, True, False]
    assert not points[2].folder.exists(), "it was not started"
    out = capsys.readouterr().out
    assert "seed=1: FAILED with exit code 1: error: but no best" in out
    assert out.count("FAILED") == 1


def test_seeds_are_repetitions_and_missing_runs_are_told(tmp_path, capsys):
    points, grid = points_of(tmp_path, "seed=0,1,2", "optimizer.lr=1e-3,4e-3")
    tops = {"lr=0.001": (90.0, 92.0, 97.0), "lr=0.004": (80.0,)}
    for point in points:
        seed, group = (
            int(point.values["seed"]),
            sweep._name({"optimizer.lr": point.values["optimizer.lr"]}, grid),
        )
        if seed < len(tops[group]):
            fabricate(point, point.folder, 98.0, tops[group][seed], step=359)
    sweep.write_results(points, grid, str(tmp_path))
    table = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    sd = statistics.stdev(tops["lr=0.001"])
    assert cells[2][:5] == [
        "lr=0.001", "3 of 3", f"93.00 ± {sd:.2f}", "90.00 92.00 97.00", "98.00 ± 0.00",
    ]  # fmt: skip
    assert cells[2][5:] == [f"92.00 ± {sd:.2f}", "878,486", ""]
    assert cells[3][:4] == ["lr=0.004", "1 of 3", "80.00", "80.00"]
    assert "\n".join(table) in (tmp_path / "results.md").read_text()
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 6 and rows[0]["top1"] == "90.0" and rows[0]["seed"] == "0"
    assert [row["finished"] for row in rows].count("True") == 4
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000


def test_a_report_without_any_finished_run_says_so(tmp_path, capsys):
    points, grid = points_of(tmp_path, "seed=0,1")
    sweep.write_results(points, grid, str(tmp_path))
    assert "| all   | 0 of 2 | –" in capsys.readouterr().out  # noqa: RUF001


def test_a_table_is_printed_where_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    points, grid = points_of(tmp_path, "seed=0,1")

    def full(path, text):
        raise StorageError(f"{path} cannot be written")

    monkeypatch.setattr(sweep, "replace_text", full)
    with pytest.raises(StorageError):
        sweep.write_results(points, grid, str(tmp_path))
    assert "0 of 2" in capsys.readouterr().out


def test_a_report_of_no_run_at_all_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="runs holds none of the sweep's runs"):
        run_main(tmp_path, monkeypatch, "--sweep=seed=0,1", "--report_only")
    assert not (tmp_path / "runs").exists()


def test_the_deviation_is_that_of_a_sample():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41" and spread([2.0]) == "2.00"


def run_main(tmp_path, monkeypatch, *words):
    """The program in this process, its flags freshly parsed."""
    argv = ["sweep", f"--config={DIGITS}", f"--workdir={tmp_path}/runs", *words]
    monkeypatch.setattr("sys.argv", argv)
    flags = sweep.flags.FLAGS
    saved = {name: flags[name].default for name in flags}
    flags(argv)
    try:
        sweep.main(None, f"{tmp_path}/runs")
    finally:
        ours = "sweep", "jobs", "index", "dry_run", "report_only"
        for name in (*ours, "distributed", "start_timeout_s"):
            flags[name].unparse()
            flags[name].value = saved[name]


@pytest.mark.parametrize("index, shown", [([], 3), (["--index=1"], 1)])
def test_a_dry_run_prints_commands_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, index, shown
):
    run_main(tmp_path, monkeypatch, "--sweep=seed=0,1,2", "--dry_run", *index)
    out = capsys.readouterr().out
    assert out.count("train.py --config=") == shown
    assert "1 seed=1\n" in out and "--config.seed=1 --workdir=" in out
    assert not (tmp_path / "runs").exists()


def test_what_is_said_of_processes_is_passed_on(tmp_path, monkeypatch, capsys):
    words = "--distributed=off", "--start_timeout_s=900"
    run_main(tmp_path, monkeypatch, "--sweep=seed=0", "--dry_run", *words)
    assert f" {' '.join(words)} --workdir=" in capsys.readouterr().out


def test_a_workdir_that_is_a_file_is_told(tmp_path, monkeypatch):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="runs cannot be made or written"):
        run_main(tmp_path, monkeypatch, "--sweep=seed=0")


def test_an_index_beyond_the_points_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--index=3 must be below the 3 points"):
        run_main(tmp_path, monkeypatch, "--sweep=seed=0,1,2", "--index=3")


def test_an_index_trains_that_point_alone(tmp_path, trainer, monkeypatch):
    points, _ = points_of(tmp_path / "runs", "seed=0,1,2")
    fabricate(points[2], tmp_path / "made/seed=2", 90.0, step=359)

    def execv(path, words):
        assert path == sys.executable
        subprocess.run(words, check=True)
        raise SystemExit

    monkeypatch.setattr(sweep.os, "execv", execv)
    with pytest.raises(SystemExit):
        run_main(tmp_path, monkeypatch, "--sweep=seed=0,1,2", "--index=2")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["seed=2"]


def test_a_sweep_with_a_failure_reports_and_exits_with_1(
    tmp_path, trainer, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="1"):
        run_main(tmp_path, monkeypatch, "--sweep=seed=1")
    out = capsys.readouterr().out
    assert "0 of 1" in out and "NOT FINISHED: seed=1" in out
    run_main(tmp_path, monkeypatch, "--sweep=seed=1", "--report_only")
    assert "0 of 1" in capsys.readouterr().out


def test_settings_that_only_the_points_complete_are_no_error(tmp_path):
    """Those of the command line alone are no run, and not checked as one."""
    words = "--config.optimizer.warmup_epochs=20 --sweep=train_epochs=50,100 --dry_run"
    command = [sys.executable, "-m", "sparx_jax.sweep", "--config=configs/digits.py"]
    result = subprocess.run(
        [*command, f"--workdir={tmp_path}/runs", *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("train.py --config=") == 2


def test_trainings_are_in_groups_of_their_own(tmp_path, monkeypatch):
    """Or Ctrl-C at the terminal would end them before they have saved."""
    program = tmp_path / "train.py"
    program.write_text("import os\nprint(os.getpgrp() == os.getpid())\n")
    monkeypatch.setattr(sweep, "TRAIN", program)
    points, _ = points_of(tmp_path / "runs", "seed=0")
    sweep.train_all(points, 1)
    assert (points[0].folder / "train.log").read_text() == "True\n"


def test_long_names_that_differ_at_their_ends_stay_apart():
    names = [f"connector.mode={'x' * 90}-{i}" for i in range(3)]
    figure = sweep_figure([Group(name, 1, [90.0]) for name in names], "title")
    drawn = {text.get_text() for text in figure.texts if "…" in text.get_text()}
    assert len(drawn) == 3
