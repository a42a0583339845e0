"""Training of one level: the loop, a training step, and the step as a CUDA graph."""
