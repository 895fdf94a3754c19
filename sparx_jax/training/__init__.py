"""Training, evaluation and checkpoints of any model of the package."""
