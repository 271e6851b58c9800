"""Time one whole denoising step of FLUX.1: the model in plain torch, its inputs, weights, and timing."""
