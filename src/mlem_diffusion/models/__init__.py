"""Denoisers: the UNet, trained families on disk, Gaussian and analytic denoisers, and adapters for other networks."""
