"""Mixed-precision files: measured costs of every tensor and type, plans to a byte budget, conversion to GGUF."""
