"""Flax NNX modules, one idea a file.

A module takes its widths explicitly and its randomness as `rngs`; it is built in
evaluation mode, and `model.train()` / `model.eval()` of NNX switch BatchNorm and drop
path.
"""
