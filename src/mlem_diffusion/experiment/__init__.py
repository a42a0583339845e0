"""Experiments on disk: the only package that uses Hydra, W&B, processes and folders."""

import os

os.environ["MPLBACKEND"] = "Agg"  # figures are files; a notebook's backend may not exist in this environment
