"""Models: the interface of every family, the families, import and export in Hugging Face's format, and generation."""
