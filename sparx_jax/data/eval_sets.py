"""ImageNet's evaluation sets, with labels numbered as the network's classes.

    name   what                    in data.root, unpacked, or of this name in TFDS
    val    the evaluation split    (whatever the configuration names)
    real   its ReaL labels         real.json
    v2     ImageNet-V2             imagenetv2-matched-frequency-format-val
                                   imagenet_v2/matched-frequency
    a      ImageNet-A              imagenet-a    imagenet_a
    r      ImageNet-R              imagenet-r    imagenet_r

A and R have images of 200 of the 1,000 classes, and the network chooses among those
200 alone, as their authors do.  Sources: Beyer et al., arXiv:2006.07159; Recht et al.,
arXiv:1902.10811; Hendrycks et al., arXiv:1907.07174 and arXiv:2006.16241.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparx_jax.data.config import DataConfig
from sparx_jax.data.sources import FolderSource, Source
from sparx_jax.errors import UserError

# Name -> (folder, name in TFDS).
_PLACES = {
    "v2": ("imagenetv2-matched-frequency-format-val", "imagenet_v2/matched-frequency"),
    "a": ("imagenet-a", "imagenet_a"),
    "r": ("imagenet-r", "imagenet_r"),
}
_RESTRICTED = ("a", "r")
EVAL_SETS = ("val", "real", *_PLACES)


class EvalSet(NamedTuple):
    """What one row of the table of results is computed from."""

    source: Source
    classes: np.ndarray | None = None
    """Those that the network may choose from, ascending; None: all."""
    answers: list[list[int]] | None = None
    """ReaL: the right labels of each image, maybe none; None: the source's own."""


def open_eval_set(name: str, data: DataConfig, val: Source) -> EvalSet:
    """Opens one of `EVAL_SETS`.

    Args:
      name: of the set.
      data: its `root` holds the sets, see above.
      val: the evaluation split, whose `class_names` number the classes.

    Raises:
      UserError: the name is unknown, the set is not there, or it is not of these
        classes.
    """
    if name == "val":
        return EvalSet(val)
    if name == "real":
        return EvalSet(val, answers=_real_labels(data.root, val))
    if name not in _PLACES:
        raise UserError(
            f"--datasets names {name!r}: choose from {', '.join(EVAL_SETS)}."
        )
    source = _Renumbered(_open(name, data.root), val.class_names)
    classes = np.unique(source.labels) if name in _RESTRICTED else None
    return EvalSet(source, classes)


def _open(name, root):
    folder, tfds_name = _PLACES[name]
    if os.path.isdir(os.path.join(root, folder)):
        return FolderSource(root, folder, folder)
    if os.path.isdir(os.path.join(root, tfds_name)):
        from sparx_jax.data.tfds_source import TfdsSource  # takes seconds

        return TfdsSource(root, tfds_name, "test")
    raise UserError(
        f"--datasets names {name!r}, but data.root={root!r} has neither the folder "
        f"{folder} (its archive, unpacked) nor {tfds_name} (python -m "
        f"sparx_jax.data.prepare {tfds_name} --root={root})."
    )


@dataclass
class _Renumbered:
    """The images of `source`, labels being positions in `class_names`."""

    source: Any
    class_names: tuple[str, ...]

    def __post_init__(self):
        names = self.source.class_names
        number_of = {name: i for i, name in enumerate(self.class_names)}
        if number_of.keys().isdisjoint(names):  # V2's folders are labels: 0 to 999
            number_of = {str(i): i for i in range(len(self.class_names))}
        self._number = np.array([number_of.get(name, -1) for name in names], np.int32)
        if (self._number < 0).any() and (self.labels < 0).any():
            stranger = names[self.source.labels[np.argmin(self.labels)]]
            raise UserError(
                f"{self.source.name(0)} is of a set with the class {stranger!r}, which "
                f"is none of the {len(self.class_names)} classes of the evaluation "
                "split: such sets go with data whose classes are ImageNet's WordNet "
                "ids."
            )

    @property
    def labels(self) -> np.ndarray:
        return self._number[self.source.labels]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        label = example["label"]  # negative where nobody has published it
        return {**example, "label": int(self._number[label]) if label >= 0 else label}

    def name(self, index: int) -> str:
        return self.source.name(index)


def _real_labels(root, val):
    """In the order of `val`; real.json is in that of the official file names."""
    path = os.path.join(root, "real.json")
    if not os.path.isfile(path):
        raise UserError(
            f"--datasets names 'real', but {path} is missing: copy it there from "
            "https://github.com/google-research/reassessed-imagenet."
        )
    try:
        with open(path) as file:
            labels = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it there again.") from error
    count = len(val.class_names)
    try:
        good = all(type(n) is int and 0 <= n < count for some in labels for n in some)
    except TypeError:
        good = False
    if not good or not isinstance(labels, list):
        raise UserError(
            f"{path} does not hold lists of labels below {count}, the number of "
            "classes of the evaluation split: it goes with all 1,000 of ImageNet."
        )
    answers = []
    for index in range(len(val)):
        name = os.path.basename(val.name(index))
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            raise UserError(
                f"{val.name(index)} has no entry in {path}, which is of the images "
                f"ILSVRC2012_val_00000001.JPEG to {len(labels):08}: evaluate 'real' on "
                "ImageNet's validation split under its official file names."
            )
        answers.append(labels[number - 1])
    if not any(answers):
        raise UserError(f"{path} has no label for any of the {len(val)} images.")
    return answers
