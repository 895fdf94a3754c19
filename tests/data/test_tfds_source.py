"""What TFDS has prepared reads like the folders that it was made from."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sparx_jax.data import DataConfig, open_eval_set, open_source, prepare
from sparx_jax.data.tfds_source import TfdsSource
from sparx_jax.errors import UserError
from tests.data.shrunken_imagenet import (
    VAL_WNIDS,
    WNIDS,
    prepare_archives,
    write_archives,
    write_eval_sets,
    write_folders,
)

pytestmark = pytest.mark.slow  # TensorFlow takes seconds to import
ROOT = Path(__file__).parents[2]
CLASSES = sorted(set(VAL_WNIDS[:9]))


class Prepared(NamedTuple):
    folders: Path
    tfds: Path
    out: str
    errors: str


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same pictures as folders and as TFDS's own builders store them."""
    base = tmp_path_factory.mktemp("imagenet")
    folders, archives, root = base / "folders", base / "archives", base / "tfds"
    write_folders(folders, CLASSES, train_per_class=2, val=9)
    v2 = {WNIDS.index(wnid): wnid for wnid in CLASSES[:4]}
    write_eval_sets(folders, v2=v2, a=CLASSES[::3], r=CLASSES[1:3])
    (folders / "real.json").write_text(json.dumps([[n, n + 1] for n in range(9)]))
    write_archives(folders, archives)
    out, errors = prepare_archives(archives, root)
    shutil.copy(folders / "real.json", root)
    return Prepared(folders, root, out, errors)


def tfds(root, split="train", name="imagenet2012"):
    splits = dict(train_split=split, eval_split=split)
    return DataConfig(name="tfds", root=str(root), tfds_name=name, **splits)


def folder(root):
    return DataConfig(name="folder", root=str(root), eval_split="val")


def contents(source):
    """File name -> (class, bytes)."""
    return {
        os.path.basename(source.name(i)): (
            source.class_names[source[i]["label"]],
            source[i]["image"],
        )
        for i in range(len(source))
    }


@pytest.mark.parametrize("split, tfds_split", [("train",) * 2, ("eval", "validation")])
def test_images_names_and_classes_are_those_of_the_folders(prepared, split, tfds_split):
    ours = open_source(tfds(prepared.tfds, tfds_split), split)
    theirs = open_source(folder(prepared.folders), split)
    assert contents(ours) == contents(theirs)
    assert len(ours) == len(contents(ours))  # no name twice


def test_names_are_those_that_prepare_takes(prepared):
    named = open_source(tfds(prepared.tfds, name="imagenet2012:5.1.0"), "train")
    assert len(named) == len(open_source(tfds(prepared.tfds), "train"))
    with pytest.raises(UserError, match="imagenet_v2/matched-frequency or another"):
        open_source(tfds(prepared.tfds, name="imagenet_v2"), "train")


@pytest.mark.parametrize("split", ["train[:1%]", "train[5:3]", "all[:50%]", "x"])
def test_a_split_without_images_is_told(prepared, split):
    with pytest.raises(UserError, match="or nothing in it"):
        open_source(tfds(prepared.tfds, split), "train")


def test_labels_are_in_the_order_of_folders_and_of_published_checkpoints(prepared):
    names = open_source(tfds(prepared.tfds), "train").class_names
    assert names == tuple(sorted(names)) and len(names) == 1000
    # Tench, ostrich, cabbage butterfly and toilet tissue in everybody's numbering.
    places = [names.index(w) for w in ("n01440764", "n01518878", "n15075141")]
    assert places == [0, 9, 999]


def test_a_killed_preparation_is_done_anew_and_a_complete_one_is_left_alone(prepared):
    first, again = prepared.out.split("once more\n")
    assert "killed: exit code 9, left 1\n" in first
    assert "imagenet2012: 18 train, 9 validation images in" in first
    assert again.count("already complete in") == 4
    assert not list(prepared.tfds.rglob("incomplete*"))


def test_what_cannot_be_prepared_is_told_in_one_sentence(prepared):
    errors = [s for s in prepared.errors.splitlines() if s.startswith("error: ")]
    assert prepared.out.count(": exit code 78\n") == len(errors) == 3
    assert "cannot build 'imagenet2013'" in errors[0] and "catalog" in errors[0]
    assert "/nowhere is not a folder" in errors[1]
    assert "ILSVRC2012_img_train.tar" in errors[2] and "--archives" in errors[2]


def test_tensorflow_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        prepare.prepare("imagenet2012", str(tmp_path))


def test_two_preparations_of_a_set_do_not_meet(tmp_path):
    with (
        prepare._alone(tmp_path / "set/1.0.0"),
        pytest.raises(UserError, match=r"Another process is preparing .*set/1\.0\.0"),
        prepare._alone(tmp_path / "set/1.0.0"),
    ):
        pass


def test_reading_needs_no_tensorflow(prepared):
    code = (
        "import sys, importlib.util;"
        "from sparx_jax.data import DataConfig, open_source, eval_batches;"
        "assert importlib.util.find_spec('tensorflow');"  # it is there to be imported
        f"data = DataConfig(name='tfds', root={str(prepared.tfds)!r},"
        "  tfds_name='imagenet2012', image_size=32, crop_ratio=1.0,"
        "  max_bad_fraction=0.0);"
        "next(eval_batches(data, open_source(data, 'train'), batch_size=4));"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_parts_of_a_split_are_apart_and_their_records_are_named(prepared):
    splits = "train[:5]", "train[5:]"
    parts = [open_source(tfds(prepared.tfds, split), "train") for split in splits]
    whole = open_source(tfds(prepared.tfds), "train")
    names = [part.name(i) for part in parts for i in range(len(part))]
    assert [len(part) for part in parts] == [5, 13]
    assert names == [whole.name(i) for i in range(18)]
    assert "train.array_record-00000-of-00001[5]/n" in names[5]


def test_a_source_survives_pickling(prepared):
    source = open_source(tfds(prepared.tfds), "train")
    source[0]  # opens a file
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == contents(source)
    assert copy.labels.tolist() == [source[i]["label"] for i in range(18)]


@pytest.mark.parametrize("name", ["val", "real", "v2", "a", "r"])
def test_evaluation_sets_of_both_forms_agree(prepared, name):
    made = []
    for data in (tfds(prepared.tfds, "validation"), folder(prepared.folders)):
        val = open_source(data, "eval")
        if data.name == "folder":  # of all classes, though most have no picture here
            val.labels = np.array([WNIDS.index(val.class_names[x]) for x in val.labels])
            val.class_names = WNIDS
        source, classes, answers = open_eval_set(name, data, val)
        names = [os.path.basename(source.name(i)) for i in range(len(source))]
        right = answers and dict(zip(names, answers, strict=True))
        made.append((contents(source), right, classes))
    assert made[0][:2] == made[1][:2]
    np.testing.assert_array_equal(made[0][2], made[1][2])
    assert (made[0][2] is None) == (name not in "ar")


def damaged(prepared, tmp_path, name="imagenet2012"):
    shutil.copytree(prepared.tfds / name, tmp_path / name)
    return next((tmp_path / name).glob("*"))


def rejected(root, *words, split="train", name="imagenet2012"):
    with pytest.raises(UserError) as error:
        open_source(tfds(root, split, name), "train")
    for word in words:
        assert word in str(error.value)


def test_a_missing_set_or_split_is_told(prepared, tmp_path):
    rejected(tmp_path, "imagenet2012 in data.root=", "prepare")
    rejected(prepared.tfds, "'val'", "train, validation", split="val")
    rejected(prepared.tfds, "'train[:x]'", split="train[:x]")


def test_a_copy_of_a_version_is_none_and_a_damaged_one_is_told(prepared, tmp_path):
    folder = damaged(prepared, tmp_path)
    shutil.copytree(folder, folder.with_name(f"{folder.name}_old"))
    assert len(open_source(tfds(tmp_path), "train"))
    (folder / "dataset_info.json").write_text("{")
    rejected(tmp_path, str(folder), "cannot be read", "prepare it anew")


def test_a_missing_shard_is_named(prepared, tmp_path):
    folder = damaged(prepared, tmp_path)
    shard = next(folder.glob("*train*"))
    shard.unlink()
    rejected(tmp_path, str(shard), "missing")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("fileFormat", "tfrecord", ("stored as tfrecord", "another folder")),
        ("supervisedKeys", None, ("not for classification",)),
    ],
)
def test_other_kinds_of_sets_are_refused(prepared, tmp_path, key, value, words):
    path = damaged(prepared, tmp_path) / "dataset_info.json"
    info = json.loads(path.read_text())
    info[key] = value
    path.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))
    rejected(tmp_path, *words)


def test_a_damaged_record_is_named_though_it_cannot_be_read(prepared, tmp_path):
    folder = damaged(prepared, tmp_path)
    shard = next(folder.glob("*train*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    source = open_source(tfds(tmp_path), "train")
    bad = []
    for index in range(len(source)):
        try:
            source[index]
        except RuntimeError:
            bad.append(index)
    assert bad and all(source.name(i) == f"{shard}[{i}]" for i in bad)


def test_the_newest_version_is_read_and_not_the_last_by_name(tmp_path):
    for version in ("1.2.0", "1.10.0", "1.9.9"):
        (tmp_path / "set" / version).mkdir(parents=True)
        (tmp_path / "set" / version / "dataset_info.json").touch()
    found = TfdsSource._newest_version(None, tmp_path, "set")
    assert found.name == "1.10.0"
