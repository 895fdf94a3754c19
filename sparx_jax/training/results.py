"""The table of an evaluation: top-1 by data set and resolution."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparx_jax.training.workdir import replace_text


class Result(NamedTuple):
    """A data set at a resolution."""

    dataset: str
    """See `data.eval_sets`."""
    resolution: int
    """Pixels of the square images."""
    loss: float | None
    """Nats; None where several labels are right."""
    top1: float
    """Percent."""
    top5: float | None
    examples: int
    unreadable: int = 0
    """Examples that the means leave out."""


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each data set, top-1 in percent for each resolution."""
    resolutions = sorted({result.resolution for result in results})
    top1 = {(r.dataset, r.resolution): f"{r.top1:.2f}" for r in results}
    examples = {r.dataset: f"{r.examples:,}" for r in results}
    rows = [
        ["top-1 %", "images", *(f"{size} px" for size in resolutions)],
        ["---", *["---:"] * (1 + len(resolutions))],
        *(
            [name, count, *(top1[name, size] for size in resolutions)]
            for name, count in examples.items()
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_results(
    workdir: str, title: str, results: Sequence[Result], summary: dict[str, Any]
) -> None:
    """Adds to `results.md` and `results.jsonl`, what other evaluations wrote.

    Of several resolutions it draws `results.png`.
    """
    folder = Path(workdir)
    _add(folder / "results.md", f"{title}:\n\n{table(results)}\n\n")
    _add(folder / "results.jsonl", json.dumps(summary) + "\n")
    if len({result.resolution for result in results}) > 1:
        from sparx_jax import plots, plots_results  # matplotlib takes a second

        curves = {}
        for result in results:
            curve = curves.setdefault(result.dataset, {})
            curve[result.resolution] = result.top1
        figure = plots_results.resolutions_figure(curves, title)
        plots.write_figure(figure, folder / "results.png", title)


def _add(path, text):
    there = path.read_text() if path.exists() else ""
    if text not in there:  # as after an evaluation that was repeated
        replace_text(path, there + text)
