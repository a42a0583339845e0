"""Figures: one module each, a shared style, and grids of images."""
