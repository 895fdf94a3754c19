"""Evaluates a checkpoint of --workdir; the last line printed is one JSON object.

python eval.py --config=configs/digits.py --workdir=runs/digits
python eval.py ... --step=latest --weights=raw
"""

from absl import flags

from sparx_jax.training import cli
from sparx_jax.training.evaluate import evaluate_checkpoint

STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, latest or its number.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", ["auto", "raw", "ema"], "Which weights; auto: ema if saved."
)


def main(config, workdir):
    """Prints the evaluation of the checkpoint that the flags name."""
    evaluate_checkpoint(config, workdir, step=STEP.value, weights=WEIGHTS.value)


if __name__ == "__main__":
    cli.run(main)
