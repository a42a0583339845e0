"""Experiments on disk: the one room that knows Hydra, W&B, processes and folders."""
