"""Figures of a network's wiring and of a training run.

Figures are plain objects (never pyplot, which is global state), their sizes are in
inches and their files are written atomically and without a date.
"""

import os
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sparx_jax.models.config import ModelConfig

DPI = 110
WIDTH = 12.0
WRONG_COLUMNS = 8

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#222222"
GREY, PALE = "#777777", "#F2F4F7"
ARC_COLOURS = {"inner": BLUE, "cross": ORANGE}

# Names of classes in scripts that the font lacks become boxes, without a word for each.
warnings.filterwarnings("ignore", "Glyph .* missing from font")


class Arc(NamedTuple):
    """One connection: the ganglion layer `target` of `stage` reads `source`."""

    stage: int
    source: int
    """Layer index within the stage; -1 is the input of the stage."""
    target: int
    kind: Literal["inner", "cross"]
    """`cross`: the source is itself a ganglion; `inner`: it is not."""


class WrongAnswer(NamedTuple):
    """An image that the network took for something else."""

    image: np.ndarray
    """uint8 (h, w, 3)."""
    predicted: str
    true: str
    probability: float
    """Of the predicted class, in [0, 1]."""
    name: str
    """Which image it is, for instance its path (the last part is shown)."""


def wiring_arcs(config: ModelConfig) -> list[Arc]:
    """The connections of the whole network, in the order of its wiring tables."""
    arcs = []
    for stage in range(len(config.depths)):
        table = config.wiring(stage)
        for target, layer in enumerate(table):
            for source in layer.sources:
                ganglion = source >= 0 and table[source].is_ganglion
                kind = "cross" if ganglion else "inner"
                arcs.append(Arc(stage, source, target, kind))
    return arcs


def wiring_text(configs: Mapping[str, ModelConfig]) -> str:
    """The wiring tables of networks by title, one line for each stage."""
    return "\n".join(
        f"{title} stage {stage + 1}, width {config.dims[stage]}: "
        + " ".join(
            f"({','.join(map(str, layer.sources))})" for layer in config.wiring(stage)
        )
        for title, config in configs.items()
        for stage in range(len(config.depths))
    )


def draw_wiring(
    axes: Axes, config: ModelConfig, title: str, *, legend: bool = True
) -> None:
    """Draws the four stages in a row, with an arc from each source to its reader.

    Arcs from earlier ganglions run above the row, all others below.  `axes` must have
    its final size, from which that of the nodes follows; 2 inches high is enough.
    """
    arcs, nodes = wiring_arcs(config), _node_positions(config.depths)
    box = axes.get_window_extent()
    width, height = np.array([box.width, box.height]) * 72 / axes.figure.dpi  # points
    left, right = nodes[0].left - 0.3, nodes[-1].right + 0.3
    size = min(17.0, 0.62 * width / (right - left))
    heights = _arc_heights(arcs)
    below, above = (
        max((heights[arc] for arc in arcs if arc.kind == kind), default=0) + 0.2
        for kind in ARC_COLOURS
    )
    header = 56 / (height - 56) * (below + above)  # four lines of text
    axes.set(xlim=(left, right), ylim=(-below, above + header))
    axes.axis("off")
    for stage, row in enumerate(nodes):
        axes.axvspan(row.left, row.right, color=PALE, lw=0, zorder=0)
        connections = sum(arc.stage == stage for arc in arcs)
        _draw_stage_label(axes, row, stage, config, connections)
    _draw_chain(axes, nodes, size)
    _draw_arcs(axes, nodes, arcs, heights, size, height)
    _draw_layers(axes, nodes, config, size)
    style = dict(size=11, weight="bold", color=INK, parse_math=False)
    _cut(axes.set_title(title, loc="left", **style), box.width)
    if legend:
        _draw_wiring_legend(axes)


class _Row(NamedTuple):
    left: float
    right: float
    x: np.ndarray
    """Of the stage input, then of each layer: that of layer i is x[i + 1]."""


def _node_positions(depths):
    """A stage is wide enough for its label, however short beside the others."""
    counts = [depth + 1 for depth in depths]
    rows, left = [], 0.0
    for count in counts:
        right = left + max(count, 0.09 * sum(counts))
        middle = (left + right) / 2
        rows.append(_Row(left, right, middle + np.arange(count) - (count - 1) / 2))
        left = right + 0.25
    return rows


def _arc_heights(arcs):
    longest = max((arc.target - arc.source for arc in arcs), default=1)
    return {a: 0.25 + 0.75 * (a.target - a.source) / max(longest, 4) for a in arcs}


def _draw_stage_label(axes, row, stage, config, connections):
    depth = config.depths[stage]
    lines = (
        f"{depth} layer{'s' * (depth != 1)}",
        f"width {config.dims[stage]}",
        f"{connections} connection{'s' * (connections != 1)}",
    )
    where = dict(xy=((row.left + row.right) / 2, 1), ha="center", va="top")
    where.update(xycoords=("data", "axes fraction"), textcoords="offset points")
    name = dict(xytext=(0, -4), size=8.5, weight="bold", color=INK)
    axes.annotate(f"Stage {stage + 1}", **name, **where)
    axes.annotate("\n".join(lines), xytext=(0, -17), size=7.5, color=GREY, **where)


def _draw_chain(axes, nodes, size):
    x = np.concatenate([row.x for row in nodes])
    style = dict(arrowstyle="-|>", color=GREY, lw=0.9, mutation_scale=6)
    style.update(shrinkA=size / 2, shrinkB=size / 2)
    for start, end in pairwise(x):
        axes.annotate("", (end, 0), (start, 0), arrowprops=style, zorder=1)


def _draw_arcs(axes, nodes, arcs, heights, size, height):
    """Half ellipses, thinner where there are many; one arrowhead for each bundle."""
    turn = np.linspace(0, np.pi, 60)
    bottom, top = axes.get_ylim()
    clear = (size / 2 + 3) * (top - bottom) / height
    for kind, sign, marker in (("inner", -1, "^"), ("cross", 1, "v")):
        chosen = [arc for arc in arcs if arc.kind == kind]
        curves = []
        for arc in chosen:
            start, end = nodes[arc.stage].x[[arc.source + 1, arc.target + 1]]
            x = (start + end) / 2 - (end - start) / 2 * np.cos(turn)
            curves.append(np.stack([x, sign * heights[arc] * np.sin(turn)], axis=1))
        colour, few = ARC_COLOURS[kind], 50 / max(len(chosen), 1)
        style = dict(lw=np.clip(few, 0.6, 1.3), alpha=np.clip(few, 0.3, 0.85))
        axes.add_collection(LineCollection(curves, colors=colour, zorder=2, **style))
        ends = sorted({nodes[arc.stage].x[arc.target + 1] for arc in chosen})
        heads = dict(marker=marker, color=colour, ms=0.33 * size, mew=0, ls="")
        axes.plot(ends, [sign * clear] * len(ends), zorder=3, **heads)


def _draw_layers(axes, nodes, config, size):
    """A number on each layer that is its index in the wiring table."""
    for stage, row in enumerate(nodes):
        table = config.wiring(stage)
        axes.plot(row.x[0], 0, "s", ms=0.6 * size, color=INK, mew=0, zorder=4)
        for layer, x in zip(table, row.x[1:], strict=True):
            marker, colour = ("D", ORANGE) if layer.is_ganglion else ("o", BLUE)
            ms = size * (0.8 if layer.is_ganglion else 0.95)
            axes.plot(x, 0, marker, ms=ms, color=colour, mew=0, zorder=4)
        if size >= 11:
            style = dict(ha="center", va="center_baseline", color="white", zorder=5)
            for index, x in enumerate(row.x[1:]):
                axes.text(x, 0, str(index), size=0.45 * size, weight="bold", **style)


def _draw_wiring_legend(axes, **place):
    def key(label, **style):
        return Line2D([], [], label=label, mew=0, **style)

    keys = [
        key("stage input", marker="s", ls="", color=INK, ms=5),
        key("normal layer", marker="o", ls="", color=BLUE, ms=7),
        key("ganglion layer", marker="D", ls="", color=ORANGE, ms=6),
        key("next layer", color=GREY, lw=0.9),
        key("read from a normal layer or the stage input", color=BLUE, lw=1.3),
        key("read from an earlier ganglion", color=ORANGE, lw=1.3),
    ]
    add_legend(axes, handles=keys, ncols=len(keys), **place)


def add_legend(axes: Axes, loc="lower right", anchor=(1, 1), **options) -> None:
    """Outside of a corner, where it hides nothing: by default above the upper right."""
    style = dict(frameon=False, fontsize=7.5, columnspacing=1.2, handlelength=1.4)
    style.update(handletextpad=0.5, borderaxespad=0.2, labelcolor=INK)
    axes.legend(loc=loc, bbox_to_anchor=anchor, **style, **options)


def wiring_figure(configs: Mapping[str, ModelConfig]) -> Figure:
    """A panel, 12 by 2.5 inches, for each network under its title."""
    figure = Figure(figsize=(WIDTH, 2.65 * len(configs) + 0.25), dpi=DPI)
    FigureCanvasAgg(figure)  # which measures texts
    for index, (title, config) in enumerate(configs.items(), 1):
        axes = _add_axes(figure, 0.2, 2.65 * index - 2.3, WIDTH - 0.4, 2.3)
        draw_wiring(axes, config, title, legend=False)
    _draw_wiring_legend(axes, loc="upper right", anchor=(1, 0))  # titles may be long
    return figure


def write_wiring(path: str | os.PathLike, configs: Mapping[str, ModelConfig]) -> None:
    """Writes `wiring_figure(configs)` as a PNG whose text `Wiring` is the tables."""
    image = render(wiring_figure(configs)).quantize(128)  # few colours: a small file
    save(image, path, Wiring=wiring_text(configs))


def new_figure(height: float, title: str, note: str) -> Figure:
    """`height` inches under a title and, smaller, a note; what does not fit is cut."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)  # which measures texts
    write_line(figure, 0.4, 0.42, title, size=15, weight="bold", width=WIDTH - 0.8)
    write_line(figure, 0.4, 0.68, note, size=9, color=GREY)
    return figure


def report_figure(
    *,
    history: Sequence[dict],
    wrong: Sequence[WrongAnswer],
    model: ModelConfig,
    title: str,
) -> Figure:
    """Curves, wiring and the most confident of the wrong answers, 12 inches wide.

    Each record of `history` has a `step` and any of `epoch`, `train_loss`,
    `learning_rate`, `eval_loss`, `top1`, `raw_top1` (percent), `raw_eval_loss` and
    `images_per_s`; the last record of a step counts.
    """
    rows = -(-len(wrong) // WRONG_COLUMNS)
    figure = new_figure(7.95 + max(1.95 * rows, 0.5), title, _summary(history))
    _draw_curves(figure, history)
    draw_wiring(_add_axes(figure, 0.4, 5.15, WIDTH - 0.7, 2.3), model, "Wiring")
    _draw_wrong_answers(figure, wrong, top=7.85)
    return figure


def series(history: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps in ascending order and the values of `key`, NaN where not finite."""
    points = {record["step"]: record[key] for record in history if key in record}
    steps = np.array(sorted(points), float)
    values = np.array([points[step] for step in steps], float)  # None becomes NaN
    return steps, np.where(np.isfinite(values), values, np.nan)


def _best(history):
    """Step and percent of the best evaluation, or None."""
    steps, values = series(history, "top1")
    if not np.isfinite(values).any():
        return None
    best = np.nanargmax(values)
    return steps[best], values[best]


def _summary(history):
    if not history:
        return "no records yet"
    last = max(history, key=lambda record: record["step"])
    parts = [f"{last['step']:,} steps"]
    if "epoch" in last:
        parts.append(f"{last['epoch']:.4g} epochs")
    if best := _best(history):
        parts.append(f"best top-1 {best[1]:.2f} % at step {best[0]:,.0f}")
    return " · ".join(parts)


def _draw_curves(figure, history):
    left, right, width = 0.75, 6.7, 4.95
    loss = panel(figure, left, 1.2, width, 2.35, "Loss")
    rate = panel(figure, left, 3.95, width, 0.55, "Learning rate")
    top1 = panel(figure, right, 1.2, width, 2.35, "Top-1 accuracy, %")
    speed = panel(figure, right, 3.95, width, 0.55, "Images per second")
    smoothed = any("raw_top1" in record for record in history)
    evaluation = "evaluation, EMA weights" if smoothed else "evaluation"
    raw = dict(label="evaluation, raw weights", color=ORANGE, ls="--")
    _draw_curve(loss, history, "train_loss", label="training", color=GREY, lw=0.9)
    _draw_curve(loss, history, "raw_eval_loss", **raw)
    _draw_curve(loss, history, "eval_loss", label=evaluation, color=BLUE)
    _draw_curve(top1, history, "raw_top1", **raw)
    _draw_curve(top1, history, "top1", label=evaluation, color=BLUE)
    _draw_curve(rate, history, "learning_rate", color=GREEN, lw=1)
    _draw_curve(speed, history, "images_per_s", color=GREEN, lw=1)
    for axes in (loss, top1):
        axes.tick_params(labelbottom=False)
        if axes.lines:
            add_legend(axes, ncols=3)
    for axes in (axes for axes in (rate, speed) if axes.lines):
        axes.set_xlabel("step", loc="right", size=7.5, color=GREY, labelpad=1)
    for axes in (loss, rate, top1, speed):
        _finish_panel(axes, [record["step"] for record in history] or [0])
    _mark_not_finite(loss, history)
    _mark_best(top1, history)


def panel(
    figure: Figure, left: float, top: float, width: float, height: float, title: str
) -> Axes:
    """Axes in the style of the reports, placed in inches from the upper left corner."""
    axes = _add_axes(figure, left, top, width, height)
    axes.set_title(title, loc="left", size=9.5, weight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=7.5, length=0, labelcolor=GREY)
    axes.grid(color="#E6E6E6", lw=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=3 if height < 1 else 6)
    axes.locator_params(axis="x", nbins=6)
    return axes


def _finish_panel(axes, steps):
    """Gives all panels the same steps; says so where nothing was drawn."""
    margin = 0.02 * (max(steps) - min(steps)) or 1
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter("{x:,.6g}")  # no offset, which would hit the title
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        where = dict(transform=axes.transAxes, ha="center", va="center")
        axes.text(0.5, 0.5, "no values to draw", size=8, color=GREY, **where)


def _draw_curve(axes, history, key, **style):
    """Points are marked where they are few, so that a single one shows too."""
    steps, values = series(history, key)
    if not np.isfinite(values).any():
        return
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, values, **{"lw": 1.6, "marker": marker, "ms": 3, **style})


def _mark_not_finite(axes, history):
    """Says where a loss first was NaN or infinite: its curve has a gap there."""
    steps = [
        steps[~np.isfinite(values)].min()
        for key in ("train_loss", "eval_loss")
        for steps, values in [series(history, key)]
        if not np.isfinite(values).all()
    ]
    if steps:
        _note(axes, min(steps), 0.9, f"not finite at step {min(steps):,.0f}", ORANGE)


def _mark_best(axes, history):
    if best := _best(history):
        step, percent = best
        axes.plot(step, percent, "*", ms=12, color=BLUE, mec="white", zorder=5)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1), min(top, 101))
        _note(axes, step, 0.05, f"best {percent:.2f} % at step {step:,.0f}", BLUE)


def _note(axes, step, height, text, colour):
    """A dotted line at `step` with text on the side that has more room."""
    axes.axvline(step, color=colour, lw=0.9, ls=":")
    later = step > np.mean(axes.get_xlim())
    where = dict(xycoords=("data", "axes fraction"), textcoords="offset points")
    where.update(xytext=(-5, 0) if later else (5, 0), ha="right" if later else "left")
    halo = [withStroke(linewidth=3, foreground="white")]
    style = dict(size=8, weight="bold", color=colour, path_effects=halo)
    axes.annotate(text, (step, height), **where, **style)


def _draw_wrong_answers(figure, wrong, top):
    heading = "The most confident of the wrong answers"
    write_line(figure, 0.4, top - 0.05, heading, size=11, weight="bold")
    if not wrong:
        write_line(figure, 0.4, top + 0.2, "None among the images looked at.", size=9)
    pitch = (WIDTH - 0.7) / WRONG_COLUMNS
    for index, answer in enumerate(wrong):
        row, column = divmod(index, WRONG_COLUMNS)
        _draw_answer(figure, 0.4 + pitch * column, top + 0.15 + 1.95 * row, answer)


def _draw_answer(figure, left, top, answer):
    axes = _add_axes(figure, left, top, 1.25, 1.25)
    small = max(answer.image.shape[:2]) < 100
    axes.imshow(answer.image, interpolation="nearest" if small else "antialiased")
    axes.set_anchor("SW")
    axes.axis("off")
    name = os.path.basename(answer.name)
    lines = (
        (f"predicted {answer.predicted}", dict(weight="bold", color=ORANGE)),
        (f"true {answer.true}", dict(color=INK)),
        (f"{100 * answer.probability:.1f} % {name}", dict(color=GREY)),
    )
    for index, (text, style) in enumerate(lines):
        y = top + 1.4 + 0.145 * index
        write_line(figure, left, y, text, size=7.5, width=1.32, **style)


def write_line(
    figure: Figure,
    left: float,
    top: float,
    text: str,
    *,
    width: float | None = None,
    keep_end: bool = False,
    **style,
) -> None:
    """One line of text, its baseline `top` inches from the top.

    Cut where it is wider than `width`: its end, or with `keep_end` its middle.
    """
    x, y = left / WIDTH, 1 - top / figure.get_figheight()
    # A file's name may be no text.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    style = {"color": INK, "parse_math": False, **style}
    drawn = figure.text(x, y, text, va="baseline", **style)
    if width:
        _cut(drawn, width * figure.dpi, keep_end)


def _cut(drawn, width, keep_end=False):
    """Leaves the longest beginning that fits, with an ellipsis, where all is wider.

    With `keep_end` half of what is left is the end.
    """
    full = drawn.get_text()

    def too_wide(text):
        drawn.set_text(text)
        return drawn.get_window_extent().width > width

    if too_wide(full):
        ends = [n // 2 * keep_end for n in range(len(full))]
        cuts = [
            f"{full[: n - end].rstrip()}…{full[len(full) - end :]}"
            for n, end in enumerate(ends)
        ]
        drawn.set_text(cuts[max(0, bisect_left(cuts, True, key=too_wide) - 1)])


def _add_axes(figure, left, top, width, height):
    """Axes placed in inches from the upper left corner of the figure."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def render(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write_figure(figure: Figure, path: str | os.PathLike, title: str) -> None:
    """Writes a PNG of 110 pixels an inch, with its title in it."""
    save(render(figure), path, Title=title)


def save(image: Image.Image, path: str | os.PathLike, **texts: str) -> None:
    """Writes a PNG with named texts in it; a reader never sees half a file."""
    path, info = Path(path), PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, "PNG", pnginfo=info, dpi=(DPI, DPI), optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
