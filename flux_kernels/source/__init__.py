"""Models to read from: GGUF, safetensors and diffusers folders, tensor by tensor."""
