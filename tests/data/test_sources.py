"""Laws of the sources: what they hold, in which order, and what they reject."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from sparx_jax.data import DataConfig, open_source
from sparx_jax.errors import UserError

DIGITS = DataConfig(name="digits", image_size=32)


def folder(root, **splits):
    return DataConfig(name="folder", root=str(root), **splits)


def write_images(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(root / path)


def labels(source):
    return [source[i]["label"] for i in range(len(source))]


def files(source, root):
    return [source.name(i).removeprefix(f"{root}/") for i in range(len(source))]


def test_digits_split_is_fixed_and_stratified():
    train, test = open_source(DIGITS, "train"), open_source(DIGITS, "eval")
    assert (len(train), len(test)) == (1437, 360)
    digest = hashlib.sha256(bytes(labels(train) + labels(test))).hexdigest()
    assert digest[:16] == "859da86469a170c7"
    shares = [np.bincount(labels(s)) / len(s) for s in (train, test)]
    np.testing.assert_allclose(*shares, atol=0.002)


def test_digits_are_grey_images_of_the_wanted_size():
    source = open_source(DIGITS, "eval")
    image = source[0]["image"]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all() and image.min() == 0 and image.max() > 240
    assert source.class_names == tuple("0123456789")
    assert source.name(12) == "digits test #12"


def test_digits_splits_share_no_image():
    train, test = open_source(DIGITS, "train"), open_source(DIGITS, "eval")
    seen = {train[i]["image"].tobytes() for i in range(len(train))}
    assert not any(test[i]["image"].tobytes() in seen for i in range(len(test)))


def test_folder_classes_and_files_are_sorted_by_name(tmp_path):
    write_images(tmp_path, "train/dog/b.PNG", "train/dog/a.jpeg", "train/cat/ü.webp")
    source = open_source(folder(tmp_path), "train")
    assert source.class_names == ("cat", "dog")
    assert files(source, tmp_path) == [
        "train/cat/ü.webp",
        "train/dog/a.jpeg",
        "train/dog/b.PNG",
    ]
    assert labels(source) == [0, 1, 1]
    assert source[1]["image"] == (tmp_path / "train/dog/a.jpeg").read_bytes()


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tmp_path):
    write_images(tmp_path, "train/cat/a.png")
    (tmp_path / "train/cat/b.png").symlink_to("gone.png")
    source = open_source(folder(tmp_path), "train")
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source[1]


def test_links_in_a_circle_are_told_and_pipes_are_no_images(tmp_path, caplog):
    """A pipe would never end."""
    write_images(tmp_path, "train/cat/a.png")
    (tmp_path / "train/cat/b.png").symlink_to("b.png")
    os.mkfifo(tmp_path / "train/cat/c.png")
    source = open_source(folder(tmp_path), "train")
    assert "c.png" in caplog.text
    assert files(source, tmp_path) == ["train/cat/a.png", "train/cat/b.png"]
    with pytest.raises(OSError, match="symbolic links"):
        source[1]


@pytest.mark.parametrize("target", ["dog", "gone"])
def test_a_class_does_not_vanish_with_what_it_is_linked_to(tmp_path, target):
    write_images(tmp_path, "train/cat/a.png")
    (tmp_path / "train/dog").symlink_to(target)
    assert_rejected(folder(tmp_path), "train", "train/dog is a link to nowhere")


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    write_images(tmp_path, "train/cat/a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("sparx_jax.data.sources.os.scandir", refuse)
    with pytest.raises(UserError, match=r"train cannot be read \(Permission denied\)"):
        open_source(folder(tmp_path), "train")


def test_hidden_files_are_skipped_and_others_are_named(tmp_path, caplog):
    write_images(tmp_path, "train/cat/a.png", "train/cat/.b.png", "train/.old/c.png")
    write_images(tmp_path, "train/d.png")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    assert files(open_source(folder(tmp_path), "train"), tmp_path) == [
        "train/cat/a.png"
    ]
    names = f"{tmp_path}/train/cat/notes.txt, {tmp_path}/train/d.png"
    assert f"2 such as {names}" in caplog.text


def test_eval_split_uses_the_classes_of_the_train_split(tmp_path):
    write_images(tmp_path, "fit/cat/a.png", "fit/dog/a.png", "val/dog/b.png")
    data = folder(tmp_path, train_split="fit", eval_split="val")
    source = open_source(data, "eval")
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [1]


def assert_rejected(data, split, *words):
    with pytest.raises(UserError) as error:
        open_source(data, split)
    for word in words:
        assert word in str(error.value)


def test_class_unknown_to_the_train_split_is_named(tmp_path):
    write_images(tmp_path, "train/cat/a.png", "test/cow/b.png")
    assert_rejected(folder(tmp_path), "eval", "test/cow", "'train'")


def test_empty_class_folder_is_named(tmp_path):
    write_images(tmp_path, "train/cat/a.png")
    (tmp_path / "train/cow").mkdir()
    assert_rejected(folder(tmp_path), "train", str(tmp_path / "train/cow"), "no image")


def test_missing_root_is_named(tmp_path):
    assert_rejected(folder(tmp_path / "nowhere"), "train", "nowhere", "data.root")


def test_missing_split_lists_the_folders_that_are_there(tmp_path):
    write_images(tmp_path, "training/cat/a.png", "val/cat/a.png")
    assert_rejected(folder(tmp_path), "train", "'train'", "training, val")


def test_split_without_class_folders_is_rejected(tmp_path):
    write_images(tmp_path, "train/a.png")
    assert_rejected(folder(tmp_path), "train", "no class folders")
