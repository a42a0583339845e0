"""The exponent gamma: denoising errors of the levels, power laws fitted to them, and their intervals."""
