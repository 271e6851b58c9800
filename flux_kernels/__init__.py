"""flux_kernels: GGUF-quantized Flux at full speed inside diffusers."""
