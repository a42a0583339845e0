"""Sampling with any denoiser. Read process, level, step_rules, brownian, estimator and sampler, in this order."""
