"""ImageNet's recipe from the archives to the tables, on a shrunken ImageNet."""

import json
import math
import re

import pytest
from PIL import Image

from tests.data.shrunken_imagenet import (
    VAL_WNIDS,
    WNIDS,
    prepare_archives,
    write_archives,
    write_eval_sets,
    write_folders,
)
from tests.test_cli import start
from tests.training.jobs import Job

VAL = 250
RECIPE = "--config=configs/imagenet.py:sparx_mamba_t"
TINY = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(8,8,12,16)",
    "--config.model.connector.stride=(0,0,1,0)",
    "--config.model.connector.start=(0,0,0,0)",
    "--config.data.image_size=32",
    "--config.data.workers=1",
    "--config.batch_size=100",
    "--config.eval_batch_size=100",
    "--config.train_epochs=1",
    "--config.cooldown_epochs=0",
    "--config.optimizer.warmup_epochs=0.2",
    "--config.log_every_steps=5",
    "--config.checkpoint_every_steps=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1,000 classes with one training picture each, as folders and as archives."""
    base = tmp_path_factory.mktemp("imagenet")
    folders, archives = base / "folders", base / "archives"
    write_folders(folders, WNIDS, train_per_class=1, val=VAL)
    write_eval_sets(
        folders, v2=dict(enumerate(WNIDS[:30])), a=WNIDS[::20], r=WNIDS[1::20]
    )
    real = [[] if i % 5 == 0 else [i, 7] for i in range(VAL)]
    (folders / "real.json").write_text(json.dumps(real))
    write_archives(folders, archives)
    return folders, archives


@pytest.mark.slow
def test_an_epoch_from_archives_over_a_kill_and_the_tables_from_folders(data, tmp_path):
    folders, archives = data
    prepare_archives(archives, tmp_path / "tfds")
    run = tmp_path / "run"
    from_tfds = [
        "--config.data.name=tfds",
        f"--config.data.root={tmp_path}/tfds",
        "--config.data.eval_split=validation",
    ]

    def trainers():
        return Job(run, *TINY, *from_tfds, config=RECIPE, processes=2)

    killed = trainers()
    killed.wait_for("step 5/10")
    killed.kill()
    assert "1,000 images of 1000 classes" in killed.log()
    resumed = trainers()
    assert resumed.wait() == [0, 0], resumed.log()
    # The save after step 4 had ended, or that after step 2.
    assert re.search("10 steps; going on after step [24]", resumed.log())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    *windows, last = map(json.loads, lines)
    assert [window["step"] for window in windows] == [5, 10]
    assert (last["step"], last["epoch"]) == (10, 1.0)
    # Nothing is learned in 10 steps, so that the loss is that of a guess.
    losses = windows[0]["train_loss"], last["eval_loss"], last["raw_eval_loss"]
    assert losses == pytest.approx([math.log(1000)] * 3, abs=0.3)

    evaluated = start(
        *("eval", RECIPE, *TINY, f"--workdir={run}"),
        f"--config.data.root={folders}",
        *("--datasets=val,real,v2,a,r", "--resolutions=32,64"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads(evaluated.stdout.splitlines()[-1])
    results = summary["results"]
    assert [(r["dataset"], r["resolution"], r["examples"]) for r in results] == [
        (name, size, count)
        for size in (32, 64)
        for name, count in (
            ("val", VAL), ("real", VAL * 4 // 5), ("v2", 30), ("a", 100), ("r", 100),
        )
    ]  # fmt: skip
    # The same pictures in another order, and from folders.
    assert summary["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    assert summary["top1"] == pytest.approx(last["top1"])
    # Among 50 classes a guess is better off than among 1,000.
    by_name = {r["dataset"]: r for r in results if r["resolution"] == 32}
    assert by_name["a"]["loss"] == pytest.approx(math.log(50), abs=0.3)
    assert by_name["v2"]["loss"] == pytest.approx(math.log(1000), abs=0.3)
    assert json.loads((run / "results.jsonl").read_text()) == summary
    table = (run / "results.md").read_text()
    assert table.count("\n| ") == 7 and table.strip() in evaluated.stdout.replace(
        ":\n|", ":\n\n|"
    )
    with Image.open(run / "results.png") as picture:
        assert "ema weights" in picture.text["Title"]


def test_the_helper_makes_official_names():
    assert len(WNIDS) == len(set(WNIDS)) == 1000 and len(VAL_WNIDS) == 50_000
    assert set(VAL_WNIDS) == set(WNIDS)
