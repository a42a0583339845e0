"""Denoisers: the UNet and trained families on disk, Gaussian and analytic ones, adapters of other networks."""
