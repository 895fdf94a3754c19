"""Evaluates a checkpoint of --workdir; the last line printed is one JSON object.

python eval.py --config=configs/digits.py --workdir=runs/digits
python eval.py ... --step=latest --weights=raw
python eval.py ... --datasets=val,real,v2,a,r --resolutions=224,384,512

The sets are looked for in data.root; see sparx_jax/data/eval_sets.py.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports would answer with tracebacks

from absl import flags

from sparx_jax.errors import UserError
from sparx_jax.training import cli
from sparx_jax.training.evaluate import evaluate_checkpoint

STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, latest or its number.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", ["auto", "raw", "ema"], "Which weights; auto: ema if saved."
)
DATASETS = flags.DEFINE_list("datasets", ["val"], "Rows of the table: val,real,v2,a,r.")
RESOLUTIONS = flags.DEFINE_list(
    "resolutions", [], "Columns, in pixels; none: that of the config."
)


def main(config, workdir):
    """Prints the evaluation that the flags describe."""
    if not DATASETS.value:
        raise UserError("--datasets= names no set: give some of val,real,v2,a,r.")
    if not all(word.isdecimal() for word in RESOLUTIONS.value):
        raise UserError(
            f"--resolutions={','.join(RESOLUTIONS.value)} is not a list of pixels: "
            "write it as 224,384."
        )
    evaluate_checkpoint(
        config,
        workdir,
        step=STEP.value,
        weights=WEIGHTS.value,
        datasets=DATASETS.value,
        resolutions=[int(word) for word in RESOLUTIONS.value],
    )


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)  # for --help
    cli.run(main)
