"""Trains every point of a grid of settings and compares the results.

python -m sparx_jax.sweep --config=configs/digits.py --workdir=runs/lr \\
    --sweep seed=0,1,2 --sweep optimizer.lr=1e-3,4e-3

Every point is a run of train.py in its own folder of --workdir; the key of the last
--sweep changes fastest.  The key `variant` is the argument of the config file, the key
`seed` counts as repetition, `--config.KEY=VALUE` holds for all points.  The same
command goes on where it was stopped.  At the end, and with --report_only at any time,
the results are printed and stand in results.md, results.csv (every run), results.png.
"""

import ast
import csv
import io
import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from sparx_jax.errors import BusyError, Preempted, UserError
from sparx_jax.training import cli, goodput
from sparx_jax.training.config import as_dict, changes_of_run, from_config_dict
from sparx_jax.training.logging import duration, read_metrics, say
from sparx_jax.training.loop import plan
from sparx_jax.training.workdir import make_folder, replace_text, storage_errors

TRAIN = Path(__file__).parents[1] / "train.py"

_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "KEY=VALUE,VALUE: values of one setting; repeated: their product."
)
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Points trained at the same time, each on its share of the CPU cores.", 1
)
_INDEX = flags.DEFINE_integer("index", None, "Train this point alone; no report.", 0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the points and their commands.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Train nothing.")


class Point(NamedTuple):
    """One combination of values."""

    values: dict[str, str]
    """As written on the command line, by key."""
    folder: Path
    """Its --workdir, called by its values, such as "lr=0.001,seed=0"."""
    words: list[str]
    """The flags of train.py that make its settings."""
    settings: ConfigDict

    @property
    def command(self) -> list[str]:
        """What trains it."""
        words = [*self.words, *cli.job_flags(), f"--workdir={self.folder}"]
        return [sys.executable, str(TRAIN), *words]


class Result(NamedTuple):
    """A finished run; accuracies in percent."""

    top1: float
    """After the last step, of the average if one is kept."""
    best_top1: float
    """The highest of all evaluations; picked on the test images, so it flatters."""
    raw_top1: float | None
    """After the last step without the average; None if none is kept."""
    parameters: int
    seconds: float | None
    """By goodput.json, all starts together; None if there is none."""


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values by key; commas inside of brackets separate nothing.

    >>> parse_grid(["seed=0,1", "model.depths=(1,1,2,1),(1,1,3,1)"])
    {'seed': ['0', '1'], 'model.depths': ['(1,1,2,1)', '(1,1,3,1)']}
    """
    grid = {}
    for text in texts:
        key, _, values = text.partition("=")
        grid_values, depth = [""], 0
        for char in values:
            depth += (char in "([{") - (char in ")]}")
            if char == "," and depth == 0:
                grid_values.append("")
            else:
                grid_values[-1] += char
        if not key or not all(grid_values):
            raise UserError(
                f"--sweep {text} must have the form KEY=VALUE,VALUE ('' is an empty "
                "value)."
            )
        if key in grid:
            raise UserError(f"--sweep names {key} twice: give all its values at once.")
        grid[key] = ["" if value in ("''", '""') else value for value in grid_values]
    if not grid:
        raise UserError("--sweep is missing: give --sweep KEY=VALUE,VALUE.")
    return grid


def make_points(
    config: str, fixed: dict[str, object], grid: dict[str, list[str]], workdir: str
) -> list[Point]:
    """All points of `grid`, their settings validated.

    Args:
      config: the config file, with its argument after a colon if it has one.
      fixed: settings of all points by dotted key.
      grid: see `parse_grid`.
      workdir: the folder of their folders.

    Raises UserError on a bad setting or value, or on points that are the same.
    """
    for key in grid.keys() & fixed.keys():
        raise UserError(f"{key} is both swept and set by --config.{key}: drop one.")
    if "variant" in grid and ":" in config:
        raise UserError(f"variant is both swept and given in --config={config}.")
    points, by_settings = {}, {}
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        settings = fixed | values
        file = ":".join([config, *filter(None, [settings.pop("variant", None)])])
        words = [f"--config={file}"]
        words += [f"--config.{key}={value}" for key, value in settings.items()]
        name = _name(values, grid)
        if len(os.fsencode(name)) > 255:
            raise UserError(
                f"the point {name} has too long a name for a folder: sweep fewer keys, "
                "or shorter values."
            )
        if name in points:
            raise UserError(
                f"--sweep has two points that would be called {name}: drop one."
            )
        loaded = cli.load_config(words)
        twin = by_settings.setdefault(repr(loaded.to_dict()), name)
        if twin != name:
            raise UserError(
                f"--sweep has points that are the same, {twin} and {name}: drop one."
            )
        points[name] = Point(values, Path(workdir) / name, words, loaded)
    return list(points.values())


def _name(values, grid):
    """Keys by their last part where that is enough, such as "lr=0.001,seed=0".

    In a fixed order: a sweep whose flags come in another finds its runs again.
    """
    last = [key.rpartition(".")[2] for key in grid]
    return ",".join(
        f"{short if last.count(short) == 1 else key}={_safe(values[key])}"
        for key, short in sorted(zip(grid, last, strict=True))
        if key in values
    )


def _safe(text):
    """For file names; values in one spelling, so that 1e-3 is 0.001."""
    if text.lower() in ("true", "false"):
        text = text.capitalize()
    with suppress(ValueError, SyntaxError):
        text = repr(ast.literal_eval(text))
    return re.sub(r"[^\w.+-]+", "-", text.strip("()[]'\" "))


def result(point: Point) -> Result | None:
    """That of a run which has saved the checkpoint of its last step, else None.

    Where all checkpoints were deleted the report counts, which is drawn after the last.

    Raises UserError if the folder holds a run with other settings, or damaged ones.
    """
    evaluations = [r for r in read_metrics(str(point.folder)) if "top1" in r]
    file = point.folder / "config.json"
    if not file.exists():
        return None
    try:
        about = json.loads(file.read_text())
        num_classes = about["config"]["model"]["num_classes"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error}): delete {point.folder} to train it again."
        ) from error
    config = from_config_dict(point.settings, num_classes=num_classes)
    if differing := changes_of_run(about["config"], as_dict(config)):
        raise UserError(
            f"{point.folder} holds a run with other settings: {'; '.join(differing)}; "
            "give another --workdir."
        )
    if not evaluations:
        return None
    last = evaluations[-1]
    examples = round(last["step"] / last["epoch"] * config.batch_size)
    checkpoints, report = point.folder / "checkpoints", point.folder / "report.png"
    saved = checkpoints / str(last["step"]) if checkpoints.exists() else report
    if last["step"] < plan(config, examples).total_steps or not saved.exists():
        return None
    sessions = goodput.read_sessions(str(point.folder))
    return Result(
        last["top1"],
        max(record["top1"] for record in evaluations),
        last.get("raw_top1"),
        about["parameters"],
        sum(goodput.summary(sessions)["seconds"].values()) if sessions else None,
    )


def train_all(points: Sequence[Point], jobs: int) -> list[Point]:
    """Trains the points that are not finished, `jobs` at a time.

    Returns those that are not finished then.  A point that another process trains is
    left to that.
    """
    todo = []
    for point in points:
        if result(point):
            say(f"{point.folder.name}: finished before")
        else:
            todo.append(point)
    jobs = max(1, min(jobs, len(todo)))
    shares = queue.SimpleQueue()
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        for job in range(jobs):
            shares.put(cores[job::jobs] or [cores[job % len(cores)]])

    def pin():
        # Of this thread, from which the processes it starts inherit it.
        if not shares.empty():
            os.sched_setaffinity(0, shares.get())

    running = _Running()
    before = {s: signal.signal(s, running.stop) for s in _STOPS}
    try:
        with ThreadPoolExecutor(jobs, initializer=pin) as pool:
            list(pool.map(partial(_train, running), todo))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if running.stopped:
        raise Preempted(
            "stopped by a signal: the same command goes on from what is saved."
        )
    return [point for point in todo if not result(point)]


_STOPS = signal.SIGTERM, signal.SIGINT


class _Running:
    """The trainings under way, which are told to save and stop when the sweep is."""

    def __init__(self):
        self.stopped, self._processes = False, []

    def stop(self, number, frame):
        del number, frame
        self.stopped = True
        for process in self._processes:
            process.terminate()

    def run(self, command, file):
        """Its exit code."""
        # In a group of its own, or Ctrl-C would end it before it has saved.
        options = dict(stdout=file, stderr=subprocess.STDOUT, process_group=0)
        with subprocess.Popen(command, **options) as process:
            self._processes.append(process)
            if self.stopped:  # since it was asked
                process.terminate()
            code = process.wait()
            return code if code >= 0 else 128 - code  # as a shell tells a signal


def _train(running, point):
    """What train.py prints goes to train.log."""
    if running.stopped:
        return
    start = time.perf_counter()
    log = point.folder / "train.log"
    try:
        point.folder.mkdir(parents=True, exist_ok=True)
        file = log.open("a")
    except OSError as error:
        say(f"{point.folder.name}: FAILED: {error}")
        return
    with file:
        place = file.tell()
        say(f"{point.folder.name}: training, see {log}")
        code = running.run(point.command, file)
    if code == 0:
        seconds = duration(time.perf_counter() - start)
        say(f"{point.folder.name}: finished after {seconds}")
    elif not (running.stopped and code == Preempted.exit_code):
        told = log.read_bytes()[place:].decode(errors="replace").splitlines()
        last = (told or ["it printed nothing"])[-1]
        what = "SKIPPED" if code == BusyError.exit_code else "FAILED"
        say(f"{point.folder.name}: {what} with exit code {code}: {last}")


def write_results(
    points: Sequence[Point], grid: dict[str, list[str]], workdir: str
) -> None:
    """Prints the table and writes results.md, .csv and .png."""
    from sparx_jax.plots import write_figure
    from sparx_jax.plots_sweep import Group, spread, sweep_figure

    results = [result(point) for point in points]
    groups = {}
    for point, found in zip(points, results, strict=True):
        rest = {k: v for k, v in point.values.items() if k != "seed"}
        groups.setdefault(_name(rest, grid) or "all", []).append(found)
    header = ["point", "n", "top-1", "single runs", "best", "raw", "parameters", "s"]
    rows, pictured = [], []
    for name, members in groups.items():
        found = [member for member in members if member]

        def column(field, found=found):
            values = [getattr(member, field) for member in found]
            return [value for value in values if value is not None]

        top1, seconds = column("top1"), column("seconds")
        pictured.append(Group(name, len(members), top1))
        rows.append(
            [
                name,
                f"{len(found)} of {len(members)}",
                spread(top1),
                " ".join(f"{value:.2f}" for value in top1),
                spread(column("best_top1")),
                spread(column("raw_top1")),
                f"{found[0].parameters:,}" if found else "",
                f"{mean(seconds):,.0f}" if seconds else "",
            ]
        )
    table = _table(header, rows)
    say(table)  # before anything that a full disk may end
    folder = make_folder(workdir).resolve()
    replace_text(
        folder / "results.md",
        f"# {folder.name}\n\n{table}\n\nTop-1 in percent after the last step, of the "
        "moving average of the weights where one is kept; raw: without it.  Mean ± "
        "standard deviation (n - 1) over n finished runs of those planned.  best: the "
        "highest evaluation of each run; picked on the test images, so it flatters.  "
        "s: seconds by goodput.json.\n",
    )
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*grid, "folder", "finished", *Result._fields])
    for point, found in zip(points, results, strict=True):
        cells = found or [""] * len(Result._fields)
        writer.writerow(
            [*point.values.values(), point.folder.name, bool(found), *cells]
        )
    replace_text(folder / "results.csv", lines.getvalue())
    with storage_errors(folder):
        figure = sweep_figure(pictured, folder.name)
        write_figure(figure, folder / "results.png", folder.name)


def _table(header, rows):
    """Markdown whose columns also align as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines
    )


def main(config: ConfigDict, workdir: str) -> None:
    """What the flags say; exits with 1 if a point failed."""
    del config  # that of no point
    if not TRAIN.is_file():
        raise UserError(
            f"{TRAIN} is missing: sweeps run in a clone of the repository, not in an "
            "installed package."
        )
    flag = flags.FLAGS["config"]
    grid = parse_grid(_SWEEP.value)
    points = make_points(
        config_flags.get_config_filename(flag),
        config_flags.get_override_values(flag),
        grid,
        workdir,
    )
    if (index := _INDEX.value) is not None and index >= len(points):
        raise UserError(f"--index={index} must be below the {len(points)} points.")
    chosen = points if index is None else [points[index]]
    if _DRY_RUN.value:
        for number, point in enumerate(points):
            if point in chosen:
                say(f"{number} {point.folder.name}\n  {shlex.join(point.command)}")
        return
    for point in points:
        result(point)  # other settings in any folder are told before training
    if index is not None and not _REPORT_ONLY.value:
        # In place of this process: signals and exit code are train.py's.
        os.execv(sys.executable, points[index].command)
    if _REPORT_ONLY.value and not any(point.folder.exists() for point in points):
        raise UserError(
            f"--workdir={workdir} holds none of the sweep's runs: look for its folder."
        )
    make_folder(workdir)
    failed = [] if _REPORT_ONLY.value else train_all(points, _JOBS.value)
    write_results(points, grid, workdir)
    say(f"{workdir}/results.md, results.csv and results.png hold the results")
    if failed:
        names = ", ".join(point.folder.name for point in failed)
        say(f"NOT FINISHED: {names}; the same command tries them again")
        sys.exit(1)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main, joins=False, is_whole=False)
