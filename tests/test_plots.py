"""The pictures say what the tables, the history and the answers say, legibly."""

import os
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from sparx_jax import plots
from sparx_jax.models.registry import list_models, model_config
from sparx_jax.plots import Arc, WrongAnswer, write_line
from sparx_jax.summary import select

README_FIGURE = Path(__file__).parents[1] / "docs/wiring.png"
README_CONFIGS = select("sparx_mamba_[tsb]")

DENSE = dict(stride=(1, 1, 1, 1), start=(0, 0, 0, 0), window=(None,) * 4)
CONFIGS = {name: model_config(name) for name in list_models()} | {
    "none": model_config("sparx_mamba_t", connector={"mode": "none"}),
    "dense": model_config("sparx_mamba_b", connector=DENSE),
    "last_only": model_config("sparx_mamba_b", connector={"stride": (0, 0, 30, 0)}),
    "deep": model_config("sparx_mamba_t", depths=(1, 3, 60, 1), connector=DENSE),
}
LONG = [
    "American Staffordshire terrier, Staffordshire terrier, pit bull terrier",
    "W" * 300,
    "$\\frac$ in two\nlines",
]


def make_history(*, steps=4000, every=100, only=None):
    history = []
    for step in range(every, steps + 1, every):
        record = dict(step=step, epoch=step / 100, train_loss=2 + np.cos(step))
        record.update(learning_rate=1e-5 * step / steps, images_per_s=12345.0 + step)
        if step % 500 == 0:
            percent = 90 * (1 - np.exp(-step / 1000))
            record.update(eval_loss=1 + 100 / step, top1=percent)
            record.update(raw_eval_loss=1.1 + 100 / step, raw_top1=percent - 1)
        history.append({k: v for k, v in record.items() if not only or k in only})
    return history


def make_wrong(count, names=tuple("0123456789")):
    random = np.random.default_rng(0)
    return [
        WrongAnswer(
            image=random.integers(
                0, 256, (1 + 37 * i % 40, 1 + 53 * i % 110, 3), dtype=np.uint8
            ),
            predicted=names[i % len(names)],
            true=names[(i + 1) % len(names)],
            probability=(i * 7 % 41 + 1) / 42,
            name=f"validation/{i:08d}.png",
        )
        for i in range(count)
    ]


NAN_FROM_2000 = [
    record | {"train_loss": float("nan")} if record["step"] >= 2000 else record
    for record in make_history()
]
REPORTS = {
    "usual": (make_history(), make_wrong(6)),
    "many_wrong": (make_history(), make_wrong(16)),
    "long_names": (NAN_FROM_2000, make_wrong(16, LONG)),
    "empty": ([], []),
    "one_record": ([dict(step=7, top1=100.0, train_loss=0.1)], make_wrong(1)),
    "train_only": (make_history(only=["step", "train_loss"]), []),
    "not_finite": ([dict(step=s, train_loss=np.nan, top1=None) for s in (1, 2)], []),
}


@cache
def make_report(name):
    history, wrong = REPORTS[name]
    options = dict(model=CONFIGS["sparx_mamba_nano"], title=f"{name} $1 a_b " * 30)
    return plots.report_figure(history=history, wrong=wrong, **options)


def report_of(history):
    options = dict(model=CONFIGS["sparx_mamba_nano"], title="a run")
    return plots.report_figure(history=history, wrong=[], **options)


def wiring_axes(config):
    figure = Figure(figsize=(12, 2.7), dpi=110)
    axes = figure.add_axes((0.02, 0.05, 0.96, 0.82))
    plots.draw_wiring(axes, config, "a title")
    return axes


def drawn_texts(figure):
    """Box in pixels of every text that a reader sees."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not axes.axison or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and text not in hidden
    ]


def assert_legible(figure):
    boxes = drawn_texts(figure)
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0
        inside &= box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text!r} leaves the picture"
    for (text, box), (other, other_box) in combinations(boxes, 2):
        overlap = min(box.x1, other_box.x1) > max(box.x0, other_box.x0)
        overlap &= min(box.y1, other_box.y1) > max(box.y0, other_box.y0)
        assert not overlap, f"{text!r} lies on {other!r}"


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def wrong_caption_texts(figure, word):
    return [t.get_text() for t in figure.texts if t.get_text().startswith(word)]


@pytest.mark.parametrize("name", CONFIGS)
def test_arcs_are_the_wiring_table(name):
    config, arcs = CONFIGS[name], plots.wiring_arcs(CONFIGS[name])
    for stage, depth in enumerate(config.depths):
        sources = [
            tuple(a.source for a in arcs if (a.stage, a.target) == (stage, layer))
            for layer in range(depth)
        ]
        assert sources == [layer.sources for layer in config.wiring(stage)]


def test_arcs_of_a_known_stage():
    arcs = plots.wiring_arcs(CONFIGS["sparx_mamba_t"])
    assert [arc[1:] for arc in arcs if arc.stage == 2 and arc.target in (0, 4)] == [
        (-1, 0, "inner"),
        (3, 4, "inner"),
        (0, 4, "cross"),
        (2, 4, "cross"),
    ]


@pytest.mark.parametrize("name", ["sparx_mamba_t", "sparx_mamba_b", "none", "dense"])
def test_every_arc_is_drawn_from_its_source_to_its_target(name):
    """The ends are where the numbered layers and the stage inputs stand."""
    config, axes = CONFIGS[name], wiring_axes(CONFIGS[name])
    inputs = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "s"]
    numbered = iter([t for t in axes.texts if t.get_text().isdigit()])
    place = {}
    for stage, depth in enumerate(config.depths):
        place[round(inputs[stage], 6)] = (stage, -1)
        for layer in range(depth):
            text = next(numbered)
            assert text.get_text() == str(layer)
            place[round(text.get_position()[0], 6)] = (stage, layer)
    drawn = []
    for collection in axes.collections:
        if not isinstance(collection, LineCollection):
            continue
        for curve in collection.get_segments():
            (stage, source), (same_stage, target) = (
                place[round(float(x), 6)] for x in curve[[0, -1], 0]
            )
            assert stage == same_stage
            kind = "cross" if curve[:, 1].max() > 1e-6 else "inner"
            colour = to_hex(collection.get_color()[0]).lower()
            assert colour == plots.ARC_COLOURS[kind].lower()
            drawn.append(Arc(stage, source, target, kind))
    assert sorted(drawn) == sorted(plots.wiring_arcs(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_wiring_is_legible_and_counts_its_connections(name):
    config, axes = CONFIGS[name], wiring_axes(CONFIGS[name])
    assert_legible(axes.figure)
    labels = [t.get_text() for t in axes.texts if "connection" in t.get_text()]
    for stage, label in enumerate(labels):
        layers, width, connections = (line.split() for line in label.split("\n"))
        assert int(layers[0]) == config.depths[stage]
        assert int(width[1]) == config.dims[stage]
        reads = sum(len(layer.sources) for layer in config.wiring(stage))
        assert int(connections[0]) == reads


def test_readme_figure_shows_the_current_wiring():
    """If this fails, renew it with the command that stands below it in the README."""
    with Image.open(README_FIGURE) as image:
        assert image.text == {"Wiring": plots.wiring_text(README_CONFIGS)}
    assert README_FIGURE.stat().st_size < 150_000


def test_wiring_text_is_the_table():
    lines = plots.wiring_text({"T, changed": CONFIGS["sparx_mamba_t"]}).split("\n")
    assert len(lines) == 4
    expected = "T, changed stage 3, width 320: (-1) () (1,0) () (3,0,2) () (5,0,2,4)"
    assert lines[2] == expected


def test_the_same_wiring_gives_the_same_file(tmp_path):
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path in [*paths, paths[0]]:
        plots.write_wiring(path, {"nano": CONFIGS["sparx_mamba_nano"]})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("name", REPORTS)
def test_report_is_legible(name):
    assert_legible(make_report(name))


def test_report_captions_the_wrong_answers_in_their_order():
    wrong, figure = make_wrong(16), make_report("many_wrong")
    predicted = [f"predicted {answer.predicted}" for answer in wrong]
    assert wrong_caption_texts(figure, "predicted") == predicted
    assert wrong_caption_texts(figure, "true") == [f"true {a.true}" for a in wrong]
    for answer in wrong:
        file = Path(answer.name).name
        assert f"{100 * answer.probability:.1f} % {file}" in texts_of(figure)
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for picture, answer in zip(pictures, wrong, strict=True):
        np.testing.assert_array_equal(picture, answer.image)


def test_report_cuts_long_names():
    captions = wrong_caption_texts(make_report("long_names"), "predicted")
    assert captions[0].endswith("…") or len(captions[0]) < 30
    assert any(caption.startswith("predicted American") for caption in captions)
    assert all(len(caption) < 40 for caption in captions)


def test_a_name_that_is_no_text_is_drawn(tmp_path):
    figure = Figure()
    FigureCanvasAgg(figure)
    write_line(figure, 1, 1, os.fsdecode(b"caf\xe9.jpg"), width=1)
    figure.savefig(tmp_path / "picture.png")
    assert texts_of(figure)[0].startswith("caf?")


def test_report_without_wrong_answers_says_so():
    assert any("None among" in text for text in texts_of(make_report("train_only")))
    assert not any("None among" in text for text in texts_of(make_report("usual")))


def test_report_marks_the_best_evaluation():
    top1 = {10: 50.0, 20: 81.25, 30: float("nan"), 40: 80.0}
    history = [dict(step=step, top1=value) for step, value in top1.items()]
    figure = report_of(history)
    assert "best 81.25 % at step 20" in texts_of(figure)
    stars = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "*"
    ]
    assert stars == [(20, 81.25)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_report_tells_where_a_loss_stopped_being_finite(bad):
    losses = {10: 3.0, 20: bad, 30: bad}
    history = [dict(step=step, train_loss=loss) for step, loss in losses.items()]
    assert "not finite at step 20" in texts_of(report_of(history))
    assert not any("not finite" in text for text in texts_of(make_report("usual")))


def test_labels_of_the_axes_are_their_values():
    """Also those of a tiny learning rate, which matplotlib would label as multiples."""
    figure = make_report("usual")
    plots.render(figure)  # ticks have no labels before
    for axes in (axes for axes in figure.axes if axes.axison):
        for tick in axes.yaxis.get_major_ticks():
            label = (
                tick.label1.get_text().replace(",", "").replace("\N{MINUS SIGN}", "-")
            )
            assert float(label) == pytest.approx(tick.get_loc(), rel=1e-5, abs=1e-12)


def test_series_sorts_by_step_and_the_last_record_counts():
    history = [dict(step=20, top1=1.0), dict(step=10, top1=2.0), dict(step=30)]
    history.append(dict(step=20, top1=3.0))
    steps, values = plots.series(history, "top1")
    assert steps.tolist() == [10, 20]
    assert values.tolist() == [2, 3]


@pytest.mark.parametrize(("count", "inches"), [(0, 8.45), (16, 11.85)])
def test_written_report_is_a_png_with_its_title(tmp_path, count, inches):
    path = tmp_path / "report.png"
    options = dict(history=make_history(), model=CONFIGS["sparx_mamba_nano"])
    options |= dict(wrong=make_wrong(count), title="Größe $1")
    plots.write_figure(plots.report_figure(**options), path, options["title"])
    with Image.open(path) as image:
        image.load()
        assert image.size == (1320, int(inches * 110))
        assert image.text == {"Title": "Größe $1"}
        colours = image.getcolors(maxcolors=2**24)
    assert len(colours) > 20
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "wiring.png"
    path.write_bytes(b"old")

    def fail(image, target, *args, **kwargs):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.write_wiring(path, {"nano": CONFIGS["sparx_mamba_nano"]})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
