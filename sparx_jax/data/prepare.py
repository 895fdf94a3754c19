"""Prepares data sets with TFDS, as ArrayRecord, for training without TensorFlow.

    pip install tensorflow-cpu==2.21.0   # here only: training does not use it
    python -m sparx_jax.data.prepare imagenet2012 --root=DATA --archives=DOWNLOADS

DOWNLOADS holds the files that TFDS cannot fetch: for imagenet2012 the two official
archives, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Whatever else a set needs
is taken from there too if it is there, and downloaded otherwise. Several sets may be
named; for the robustness table: imagenet_v2/matched-frequency imagenet_a imagenet_r.

After an interruption the same command goes on: sets that are complete are left alone,
downloads are kept, and the set that was being written is started anew, since TFDS
shuffles it as a whole; what is left of the interrupted run is removed.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparx_jax.errors import UserError
from sparx_jax.locks import lock


def prepare(name: str, root: str, archives: str | None = None) -> str:
    """Prepares one data set unless it is there; returns a sentence about it.

    Args:
      name: TFDS's, with configuration or version if any: "imagenet2012".
      root: TFDS's `data_dir`.
      archives: folder of files that were downloaded by hand.

    Raises:
      UserError: TensorFlow is missing, the name is unknown, or files are missing.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "Preparing needs TensorFlow, which is not installed: pip install "
            "tensorflow-cpu==2.21.0; training does without it."
        )
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

    if archives is not None and not os.path.isdir(archives):
        raise UserError(
            f"--archives={archives} is not a folder: create it or correct the path."
        )
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"TFDS cannot build {name!r} ({reason}): see "
            "https://www.tensorflow.org/datasets/catalog for the names."
        ) from error
    folder = Path(builder.data_dir)
    with _alone(folder):
        if folder.exists():
            return f"{name}: already complete in {folder}"
        _remove_leftovers(folder)
        config = tfds.download.DownloadConfig(manual_dir=archives)
        try:
            builder.download_and_prepare(download_config=config)
        except (AssertionError, tensorflow.errors.NotFoundError) as error:
            # How TFDS asks for files that it cannot download.
            asked = f"{error}; {builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            raise UserError(
                f"{name} lacks files: {' '.join(asked.split())} Its manual_dir is "
                f"--archives={archives}."
            ) from error
    counts = (f"{s.num_examples:,} {n}" for n, s in builder.info.splits.items())
    return f"{name}: {', '.join(counts)} images in {folder}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock, so that nobody removes what another process is writing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be made or written ({error.strerror}): give a "
            "--root that may be written."
        ) from error
    with file:
        if not lock(file):
            raise UserError(
                f"Another process is preparing {folder}: wait for it to end."
            )
        yield


def _remove_leftovers(folder):
    for path in folder.parent.glob(f"incomplete.*_{folder.name}"):
        shutil.rmtree(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends with one sentence and exit code 78."""
    parser = argparse.ArgumentParser(
        prog="python -m sparx_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="TFDS's name")
    parser.add_argument("--root", required=True, help="where to write: data.root")
    parser.add_argument("--archives", help="folder of files downloaded by hand")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            print(prepare(name, options.root, options.archives), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(os.EX_CONFIG) from None
    print(
        f"train with --config.data.name=tfds --config.data.root={options.root}, "
        "--config.data.tfds_name=NAME and, of imagenet2012, "
        "--config.data.eval_split=validation"
    )


if __name__ == "__main__":
    main()
