"""Training of one level: the loop, a step, and the step as a CUDA graph."""
