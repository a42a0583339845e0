"""Samplers against each other: settings, runs, errors and distances, speed-ups."""
