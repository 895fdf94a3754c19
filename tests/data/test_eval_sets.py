"""ImageNet's evaluation sets: labels are those of the network, and what is refused."""

import json
import os

import numpy as np
import pytest

from sparx_jax.data import EVAL_SETS, eval_sets, open_eval_set, open_source
from sparx_jax.data.config import DataConfig
from sparx_jax.errors import UserError
from tests.data.shrunken_imagenet import (
    VAL_WNIDS,
    val_name,
    write_eval_sets,
    write_folders,
    write_picture,
)

CLASSES = sorted(set(VAL_WNIDS[:7]))
# Label -> class; "10" is sorted before "2" as a folder.
V2 = dict(enumerate(CLASSES[:4]))
REAL = [[0], [], [1, 3], [2], [4], [5], [0, 1, 2]]


@pytest.fixture
def data(tmp_path):
    write_folders(tmp_path, CLASSES, train_per_class=1, val=7)
    write_eval_sets(tmp_path, v2=V2, a=CLASSES[::3], r=CLASSES[1:3])
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    return DataConfig(name="folder", root=str(tmp_path), eval_split="val")


def opened(name, data):
    return open_eval_set(name, data, open_source(data, "eval"))


def classes(source):
    """File name -> class."""
    return {
        os.path.basename(source.name(i)): source.class_names[source[i]["label"]]
        for i in range(len(source))
    }


def test_labels_number_the_classes_of_the_evaluation_split(data):
    for name, wnids in (("v2", CLASSES[:4]), ("a", CLASSES[::3]), ("r", CLASSES[1:3])):
        source = opened(name, data).source
        assert source.class_names == tuple(CLASSES)
        assert set(classes(source).values()) == set(wnids)
        assert all(wnid in file for file, wnid in classes(source).items())
        labels = [source[i]["label"] for i in range(len(source))]
        np.testing.assert_array_equal(source.labels, labels)


def test_folders_of_v2_are_labels_whatever_their_order(tmp_path):
    many = [f"n{i:08}" for i in range(12)]
    for label, name in enumerate(many):
        write_picture(tmp_path / "val" / name / "0.JPEG", VAL_WNIDS[0])
        folder = "imagenetv2-matched-frequency-format-val"
        write_picture(tmp_path / folder / str(label) / f"{label}.jpg", VAL_WNIDS[0])
    splits = dict(train_split="val", eval_split="val")
    data = DataConfig(name="folder", root=str(tmp_path), **splits)
    source = opened("v2", data).source
    assert classes(source) == {f"{i}.jpg": name for i, name in enumerate(many)}


def test_a_and_r_are_restricted_to_their_classes_and_the_others_are_not(data):
    chosen = {name: opened(name, data).classes for name in EVAL_SETS}
    assert [CLASSES[i] for i in chosen["a"]] == CLASSES[::3]
    assert [CLASSES[i] for i in chosen["r"]] == CLASSES[1:3]
    assert chosen["val"] is chosen["real"] is chosen["v2"] is None


def test_real_labels_follow_the_official_file_names(data):
    source, _, answers = opened("real", data)
    assert len(answers) == len(source) == 7
    for index, right in enumerate(answers):
        number = 1 + REAL.index(right)
        assert os.path.basename(source.name(index)) == val_name(number)


def rejected(name, data, *words):
    with pytest.raises(UserError) as error:
        opened(name, data)
    for word in words:
        assert word in str(error.value)


def test_unknown_and_missing_sets_are_told(data, tmp_path):
    rejected("v3", data, "'v3'", "val, real, v2, a, r")
    (tmp_path / "imagenet-a").rename(tmp_path / "A")
    rejected("a", data, "imagenet-a", "prepare imagenet_a")
    (tmp_path / "real.json").unlink()
    rejected("real", data, "real.json is missing", "google-research")


def test_sets_of_other_classes_are_told(data, tmp_path):
    write_picture(tmp_path / "imagenet-r/n00000001/0.jpg", VAL_WNIDS[0])
    rejected("r", data, "'n00000001'", "7 classes")
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    write_picture(folder / "7/0.jpg", VAL_WNIDS[0])
    rejected("v2", data, "'7'", "7 classes")


def test_real_labels_of_other_images_are_told(data, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(REAL[:6]))
    rejected("real", data, val_name(7), "to 00000006")
    (tmp_path / "real.json").write_text(json.dumps([[]] * 7))
    rejected("real", data, "no label for any of the 7")
    write_picture(tmp_path / "val" / CLASSES[0] / "mine.JPEG", CLASSES[0])
    rejected("real", data, "mine.JPEG has no entry")


@pytest.mark.parametrize(
    "content",
    ["null", "[0, 1]", '[["a"]]', "[[7]]", "[[-1]]", '{"0": [0]}', "[" * 10**5],
)
def test_real_labels_that_are_none_of_the_classes_are_told(data, tmp_path, content):
    """Also those of all of ImageNet, where the classes are some of it."""
    (tmp_path / "real.json").write_text(content)
    rejected("real", data, "real.json")


def test_folders_are_numbers_only_where_none_is_a_class():
    class Source:
        class_names, labels = ("0", "1", "2"), np.array([0, 1, 2])

    def numbers(*class_names):
        return eval_sets._Renumbered(Source(), class_names).labels.tolist()

    assert numbers("n0", "n1", "n2") == [0, 1, 2]
    assert numbers("2", "1", "0") == [2, 1, 0]
    with pytest.raises(UserError, match="the class '0'"):
        source = Source()
        source.name = lambda index: "0/x.jpg"
        eval_sets._Renumbered(source, ("1", "2", "3"))


def test_an_image_without_label_stays_without():
    class Unlabelled:
        class_names, labels = ("n2", "n1"), np.array([0, -1])

        def __getitem__(self, index):
            return {"image": b"", "label": int(self.labels[index])}

    source = eval_sets._Renumbered(Unlabelled(), ("n1", "n2"))
    assert [source[i]["label"] for i in (0, 1)] == [1, -1]
