"""Sampling with any denoiser. Read process, level, step_rules, brownian and sampler, in this order."""
