"""Figures: one module per figure, a shared style, and grids of images."""
