"""Exponents of cost against error on a problem with a known solution."""
