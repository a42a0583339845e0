"""Speed of this repository on a device: networks, training, complete samplers and noise, as rows of one table."""
