"""What a run tells: metrics.jsonl, a progress line, TensorBoard scalars if wanted."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from sparx_jax.training.workdir import replace_text, storage_errors


class MetricsLog:
    """`metrics.jsonl` in the work folder: one JSON object a line, each with `step`.

    Written by process 0 only.  Opening it drops what a killed run wrote after
    `start_step`, and a torn last line; of the evaluation then, what counts is
    `evaluated`, the record in the checkpoint, None if it is still to be done.
    """

    def __init__(
        self,
        workdir: str,
        *,
        start_step: int,
        evaluated: dict[str, Any] | None = None,
        tensorboard: bool = False,
    ):
        self._path = self._board = None
        if jax.process_index() != 0:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [
            record
            for record in read_metrics(workdir)
            if record["step"] < start_step
            or (record["step"] == start_step and "top1" not in record)
        ]
        kept += [without_nan(evaluated)] if evaluated else []
        replace_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        if tensorboard:
            from tensorboardX import SummaryWriter

            # Anew: a killed run's last scalars may be in no file of TensorBoard's.
            folder = str(Path(workdir) / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=0, flush_secs=1)
            for record in kept:
                self._show(record)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; numbers that JSON cannot hold become null."""
        if self._path is None:
            return
        with storage_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")
        if self._board is not None:
            self._show(record)

    def _show(self, record):
        for key, value in record.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, record["step"])


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The records of a run, without lines that a kill has torn or a disk damaged."""
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    records = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """None for numbers that JSON cannot hold."""
    missing = {
        key: None
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return record | missing


class Stopwatch:
    """Seconds by activity: the time between two laps goes to the later one's name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """Adds the time since the last lap to `name`, and returns it."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        return elapsed


def say(message: str) -> None:
    """Prints a line at once, on process 0 only."""
    if jax.process_index() == 0:
        print(f"{message}\n", end="", flush=True)  # at once, though threads print


def duration(seconds: float) -> str:
    """Seconds as "3 min 05 s" or "2 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
