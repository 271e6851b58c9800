"""One whole denoising step of FLUX.1: the model in plain torch or diffusers, its inputs, timing and verdict."""
