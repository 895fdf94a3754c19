"""Random-access sources of labelled images."""

import os
from typing import Any, Literal, Protocol

import numpy as np
from absl import logging
from PIL import Image

from sparx_jax.data.config import DataConfig
from sparx_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Source(Protocol):
    """Labelled images by index; picklable, so that worker processes can read it.

    `source[i]` is `{"image": ..., "label": int}`, the image either encoded bytes or a
    uint8 array, (height, width, 3) or grey or RGBA. The label, from 0, indexes
    `class_names`; `name(i)` is what messages and reports call the image: its path, or
    "digits test #12".
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def name(self, index: int) -> str: ...


def open_source(data: DataConfig, split: Literal["train", "eval"]) -> Source:
    """Opens the part of the data set `data.name` that is for training or evaluation.

    Raises:
      UserError: `data.root` does not hold the data set or that part of it.
    """
    if data.name == "digits":
        return DigitsSource(split, data.image_size)
    name = data.train_split if split == "train" else data.eval_split
    if data.name == "folder":
        return FolderSource(data.root, name, data.train_split)
    # Imported here because it takes seconds that the others need not spend.
    from sparx_jax.data.tfds_source import TfdsSource

    return TfdsSource(data.root, data.tfds_name, name)


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to `image_size`.

    A fixed stratified split: 1,437 images to train on, 360 to test on. Data: Alpaydin
    and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str, image_size: int):
        # Imported here because it takes a second that folder datasets need not spend.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(1797), test_size=360, stratify=digits.target, random_state=0
        )
        self._split, rows = ("train", train) if split == "train" else ("test", test)
        self._labels = digits.target[rows]
        greys = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # from 0..16
        size = (image_size, image_size)
        self._images = np.stack([Image.fromarray(grey).resize(size) for grey in greys])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.repeat(self._images[index, ..., None], 3, axis=-1)
        return {"image": image, "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        return f"digits {self._split} #{index}"


class FolderSource:
    """Image files in `root/split/class/`; hidden files and folders are skipped.

    Other files, images outside class folders and folders inside them are left out and
    logged.

    The classes, sorted by name, are the folders of `train_split`, whichever `split`
    this reads, so that labels agree.

    Raises:
      UserError: a folder is missing or a link to nowhere, a class folder holds no
        image, or `split` has a class that `train_split` has not.
    """

    def __init__(self, root: str, split: str, train_split: str = "train"):
        if not os.path.isdir(root):
            raise UserError(
                f"data.root is {root!r}, which is not a folder: set it to the folder "
                f"that holds {train_split}/<class>/."
            )
        self._path = os.path.join(root, split)
        self.class_names = tuple(_class_folders(root, train_split))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        files, labels = [], []
        names = _class_folders(root, split)
        others = {entry.path for entry in _entries(self._path)}
        for name in names:
            path = os.path.join(self._path, name)
            others.remove(path)
            if name not in label_of:
                raise UserError(
                    f"{path} is of a class that {train_split!r} does not have: rename "
                    "it or add the class there."
                )
            class_files, no_images = _image_files(path)
            others |= {os.path.join(path, other) for other in no_images}
            files += map(os.fsencode, class_files)
            labels += [label_of[name]] * len(class_files)
        if others:
            kinds, some = ", ".join(IMAGE_SUFFIXES), ", ".join(sorted(others)[:3])
            logging.error(
                "left out, as not in a class folder or not of %s: %d such as %s",
                kinds, len(others), some,
            )  # fmt: skip
        # Fixed-width bytes: ImageNet's 1.28 million names become one array of 36 MB.
        self._files, self.labels = np.array(files), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb") as file:
            return {"image": file.read(), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        class_name = self.class_names[self.labels[index]]
        return os.path.join(self._path, class_name, os.fsdecode(self._files[index]))


def _entries(path: str) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): fix its permissions."
        ) from error


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if os.path.isdir(entry.path))


def _class_folders(root: str, split: str) -> list[str]:
    path = os.path.join(root, split)
    if not os.path.isdir(path):
        there = ", ".join(_folders(root)[:10]) or "none"
        raise UserError(
            f"{root} has no folder {split!r} (its folders: {there}): rename one or set "
            "data.train_split and data.eval_split."
        )
    for entry in _entries(path):
        if not os.path.exists(entry.path):
            raise UserError(
                f"{entry.path} is a link to nowhere and may have been a class: repair "
                "or delete it."
            )
    if not (names := _folders(path)):
        raise UserError(
            f"{path} has no class folders: put the images of each class into "
            f"{os.path.join(path, '<class>')}."
        )
    return names


def _is_file(entry):
    """A link to nowhere is a file that cannot be read, and counts as one."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _image_files(path: str) -> tuple[list[str], list[str]]:
    """The names of the images, and those of whatever else is there."""
    files, others = [], []
    for entry in _entries(path):
        is_image = entry.name.lower().endswith(IMAGE_SUFFIXES) and _is_file(entry)
        (files if is_image else others).append(entry.name)
    if not files:
        raise UserError(
            f"The class folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
            "add images or delete the folder."
        )
    return sorted(files), sorted(others)
