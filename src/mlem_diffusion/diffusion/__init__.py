"""Sampling with any denoiser: the process, levels, step rules, one Brownian path, estimators, the loop that runs them."""
