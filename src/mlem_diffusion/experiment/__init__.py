"""Experiments on disk: the only package that uses Hydra, W&B, processes and folders."""
