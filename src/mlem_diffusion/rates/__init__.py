"""Exponents of cost against error on a problem whose answer is known."""
