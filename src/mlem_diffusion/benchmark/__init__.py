"""Speed of this repository on a device: networks, training, noise and the sampling loop, as rows of one table."""
