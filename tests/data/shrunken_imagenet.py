"""ImageNet and its evaluation sets with real names and few, tiny, made pictures.

`write_folders` and `write_eval_sets` make them as folders, `write_archives` packs those
as the official archives, and `prepare_archives` prepares them with TFDS's own builders,
which is what this file does as a program, after a first run was killed.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

_TFDS = Path(find_spec("tensorflow_datasets").origin).parent / "datasets/imagenet2012"
WNIDS = tuple((_TFDS / "labels.txt").read_text().split())
"""The 1,000 classes."""
VAL_WNIDS = tuple((_TFDS / "validation_labels.txt").read_text().split())
"""Of the 50,000 validation pictures in the order of their names."""
V2_FOLDER = "imagenetv2-matched-frequency-format-val"
ARCHIVES = {
    "imagenet_v2/matched-frequency": (
        *("imagenetv2-matched-frequency.tar.gz", V2_FOLDER),
    ),
    "imagenet_a": ("imagenet-a.tar", "imagenet-a"),
    "imagenet_r": ("imagenet-r.tar", "imagenet-r"),
}
"""Name in TFDS -> (archive, the folder in it)."""


def write_picture(path, wnid, size=40):
    """A JPEG whose colour tells the class and whose noise tells the path."""
    number = WNIDS.index(wnid)
    colour = np.array([number % 10, number // 10 % 10, number // 100]) * 20 + 30
    noise = np.random.default_rng(list(path.name.encode())).integers(-25, 26, (5, 5, 1))
    pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(
        path, "JPEG"
    )


def val_name(number):
    """Of validation picture `number`, from 1."""
    return f"ILSVRC2012_val_{number:08}.JPEG"


def write_folders(root, classes, *, train_per_class, val):
    """`root`/train/<wnid>/ and `root`/val/<wnid>/, the first `val` pictures there."""
    for wnid in classes:
        for i in range(train_per_class):
            write_picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", wnid)
    for number, wnid in enumerate(VAL_WNIDS[:val], 1):
        write_picture(root / "val" / wnid / val_name(number), wnid)


def write_eval_sets(root, *, v2, a, r):
    """V2 from label -> wnid, one picture each; A and R from wnids, two each."""
    for label, wnid in v2.items():
        write_picture(root / V2_FOLDER / str(label) / f"{wnid}_v2.jpeg", wnid)
    for folder, wnids in (("imagenet-a", a), ("imagenet-r", r)):
        for wnid in wnids:
            for i in range(2):
                write_picture(
                    root / folder / wnid / f"{folder[-1]}_{wnid}_{i}.jpg", wnid
                )


def write_archives(root, archives):
    """Packs what the above wrote to `root`."""
    archives.mkdir()
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((root / "train").iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in sorted(folder.iterdir()):
                    tar.add(path, path.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = inner.tell()
            inner.seek(0)
            outer.addfile(member, inner)
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((root / "val").rglob("*.JPEG")):
            tar.add(path, path.name)
    for archive, folder in ARCHIVES.values():
        with tarfile.open(
            archives / archive, "w:gz" if "gz" in archive else "w"
        ) as tar:
            tar.add(root / folder, folder)


def prepare_archives(archives, root):
    """What the process printed (stdout, stderr); it needs TensorFlow, this one not."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.data.shrunken_imagenet", archives, root],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def _accept_checksums(archives):
    """TFDS compares archives with the real ones, whose checksums it knows."""
    import tensorflow_datasets as tfds

    for name, (archive, _) in ARCHIVES.items():
        content = (archives / archive).read_bytes()
        infos = tfds.builder_cls(name.split("/")[0]).url_infos
        for url, info in infos.items():
            if info.filename == archive:
                infos[url] = type(info)(
                    size=tfds.core.units.Size(len(content)),
                    checksum=hashlib.sha256(content).hexdigest(),
                    filename=archive,
                )


def _killed(archives, root):
    """A run that ends as by kill -9 while it writes, in a process of its own."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)
    from tensorflow_datasets.core import writer

    writer.Writer.finalize = lambda *_: os._exit(9)
    prepare.prepare("imagenet2012", str(root), str(archives))
    os._exit(0)


if __name__ == "__main__":
    from sparx_jax.data import prepare

    archives, root = map(Path, sys.argv[1:])
    _accept_checksums(archives)
    words = ["imagenet2012", *ARCHIVES, f"--root={root}", f"--archives={archives}"]
    _, status = _killed(archives, root)
    left = [path.name for path in (root / "imagenet2012").glob("incomplete*")]
    print(f"killed: exit code {os.waitstatus_to_exitcode(status)}, left {len(left)}")
    prepare.main(words)
    print("once more")
    prepare.main(words)
    for bad in (
        ["imagenet2013", f"--root={root}"],
        ["imagenet2012", f"--root={root}/new", f"--archives={archives}/nowhere"],
        ["imagenet2012", f"--root={root}/new", f"--archives={root}"],
    ):
        try:
            prepare.main(bad)
        except SystemExit as end:
            print(f"{bad[0]}: exit code {end.code}", flush=True)
