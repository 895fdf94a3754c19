"""Trains a model, or resumes where the last run in --workdir stopped.

python train.py --config=configs/digits.py --workdir=runs/digits
python train.py --config=configs/digits.py --workdir=runs/w --config.batch_size=32
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports would answer with tracebacks

from absl import flags

from sparx_jax.training import cli
from sparx_jax.training.loop import train

ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Resume from a checkpoint made with other settings."
)


def main(config, workdir):
    """Trains with the flags."""
    train(config, workdir, allow_config_change=ALLOW.value)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)  # for --help
    cli.run(main)
