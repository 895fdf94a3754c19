"""The figure of a sweep: a dot for each run, mean and deviation of each group."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

from sparx_jax.plots import (
    BLUE,
    INK,
    ORANGE,
    WIDTH,
    new_figure,
    panel,
    write_line,
)


class Group(NamedTuple):
    """Runs that differ in the seed alone."""

    name: str
    planned: int
    """Runs that the sweep asks for."""
    top1: Sequence[float]
    """Percent, one for each finished run."""


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1), without the latter for a single value."""
    if not values:
        return "–"  # noqa: RUF001
    text = f"{mean(values):,.2f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):,.2f}"


def sweep_figure(groups: Sequence[Group], title: str) -> Figure:
    """One row a group, in the order given; 12 inches wide."""
    note = "top-1, %, after the last step; dots: single runs, bar: mean ± deviation"
    figure = new_figure(1.6 + 0.36 * len(groups), title, note)
    left = min(5.0, 0.5 + 0.08 * max(len(group.name) for group in groups))
    height = 0.36 * len(groups)
    axes = panel(figure, left, 0.9, WIDTH - left - 2.2, height, "")
    for row, (name, planned, top1) in enumerate(groups):
        if len(top1) > 1:
            low, high = (mean(top1) + sign * stdev(top1) for sign in (-1, 1))
            axes.plot([low, high], [row, row], color=BLUE, lw=7, alpha=0.25)
        if top1:
            axes.plot(mean(top1), row, "|", ms=14, mew=2, color=BLUE)
        axes.plot(top1, [row] * len(top1), "o", ms=4, color=ORANGE, mew=0, alpha=0.8)
        y = 0.9 + 0.36 * (row + 0.5) + 0.05
        style = dict(size=8.5, color=INK, width=left - 0.5)
        write_line(figure, 0.4, y, name, keep_end=True, **style)  # or two may be alike
        count = f"n = {len(top1)}" + f" of {planned}" * (len(top1) < planned)
        text = f"{spread(top1)},  {count}"
        write_line(figure, WIDTH - 2.0, y, text, size=8.5, color=INK)
    axes.set(ylim=(len(groups) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_formatter("{x:,.6g}")
    if not any(group.top1 for group in groups):
        axes.set(xticks=[])
    return figure
