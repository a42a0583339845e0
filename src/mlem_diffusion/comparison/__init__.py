"""Comparison of samplers: settings, runs, errors and distances, speed-ups."""
