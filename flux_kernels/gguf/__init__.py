"""GGUF files: reader, writer, and the rules both keep."""
