"""Tables of evaluation sets agree with counts by hand from the network's logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax

from sparx_jax import models, plots_results
from sparx_jax.data import decode_image, eval_transform, open_eval_set
from sparx_jax.data.sources import FolderSource
from sparx_jax.training import evaluate
from sparx_jax.training import state as states
from sparx_jax.training.evaluate import (
    Evaluation,
    evaluate_sets,
    restrict,
    wrong_answers,
)
from sparx_jax.training.results import Result, table, write_results
from sparx_jax.training.step import normalize
from tests.data.shrunken_imagenet import VAL_WNIDS, write_eval_sets, write_folders
from tests.test_plots import assert_legible

CLASSES = sorted(dict.fromkeys(VAL_WNIDS[:10]))
A, R = [1, 4, 7, 8], [0, 9]
REAL = [[2], [], [9, 3, 1], list(range(10)), [0, 1, 2, 4], [], *[[i] for i in range(4)]]


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The table of a network with random weights, its sets, and all logits by set."""
    root = tmp_path_factory.mktemp("sets")
    assert len(CLASSES) == 10
    write_folders(root, CLASSES, train_per_class=1, val=10)
    a, r = ([CLASSES[i] for i in numbers] for numbers in (A, R))
    write_eval_sets(root, v2=dict(enumerate(CLASSES)), a=a, r=r)
    (root / "real.json").write_text(json.dumps(REAL))
    config, mesh = run.config, run.setup.mesh
    data = dataclasses.replace(config.data, root=str(root))
    val = FolderSource(str(root), "val")
    sets = {
        name: open_eval_set(name, data, val) for name in ("val", "real", "v2", "a", "r")
    }
    weights = _spread(run.init().weights)
    results, evaluation = evaluate_sets(run.eval_step, weights, config, sets, mesh)
    network, _ = states.split(models.build(config.model, config.seed))

    @jax.jit
    def forward(images):
        model = states.merge(network.eval, weights)
        return model(normalize(images, config.data.mean, config.data.std))

    transform, logits = eval_transform(config.data), {}
    for name, (source, _, _) in sets.items():
        images = [
            transform(decode_image(source[i]["image"])) for i in range(len(source))
        ]
        padding = [images[0]] * (20 - len(images))  # one shape, compiled once
        logits[name] = np.asarray(forward(np.stack(images + padding)))[: len(images)]
    return {r.dataset: r for r in results}, evaluation, sets, logits


def _spread(weights):
    """With a larger head, or all pictures would get the same answer."""
    rng = np.random.default_rng(1)
    kernel = weights.params["head.kernel"]
    kernel = jax.device_put(rng.normal(size=kernel.shape).astype(np.float32))
    return weights._replace(params=weights.params | {"head.kernel": kernel})


def by_hand(source, logits):
    """Loss, top-1 and top-5 in percent; the answers."""
    labels = np.array([source[i]["label"] for i in range(len(source))])
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[:, None]
    loss = -np.mean(log_softmax(logits, axis=1)[np.arange(len(labels)), labels])
    top1, top5 = 100 * hits[:, 0].mean(), 100 * hits[:, :5].any(1).mean()
    return loss, top1, top5, order[:, 0]


@pytest.mark.parametrize("name", ["val", "v2"])
def test_unrestricted_sets_are_counted_over_all_classes(evaluated, name):
    results, _, sets, logits = evaluated
    loss, top1, top5, _ = by_hand(sets[name].source, logits[name])
    result = results[name]
    assert (result.top1, result.top5) == pytest.approx((top1, top5))
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert (result.resolution, result.examples) == (32, 10)


@pytest.mark.parametrize("name, classes", [("a", A), ("r", R)])
def test_a_and_r_are_counted_over_their_classes(evaluated, name, classes):
    results, _, sets, logits = evaluated
    others = np.setdiff1d(range(10), classes)
    kept = logits[name].copy()
    kept[:, others] = -1e30
    loss, top1, top5, answers = by_hand(sets[name].source, kept)
    *_, free = by_hand(sets[name].source, logits[name])
    assert set(answers) <= set(classes) and not set(free) <= set(classes)
    result = results[name]
    assert (result.top1, result.top5) == pytest.approx((top1, top5))
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.examples == 2 * len(classes)


def test_real_counts_any_of_its_labels_and_leaves_out_images_without(evaluated):
    results, evaluation, sets, logits = evaluated
    answers = np.argmax(logits["val"], 1)
    right = [
        answer in labels
        for answer, labels in zip(answers, sets["real"].answers, strict=True)
        if labels
    ]
    assert results["real"].top1 == pytest.approx(100 * np.mean(right))
    assert results["real"].examples == 8 and 0 < sum(right) < 8
    assert results["real"].top5 is results["real"].loss is None
    np.testing.assert_array_equal(evaluation.predicted, answers)


def test_a_restriction_changes_no_bit_of_the_logits_that_are_left(run):
    weights = run.init().weights
    bias = np.asarray(restrict(weights, np.array(A)).params["head.bias"])
    np.testing.assert_array_equal(bias[A], weights.params["head.bias"][np.array(A)])
    assert (np.delete(bias, A) < -1e8).all()


RESULTS = [
    Result("val", 224, 0.9, 83.456, 96.0, 50000),
    Result("real", 224, None, 88.0, None, 46837),
    Result("val", 384, 0.8, 84.0, 96.5, 50000),
    Result("real", 384, None, 88.5, None, 46837),
]


def test_the_table_has_a_row_for_a_set_and_a_column_for_a_resolution():
    assert table(RESULTS).splitlines() == [
        "| top-1 % | images | 224 px | 384 px |",
        "| --- | ---: | ---: | ---: |",
        "| val | 50,000 | 83.46 | 84.00 |",
        "| real | 46,837 | 88.00 | 88.50 |",
    ]


def test_results_are_written(tmp_path):
    write_results(str(tmp_path), "a title", RESULTS[:2], {"top1": 1.5})
    names = ["results.jsonl", "results.md"]  # one resolution needs no picture
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for _ in range(2):  # repeated, it says nothing new
        write_results(str(tmp_path), "a title", RESULTS, {"top1": 2.5})
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"top1": 1.5}, {"top1": 2.5}]
    tables = (tmp_path / "results.md").read_text()
    assert tables.count("a title:") == 2
    assert table(RESULTS[:2]) in tables and table(RESULTS) in tables
    write_results(str(tmp_path), "another", RESULTS[:1], {})  # leaves the picture
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.text == {"Title": "a title"} and picture.width == 1320


def test_the_image_of_resolutions_shows_all_values_legibly():
    sizes = (224, 384, 512, 640, 768, 1024)
    rng = np.random.default_rng(0)
    curves = {
        name: dict(zip(sizes, rng.uniform(0, 100, 6), strict=True))
        for name in ("val", "real", "v2", "a", "r")
    }
    figure = plots_results.resolutions_figure(curves, "a title " * 40)
    assert_legible(figure)
    drawn = {
        line.get_label(): dict(zip(*line.get_data(), strict=True))
        for line in figure.axes[0].lines
    }
    assert drawn == curves


def test_real_leaves_out_what_cannot_be_read():
    label, predicted = np.array([-1, 0, 1]), np.array([3, 0, 2])
    evaluation = Evaluation(0.0, 0.0, 0.0, 2, 1, label, predicted, np.ones(3))
    row = Result("real", 32, *evaluation[:5])
    found = evaluate._by_answers(row, evaluation, [[3], [0], [1]])
    assert (found.examples, found.top1) == (2, 50.0)


def test_the_most_confident_mistakes_are_shown_first(run):
    source, data = run.setup.eval_source, run.config.data
    label = np.array([source[i]["label"] for i in range(len(source))])
    probability = np.linspace(0.1, 0.9, len(label))
    evaluation = Evaluation(0.0, 0.0, 0.0, 360, 0, label, (label + 1) % 10, probability)
    shown = wrong_answers(evaluation, source, data, 3)
    assert [w.name for w in shown] == [f"digits test #{i}" for i in (359, 358, 357)]
