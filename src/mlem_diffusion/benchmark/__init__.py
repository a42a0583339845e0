"""How fast this repository runs on a device: networks, training, whole samplers, noise. Results are rows of one table."""
