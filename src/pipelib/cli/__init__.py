"""The pipelib command."""
