"""Figures: one module per figure; a shared style, with grids of images."""
